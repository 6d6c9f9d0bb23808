"""A real vLLM on this CPU: `make test-vllm` installs it and runs these tests. Each of them starts the servers that it needs."""
import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from smollm2 import adapted

from threadweaver_ref.client import CompletionsClient
from threadweaver_ref.decode import DecodeConfig, generate
from threadweaver_ref.dialects import DIALECTS
from threadweaver_ref.domains import split_problems
from threadweaver_ref.engine_rl import EngineRollouts
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.model import add_lora, decoding_copy, load_policy, merge_lora, shipped_policies
from threadweaver_ref.pgrpo import PGRPOConfig, train_pgrpo
from threadweaver_ref.programs import mixture
from threadweaver_ref.scoring import collate, tree_logprobs
from threadweaver_ref.serve import generate_remote, save_policy, serve_check

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).parent / "vllm_cpu.sh"


def mixed(n): return [p.question for some in zip(*split_problems("programs", "dev", n).values()) for p in some]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def serving(venv, folder, name, log, *options):
    "The address of a vLLM that serves this folder. It is stopped at the end, with all its processes."
    port, env = free_port(), {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS")}
    with open(log, "w") as out:
        command = ["bash", str(SCRIPT), "serve", str(venv), str(folder), name, str(port), *options]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    url, until = f"http://127.0.0.1:{port}", time.time() + 600
    try:
        while not ready(url):
            assert process.poll() is None and time.time() < until, Path(log).read_text()[-3000:]
            time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try: process.wait(60)
        finally:
            try: os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError: pass


def ready(url):
    try: return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError: return False


@pytest.fixture(scope="module")
def venv(request):
    path = request.config.getoption("--vllm")
    assert path and (Path(path) / "bin" / "vllm").exists(), "give --vllm VENV, which tests/vllm_cpu.sh install has made"
    return Path(path).resolve()


def loaded(name):
    model, tokenizer = load_policy(name, device="cpu")
    return decoding_copy(model), tokenizer


def same(remote, local):
    "How many rollouts are the local ones, token for token; their log-probabilities must be the same to 1e-3."
    equal = [a.tree == b.tree and a.text == b.text and a.finish_reason == b.finish_reason for a, b in zip(remote, local, strict=True)]
    assert all(torch.allclose(a.logprobs, b.logprobs, atol=1e-3) for a, b, ok in zip(remote, local, equal) if ok)
    return sum(equal)


def scored(model, rollouts):
    with torch.no_grad(): return all(torch.allclose(r.logprobs, tree_logprobs(model, collate([r.tree.pack()])), atol=1e-3) for r in rollouts)


def running(url):
    "Requests that the server is decoding, or has waiting."
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{")))


def test_a_merged_policy_on_one_server_and_on_two(venv, tmp_path, capsys):
    (model, tokenizer), questions, config = loaded("tiny-rl"), mixed(20), DecodeConfig(batch=100)
    save_policy(model, tokenizer, tmp_path / "policy")
    local = generate(model, tokenizer, questions, config)
    assert sum(r.forks for r in local) > 40
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(venv, tmp_path / "policy", "tiny-rl", tmp_path / f"{i}.log")) for i in range(2)]
        for dialect in ("generate", "completions"):
            stats = {}
            remote = generate_remote(CompletionsClient(urls[0], "tiny-rl", dialect=dialect), tokenizer, questions, config, stats=stats)
            assert same(remote, local) == 100 and scored(model, remote[:20])
            assert stats["client_seconds"] <= .05 * stats["seconds"]
            with capsys.disabled(): print(f"\n{dialect}: {stats}")
        for spread in (False, True):
            assert same(generate_remote(CompletionsClient(urls, "tiny-rl", spread=spread), tokenizer, questions, config), local) == 100
        sequential = DecodeConfig("sequential")
        assert same(generate_remote(CompletionsClient(urls, "tiny-rl"), tokenizer, questions[:15], sequential),
                    generate(model, tokenizer, questions[:15], sequential)) == 15
        findings = serve_check(CompletionsClient(urls[1], "tiny-rl"), tokenizer, questions[:5])
        assert findings[-1].ok and all(f.ok for f in findings) and CompletionsClient(urls[0], "tiny-rl").dialect is DIALECTS["generate"]
        ended = generate_remote(CompletionsClient(urls[0], "tiny-rl"), tokenizer, questions[:10], seconds=.3)
        assert "cancelled" in {r.finish_reason for r in ended}
        for _ in range(50): running(urls[0]) == 0 or time.sleep(.1)
        assert running(urls[0]) == 0


def test_the_result_join(venv, tmp_path):
    (model, tokenizer), questions, config = loaded("tiny-result"), mixed(20), DecodeConfig(join="result", batch=100)
    save_policy(model, tokenizer, tmp_path / "policy")
    local = generate(model, tokenizer, questions, config)
    with serving(venv, tmp_path / "policy", "tiny-result", tmp_path / "log") as url:
        remote = generate_remote(CompletionsClient(url, "tiny-result"), tokenizer, questions, config)
    assert same(remote, local) == 100 and scored(model, remote[:20]) and sum(r.forks for r in local) > 40


def test_training_through_the_engine(venv, tmp_path, capsys):
    "Three steps of P-GRPO: what vLLM samples is what is trained, also after the adapter was sent again, and where forks are banned."
    model, tokenizer = load_policy("tiny-sft", device="cpu")
    policy = add_lora(model, r=8)
    config = PGRPOConfig(steps=3, batch=4, group=4, sequential=.25, lr=1e-3, warmup=0, limits=Limits(max_tokens=600, max_thread_tokens=200))
    with serving(venv, shipped_policies()["tiny-sft"], "tiny-sft", tmp_path / "log", "--enable-lora", "--max-lora-rank", "8") as url:
        write = EngineRollouts(CompletionsClient(url, "tiny-sft"), tmp_path / "adapter", probe=16)
        log = train_pgrpo(policy, tokenizer, lambda rng, step: mixture(rng, step, small=1), config, write=write)
    with capsys.disabled():
        for row in log: print("", *(f"{k} {row[k]:.6g}" for k in ("accuracy", "fork_rate", "used", "ratio_mean", "ratio_spread", "ratio_off")))
    assert any(row["used"] for row in log) and all(row["ratio_off"] < 1e-3 for row in log)


def test_smollm2_merged(venv, tmp_path):
    "A pretrained model with a small random adapter and the control tokens: word problems in its chat template, the first tokens of each."
    lora, tokenizer = adapted(size=.003)
    model = merge_lora(lora)
    save_policy(model, tokenizer, tmp_path / "policy")
    questions = [p.question for some in split_problems("words", "dev", 17).values() for p in some][:50]
    config = DecodeConfig(batch=50, limits=Limits(max_tokens=24))
    local = generate(model, tokenizer, questions, config)
    with serving(venv, tmp_path / "policy", "smollm2", tmp_path / "log") as url:
        remote = generate_remote(CompletionsClient(url, "smollm2"), tokenizer, questions, config)
    assert len(questions) == 50 and same(remote, local) == 50 and scored(model, remote[:10])


def test_an_adapter_is_loaded_again_in_place(venv, tmp_path):
    "Two versions under one name: each time the new weights' tokens and log-probabilities."
    base, questions = shipped_policies()["tiny-sft"], mixed(4)
    with serving(venv, base, "tiny-sft", tmp_path / "log", "--enable-lora", "--max-lora-rank", "16") as url:
        client, told = CompletionsClient(url, "tiny-sft"), []
        for version in ("tiny-rl", "tiny-rl-eq7", "tiny-rl"):
            model, tokenizer = loaded(version)
            shutil.copytree(shipped_policies()[version], tmp_path / "adapter", dirs_exist_ok=True)
            client.load_adapter("policy", tmp_path / "adapter")
            remote = generate_remote(client, tokenizer, questions)
            assert same(remote, generate(model, tokenizer, questions)) == len(questions) and scored(model, remote)
            told.append([r.text for r in remote])
        assert told[0] == told[2] != told[1]
        gone, = generate_remote(CompletionsClient(url, "policy", dialect="generate"), tokenizer, questions[:1])
        assert gone.finish_reason == "stop"
        httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "policy"})
        gone, = generate_remote(client, tokenizer, questions[:1])
        assert gone.finish_reason == "error" and "404" in str(gone.errors[0])
