"""Names in one place, and adapters that are exchanged on every replica."""
import json
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from threadweaver_ref import cli, serve
from threadweaver_ref.decode import generate
from threadweaver_ref.model import decoding_copy, load_policy
from threadweaver_ref.programs import parse
from threadweaver_ref.remote import Completion, EngineError, generate_remote
from threadweaver_ref.serve import CompletionsClient, cache_hits, cost_rows
from threadweaver_ref.standin import StandIn, greedy_writer
from threadweaver_ref.tokenizer import char_tokenizer


def test_the_public_names_are_here():
    for name in ("CompletionsClient", "BatchingEngine", "generate_remote", "parallel_generate", "serve_check", "save_policy"):
        assert name in serve.__all__ and callable(getattr(serve, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_policy_is_a_plain_model_in_every_precision(tmp_path, dtype):
    model, tokenizer = load_policy("tiny-rl", device="cpu", dtype=dtype)
    serve.save_policy(model, tokenizer, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    ids = torch.tensor([tokenizer.encode("a=7+3x4;b=2+5x3;c=a+b;c?")])
    with torch.no_grad(): off = (plain(ids).logits - model(ids).logits).abs().max()
    assert off < (1e-4 if dtype == torch.float32 else .5) and not (tmp_path / "adapter_config.json").exists()
    assert (tmp_path / "custom_generate" / "generate.py").is_file() and isinstance(model, PeftModel)


def test_an_adapter_goes_to_every_replica_with_a_salt_of_its_own(tmp_path):
    end = lambda request: Completion([1], [-1.], "stop")
    with StandIn(end, model="base") as one, StandIn(end, model="base") as two:
        client, salts = CompletionsClient([one.url, two.url], "base"), [None]
        for _ in range(3):
            client.load_adapter("policy", tmp_path)
            rollouts = generate_remote(client, char_tokenizer(), ["1+1?", "2+2?"])
            assert client.model == "policy" and all(r.finish_reason == "stop" for r in rollouts)
            salts.append(client.salt)
    assert len({*salts}) == 4
    for server in (one, two):
        assert server.loaded == [{"lora_name": "policy", "lora_path": str(tmp_path), "load_inplace": True}] * 3
        assert [(b["model"], b["cache_salt"]) for b in server.bodies] == [("policy", s) for s in salts[1:]]


def test_an_adapter_that_does_not_load():
    with StandIn(None) as server: pass
    with pytest.raises(EngineError, match="load_lora_adapter"): CompletionsClient(server.url, "base", retries=0).load_adapter("policy", ".")


def test_an_adapter_whose_name_is_taken_is_there_already(tmp_path):
    "From a run before, or from an attempt whose answer was lost. Another reason to refuse is an error."
    with StandIn(None, model="base") as server:
        client = CompletionsClient(server.url, "base", retries=1, backoff=.01)
        adapt, lost = server.adapt, []
        def losing(*args):
            said = adapt(*args)
            return said if lost else lost.append(1) or (503, {}, None)
        server.adapt = losing
        client.load_adapter("policy-1", tmp_path, inplace=False)
        assert lost and len(server.loaded) == 1 and client.model == "policy-1"
        server.adapt = lambda *args: (400, {"error": {"message": "its rank is too large"}}, None)
        with pytest.raises(EngineError, match="rank is too large"): client.load_adapter("policy-2", tmp_path, inplace=False)
        server.adapt = adapt
        for _ in "12": client.unload_adapter("policy-1")
        assert server.served == ["base"]


# ---- what it costs

METRICS = """# HELP vllm:prefix_cache_queries_total tokens
vllm:prefix_cache_queries_total{engine="0"} %s
vllm:prefix_cache_queries_created{engine="0"} 7.0
vllm:prefix_cache_hits_total{engine="0"} %s
vllm:external_prefix_cache_hits_total{engine="0"} 5.0
"""


def test_hits_of_the_prefix_cache_by_hand():
    pages = [{"/metrics": (200, METRICS % numbers)} for numbers in ((100., 40.), (20., 5.))]
    with StandIn(None, pages=pages[0]) as one, StandIn(None, pages=pages[1]) as two:
        assert cache_hits(CompletionsClient([one.url, two.url], "tiny-rl")) == (120, 45)
    with StandIn(None) as silent: assert cache_hits(CompletionsClient(silent.url, "tiny-rl")) == (None, None)


def test_the_rows_of_what_it_costs():
    "A server that found a quarter of what it was asked for since the last look, and half before."
    model, tokenizer = load_policy("tiny-rl", device="cpu")
    model, questions, looks, written = decoding_copy(model), ["a=7+3x9;b=2+5x12;c=4-1x8;d=6+2x10;e=a+b;f=c-d;ef?"] * 2, [], []
    writer = greedy_writer(model)
    def counted(request):
        completion = writer(request)
        written.append(len(completion.ids))
        return completion
    with StandIn(counted) as server:
        about = server.about
        def metrics(path):
            if path != "/metrics": return about(path)
            looks.append(path)
            return 200, METRICS % ((1000., 500.) if len(looks) == 1 else (1400., 600.))
        server.about = metrics
        client = CompletionsClient(server.url, "tiny-rl")
        rows, same = cost_rows(model, tokenizer, questions, client)
        _, again = cost_rows(model, tokenizer, questions, client)
    assert same and again and [r["way"] for r in rows] == ["local", "continuous batching", "server"] and client.salt is None
    assert len({b["cache_salt"] for b in server.bodies}) == 2   # what the first run left is not found
    local, batching, remote = rows
    assert remote["cached"] == .25 and remote["requests"] == batching["requests"] == len(server.bodies) / 2 and local["requests"] is None
    asked = sum(len(b["token_ids"]) for b in server.bodies) / 2
    once, wrote = sum(len(ids) for r in generate(model, tokenizer, questions) for ids in r.tree.ids), sum(written) / 2
    assert remote["reading"] == batching["reading"] == round((asked + wrote) / once, 2) > 1
    assert remote["computed"] == round((.75 * asked + wrote) / once, 2) and "computed" not in batching
    assert remote["tokens"] == once and 0 < remote["client"] < 1


def test_a_server_that_writes_otherwise_is_seen():
    model, tokenizer = load_policy("tiny-rl", device="cpu")
    with StandIn(lambda request: Completion([1], [-1.], "stop")) as server:
        _, same = cost_rows(decoding_copy(model), tokenizer, ["a=1+2;b=a*3;b?"], CompletionsClient(server.url, "tiny-rl"))
    assert not same


@pytest.mark.parametrize("where, said", [("gone", "/v1/models"), ("other", "no model 'tiny-rl': choose one of other"), ("out", "is no folder")])
def test_what_cannot_work_is_said_in_one_line_before_the_long_runs(where, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("threadweaver_ref.serve.cost_rows", lambda *args: pytest.fail("it began"))
    monkeypatch.setattr("threadweaver_ref.client.time.sleep", lambda seconds: None)
    with StandIn(None, model="other" if where == "other" else "tiny-rl") as server: url = server.url
    out = tmp_path / "nowhere" / "rows.json" if where == "out" else tmp_path / "rows.json"
    def command():
        monkeypatch.setattr(sys, "argv", ["threadweaver-ref", "serve-cost", url, "--model", "tiny-rl", "--out", str(out)])
        with pytest.raises(SystemExit) as ended: cli.main()
        return ended.value.code
    if where == "gone": assert command() == 2
    else:
        with StandIn(None, model="other" if where == "other" else "tiny-rl", port=server.port): assert command() == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1 and "Traceback" not in line


def test_the_command_line_counts(tmp_path, monkeypatch, capsys):
    model, _ = load_policy("tiny-rl", device="cpu")
    monkeypatch.setattr(sys, "argv", ["x", "serve-cost", "URL", "--model", "tiny-rl", "--problems", "1", "--out", str(tmp_path / "rows.json")])
    monkeypatch.setattr("threadweaver_ref.domains.split_problems", lambda *args: {"one": [parse("a=7+3x4;b=2+5x3;c=a+b;c?")]})
    with StandIn(greedy_writer(decoding_copy(model)), pages={"/metrics": (200, METRICS % (0., 0.))}) as server:
        sys.argv[2] = server.url
        with pytest.raises(SystemExit) as ended: cli.main()
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert not ended.value.code and "the same tokens" in capsys.readouterr().out and kept["same"] and len(kept["rows"]) == 3
