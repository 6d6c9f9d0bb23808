"""What wants a GPU, in tiny form on a CPU: bytes, steps, engines, packing, and files that survive a stop."""
import json
from dataclasses import replace

import pytest
import torch
from helpers import spied, tiny

from threadweaver_ref import engines, scale
from threadweaver_ref.bandwidth import SHAPES, bandwidth, branch_passes, random_model, slot_bytes, spread, step_bytes, timed, watched, weight_bytes
from threadweaver_ref.engines import ENGINES, batch_bytes, engine_prompts, engine_row
from threadweaver_ref.replay import replay, units
from threadweaver_ref.scale import PARTS, TINY, Plan, Record, measure_parts, summary
from threadweaver_ref.tokenizer import char_tokenizer, encode_text

char = char_tokenizer()
ABOUT = {"machine": "m", "plan": {"size": 1}}


# ---- bytes

@pytest.mark.parametrize("shape, parameters, tied", [("qwen3-0.6b", 596_049_920, True), ("qwen3-8b", 8_190_735_360, False)])
def test_shapes_are_those_of_the_published_models(shape, parameters, tied):
    "Their numbers of parameters; the weights of a step leave out an embedding of its own."
    model = random_model(shape, char, "meta")
    assert sum(p.numel() for p in model.parameters()) == parameters and next(model.parameters()).dtype == torch.bfloat16
    assert weight_bytes(model) == 2 * (parameters - (0 if tied else 151936 * 4096))


@pytest.mark.parametrize("arch", ["Qwen3", "Llama", "Gemma"])
def test_bytes_of_a_slot_are_those_of_a_cache(arch):
    model = tiny(arch, char)
    with torch.no_grad(): cache = model(torch.arange(7)[None], use_cache=True).past_key_values
    assert 7 * slot_bytes(model) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert step_bytes(model, 10) - step_bytes(model, 3) == 7 * slot_bytes(model)


def test_a_batch_reads_what_its_steps_read():
    "Counted step by step: before each token the weights, and the slots of every sequence that still goes on."
    model, prompts, written = tiny("Qwen3", char), [[1] * 5, [1] * 9], [[1] * 4, [1] * 2]
    slots = sum(len(p) + n + .5 for p, w in zip(prompts, written) for n in range(len(w)))
    assert batch_bytes(model, prompts, written) == pytest.approx(4 * weight_bytes(model) + slots * slot_bytes(model))


def test_unknown_shape():
    with pytest.raises(ValueError, match="unknown shape 'huge': choose one of qwen3-0.6b, qwen3-8b"): random_model("huge", char)
    assert torch.get_default_dtype() == torch.float32


def test_spread_and_timed():
    assert spread([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0} and spread([1.0, 2.0, 9.0]) == {"median": 2.0, "low": 1.5, "high": 5.5}
    calls = []
    assert len(timed(lambda: calls.append(1), "cpu", repeats=4, warmup=2)) == 4 and len(calls) == 6
    assert bandwidth("cpu", 2 ** 20)["nominal"] is None


# ---- steps

@pytest.mark.parametrize("branches", [1, 2, 5, 33])
def test_a_step_has_as_many_live_branches_as_asked(branches):
    found = branch_passes(tiny("Qwen3", char), char, branches, prefix=50, turns=4)
    assert [p.queries for p in found] == [(1, branches)] * 4
    assert [b.slots - a.slots for a, b in zip(found, found[1:])] == [branches] * 3 and all(p.began < p.ended for p in found)
    assert found[0].slots > 50 + branches * (4 if branches > 1 else 0)   # all of the prefix, and how each thread begins


def test_watching_ends():
    model = tiny("Qwen3", char)
    with pytest.raises(RuntimeError):
        with watched(model) as passes:
            model(input_ids=torch.ones(2, 3, dtype=torch.long))
            raise RuntimeError
    model(input_ids=torch.ones(2, 3, dtype=torch.long))
    assert [(p.queries, p.slots) for p in passes] == [((2, 3), 3)]


@pytest.mark.parametrize("engine", [*ENGINES])
def test_engines_write_the_same_text(engine):
    "Greedy, in float32, prompts of several lengths; what ends early ends in all."
    model, prompts = tiny("Qwen3", char), [encode_text(char, t) for t in ("1", "12*3+4?", "a=5;b=a+3;b?")]
    written = ENGINES[engine](model, char, prompts, 12)
    assert written == engines.ours(model, char, prompts, 12) and max(map(len, written)) == 12


def test_an_engine_is_compared_with_ours(monkeypatch):
    expected, model = [], tiny("Qwen3", char)
    prompts = engine_prompts("qwen3-0.6b", char, 2, 6)
    assert [len(p) for p in prompts] == [6, 6] and prompts[0] != prompts[1]
    rows = [engine_row(lambda: model, char, {"measured": 1e9}, prompts, 5, engine, 1, expected) for engine in ("ours", "generate")]
    assert [r["same_text"] for r in rows] == [1, 1] and rows[0]["tokens"] == sum(map(len, expected))
    monkeypatch.setitem(ENGINES, "generate", lambda *args: [[1], expected[1]])
    assert engine_row(lambda: model, char, {"measured": 1e9}, prompts, 5, "generate", 1, expected)["same_text"] == .5


# ---- packing

def test_a_packed_tree_has_the_loss_and_gradient_of_its_units():
    trajectory, prompt = scale.wide_trajectory(300, threads=3), encode_text(char, "123")
    tree, requests, found = replay(trajectory, prompt, char), units(trajectory, prompt, char), []
    model = tiny("Qwen3", char)
    for way in ("unit by unit", "packed, dense mask"):
        loss = scale.backward(model, way, tree, requests)
        found.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5) and torch.allclose(found[0][1], found[1][1], atol=1e-5)


@pytest.mark.parametrize("tokens", [2000, 8192])
def test_trees_have_about_the_size_asked_for(tokens):
    tree = replay(scale.wide_trajectory(tokens), encode_text(char, "1" * (tokens // 20)), char)
    assert len(tree.pack()) == pytest.approx(tokens, rel=.2)


# ---- files

def test_a_record_is_rewritten_after_every_row_and_goes_on(tmp_path):
    path, calls = tmp_path / "a.json", []
    record = Record(path, ABOUT)
    for k in (1, 2):
        record.measure(lambda k=k: calls.append(k) or {"ms": k}, branches=k)
        assert [r["branches"] for r in json.loads(path.read_text())["rows"]] == [*range(1, k + 1)]
    record = Record(path, ABOUT)   # the first was stopped
    for k in (1, 2, 3): record.measure(lambda k=k: calls.append(k) or {"ms": k}, branches=k)
    assert calls == [1, 2, 3] and not record.finished
    record.close()
    assert Record(path, ABOUT).finished and not Record(path, ABOUT, again=True).finished
    assert not Record(path, {**ABOUT, "machine": "a GPU"}).content["rows"] and not Record(path, {**ABOUT, "plan": {}}).content["rows"]


def test_an_error_is_a_row_and_is_tried_again(tmp_path):
    record = Record(tmp_path / "a.json", ABOUT)
    def fail(): raise torch.OutOfMemoryError("CUDA out of memory.\n Tried to allocate")
    record.measure(fail, n=1)
    assert record.content["rows"] == [{"n": 1, "error": "OutOfMemoryError: CUDA out of memory. Tried to allocate"}]
    record.measure(lambda: {"ms": 2}, n=1)
    assert record.content["rows"] == [{"n": 1, "ms": 2}]
    with pytest.raises(KeyboardInterrupt):
        def stop(): raise KeyboardInterrupt
        record.measure(stop, n=2)


def test_a_part_whose_time_is_up_does_the_rest_next_time(tmp_path):
    record = Record(tmp_path / "a.json", ABOUT, seconds=-1)
    record.measure(lambda: {"ms": 2}, n=1)
    record.close()
    assert record.content["rows"] == [] and not record.finished and "run it again" in summary("a", record.content)
    record = Record(tmp_path / "a.json", ABOUT)
    record.measure(lambda: {"ms": 2}, n=1)
    record.close()
    assert record.finished and summary("a", record.content) == "a: finished; 1 rows, 0 errors"


def test_all_parts_on_a_cpu(tmp_path, monkeypatch):
    "The whole command in its smallest form; a second run measures nothing."
    plan = replace(TINY, branches=(1, 3), prefix=40, turns=3, batches=(2,), new=6, repeats=1, packed=(200,), longest=24)
    found = measure_parts(tmp_path, device="cpu", plan=plan)
    assert list(found) == [*PARTS] and all(part["finished"] for part in found.values())
    assert found == {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in PARTS}
    assert found["cuda"]["skipped"] == "there is no CUDA GPU"
    assert [r.get("branches") or r["engine"] for r in found["steps"]["rows"]] == [1, 3, *ENGINES]
    for row in found["steps"]["rows"]: assert 0 < row["share"] and row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
    alone, dense, flex = found["packing"]["rows"]
    assert alone["loss"] == pytest.approx(dense["loss"], abs=1e-4) and alone["unit_tokens"] > 2 * dense["packed_tokens"]
    assert "CPU" in flex["error"] or flex["loss"] == pytest.approx(dense["loss"], abs=1e-3)
    row, = found["pgrpo"]["rows"]
    assert row["rollout_seconds"]["median"] > 0 and row["update_seconds"]["median"] > 0 and row["gradient"][0] > 0
    for name, part in found.items(): assert part["command"].startswith("threadweaver-ref gpu") and part["result"] == f"{tmp_path.name}/{name}.json"
    assert str(tmp_path) not in json.dumps(found)
    measured = spied(monkeypatch, Record, "measure")
    assert measure_parts(tmp_path, ["steps", "packing"], device="cpu", plan=plan) == {k: found[k] for k in ("steps", "packing")} and not measured


def test_the_cuda_part_runs_the_tests_in_a_process(monkeypatch, tmp_path):
    out = "PASSED tests/test_cuda.py::test_a[x-1]\nFAILED tests/test_cuda.py::test_b - assert 0\n= 1 failed, 1 passed =\n"
    monkeypatch.setattr(scale.subprocess, "run", lambda command, **options: scale.subprocess.CompletedProcess(command, 1, out, ""))
    record = Record(tmp_path / "cuda.json", ABOUT)
    scale.cuda(record, Plan(), "cuda")
    row, = record.content["rows"]
    assert row["outcomes"] == {"test_a[x-1]": "PASSED", "test_b": "FAILED"} and row["code"] == 1 and row["tail"][-1] == "= 1 failed, 1 passed ="


def test_an_unknown_part_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(ValueError, match="unknown part 'gpu': choose one of cuda, steps, packing, pgrpo"):
        measure_parts(tmp_path / "x", ["steps", "gpu"])
    assert not (tmp_path / "x").exists() and {m for m in Plan().models if m in SHAPES} == {*SHAPES}
