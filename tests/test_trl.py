"""Rows for TRL: each sampled token once, with the tree's log-probabilities; TRL's own packing as an oracle, and its trainer on them."""
import threading
import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from threadweaver_ref.decode import DecodeConfig, generate
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.model import decoding_copy, load_policy, shipped_policies
from threadweaver_ref.pgrpo import PGRPOConfig
from threadweaver_ref.programs import mixture
from threadweaver_ref.remote import Completion, EngineError
from threadweaver_ref.scoring import collate, tree_logprobs
from threadweaver_ref.serve import CompletionsClient
from threadweaver_ref.standin import StandIn
from threadweaver_ref.tree import SpanTree
from threadweaver_ref.trl_worker import ForkJoinRolloutWorker, server_rollouts, training_rows

CONFIG = PGRPOConfig(batch=2, group=4, limits=Limits(max_tokens=300, max_thread_tokens=100))
QUESTIONS = ["a=7+3x9;b=2+5x12;c=4-1x8;d=6+2x10;e=a+b;f=c-d;ef?", "a=7+3x4;b=2+5x3;c=a+b;c?"]


def small_ones(rng, step): return mixture(rng, step, small=1)


@pytest.fixture(scope="module")
def policies():
    found = {name: load_policy(name, device="cpu") for name in ("tiny-sft", "tiny-result")}
    return {name: (decoding_copy(model), tokenizer) for name, (model, tokenizer) in found.items()}


def rolled(policies, name, join):
    model, tokenizer = policies[name]
    found = generate(model, tokenizer, QUESTIONS * 6, DecodeConfig(join=join, temperature=1.0))
    assert sum(r.forks for r in found) > 4
    return model, found


def alone(model, ids, mask):
    "Log-probabilities of a row's trained tokens, by a plain pass."
    with torch.no_grad(): logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return [float(logprobs[i - 1, ids[i]]) for i, m in enumerate(mask) if m]


@pytest.mark.parametrize("name, join", [("tiny-sft", "concat"), ("tiny-result", "result")])
def test_every_sampled_token_is_trained_once_with_its_own_probability(policies, name, join):
    model, rollouts = rolled(policies, name, join)
    for r in rollouts:
        rows = training_rows(r)
        assert sum(sum(mask) for _, mask, _ in rows) == len(r.logprobs) and len(rows) > (r.forks > 0)
        known = [x for _, mask, logprobs in rows for x, m in zip(logprobs, mask) if m]
        assert sorted(known) == sorted(r.logprobs.tolist())
        assert known == pytest.approx([x for ids, mask, _ in rows for x in alone(model, ids, mask)], abs=1e-3)


def test_nested_lines_and_lines_that_train_nothing():
    class R: tree, logprobs = SpanTree(), torch.tensor([-1., -2., -3., -4.])
    t = R.tree
    root = t.add([1, 2]); fork = t.add([3], [root], True)
    a, b = t.add([4, 5], [fork]), t.add([6], [fork])
    t.add([7], [a]); inner = t.add([8], [a], True); t.add([9, 10], [inner], True); t.add([11], [b])
    assert training_rows(R) == [([1, 2, 3, 4, 5, 8, 9, 10], [0, 0, 1, 0, 0, 1, 1, 1], [0, 0, -1, 0, 0, -2, -3, -4])]


def test_what_a_kv_join_made_is_refused():
    class R: tree, logprobs = SpanTree(), torch.zeros(0)
    R.tree.add([1]); R.tree.add([2], [0]); R.tree.add([3], [0]); R.tree.add([4], [1, 2], True)
    with pytest.raises(ValueError, match="kv join makes no sequences"): training_rows(R)


# ---- TRL

def trie(rollout):
    "TRL's packing of a rollout's rows."
    trl = pytest.importorskip("trl.experimental.async_grpo.packing", reason="TRL is not installed")
    row = trl.TreeRow()
    for ids, mask, logprobs in training_rows(rollout):
        row.add({"input_ids": torch.tensor(ids), "completion_mask": torch.tensor(mask), "old_log_probs": torch.tensor(logprobs),
                 "advantage": 1.0, "group_id": 0})
    return row.pack()


def seen(packed):
    "(N, N) bool: what each token of TRL's packing attends to, from its indices."
    n = len(packed["input_ids"])
    mask, q, k = torch.zeros(n, n, dtype=torch.bool), packed["tree_cu_seqlens_q"].tolist(), packed["tree_cu_seqlens_k"].tolist()
    for (a, b), (c, d) in zip(zip(q, q[1:]), zip(k, k[1:])):
        keys = packed["tree_kv_index"][c:d]
        for i in range(a, b): mask[i, keys[:len(keys) - (b - 1 - i)]] = True
    return mask


def test_trls_prefix_tree_gives_the_log_probabilities_of_our_tree(policies):
    "An independent packing: a trie of rows, made from ids alone."
    model, rollouts = rolled(policies, "tiny-sft", "concat")
    for r in rollouts:
        packed = trie(r)
        hidden = torch.zeros(seen(packed).shape).masked_fill(~seen(packed), torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad():
            logits = model(packed["input_ids"][None], position_ids=packed["position_ids"][None], attention_mask=hidden).logits[0]
            ours = tree_logprobs(model, collate([r.tree.pack()]))
        labels = packed["shift_labels"][packed["token_index"]]
        theirs = logits.log_softmax(-1)[packed["token_index"], labels]
        assert (labels >= 0).all() and len(theirs) == len(ours)
        assert torch.allclose(theirs.sort().values, ours.sort().values, atol=1e-4)
        assert torch.allclose(theirs, packed["old_log_probs"], atol=1e-3)
        assert 0 <= len(packed["input_ids"]) - len(r.tree.scored().pack()) <= len(r.tree)   # a token more where lines part, no copies


class PlainAttention:
    "In the place of a kernel for GPUs: every segment by itself."
    @staticmethod
    def flash_attn_varlen_func(query, key, value, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=True, window_size=(-1, -1)):
        out = []
        for a, b, c, d in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist()):
            q, k, v = (x.transpose(0, 1)[None] for x in (query[a:b], key[c:d], value[c:d]))
            mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
            out.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(out)


class NoTransfer:
    "The engine has its own copy of the weights."
    def init_weight_transfer(self): pass
    def pause(self): pass
    def send_weights(self, iterator): self.sent = sum(1 for _ in iterator)
    def resume(self): pass
    def destroy(self): pass


def test_trls_trainer_learns_from_forked_rollouts(policies, tmp_path, monkeypatch):
    async_grpo = pytest.importorskip("trl.experimental.async_grpo", reason="TRL is not installed")
    from datasets import Dataset
    from trl.experimental.async_grpo import async_grpo_trainer, packing
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)   # it asks CUDA
    monkeypatch.setattr(packing, "_flash_attn", lambda: PlainAttention)
    model, tokenizer = policies["tiny-sft"]
    def local(questions, config, seeds, version): return generate(model, tokenizer, questions, config, seeds)
    worker, before = ForkJoinRolloutWorker(local, tokenizer, small_ones, CONFIG), shipped_policies()["tiny-sft"]
    args = async_grpo.AsyncGRPOConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=16, num_generations=4, learning_rate=1e-3, use_cpu=True,
                                      token_budget=-1, logging_steps=1, report_to=[], save_strategy="no", bf16=False, gradient_checkpointing=False,
                                      max_staleness=100, dtype="float32", vllm_server_base_url="http://127.0.0.1:9")
    trainer = async_grpo.AsyncGRPOTrainer(str(before), args=args, train_dataset=Dataset.from_dict({"prompt": QUESTIONS}), processing_class=tokenizer,
                                          rollout_worker=worker, weight_transfer=NoTransfer())
    trainer.train()
    log = [row for row in trainer.state.log_history if "ratio" in row]
    assert len(log) == 2 and log[0]["ratio"] == pytest.approx(1, abs=1e-4) and worker.version >= 2
    assert log[0]["accuracy"] > .5 and not worker.thread.is_alive()
    start = AutoModelForCausalLM.from_pretrained(before, dtype=torch.float32)
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), trainer.model.parameters()))


# ---- the worker

def test_groups_advantages_and_versions(policies):
    pytest.importorskip("trl", reason="TRL is not installed")
    model, tokenizer = policies["tiny-sft"]
    asked = []
    def write(questions, config, seeds, version):
        asked.append((len(questions), config.temperature, version))
        return generate(model, tokenizer, questions, config, seeds)
    worker = ForkJoinRolloutWorker(write, tokenizer, small_ones, CONFIG, ahead=3)
    worker.update_model_version(7)
    (problem, rollouts, version), _ = worker.groups(0)
    samples = worker.samples(problem, rollouts, version, 5)
    assert asked == [(8, 1.0, 7)] and {s.model_version for s in samples} == {7} and {s.group_id for s in samples} == {5}
    assert len(samples) == sum(len(training_rows(r)) for r in rollouts)
    paid = [s.metrics["reward"] for s in samples]
    assert all((a.advantage > b.advantage) == (x > y) for a, x in zip(samples, paid) for b, y in zip(samples, paid))
    worker.start()
    first = [worker.rollout_buffer.get(timeout=60) for _ in range(20)]
    assert len({s.group_id for s in first}) > 1 and worker.rollout_buffer.qsize() <= 3
    worker.check_health(60)
    worker.stop()
    assert not worker.thread.is_alive()


def test_a_worker_that_fails_says_why(policies):
    _, tokenizer = policies["tiny-sft"]
    end = lambda request: Completion([1], [-1.], "stop")
    with StandIn(end, model="trl-policy-v1", fault=lambda n: "gone") as server:
        write = server_rollouts(CompletionsClient(server.url, "trl-policy-v1"), tokenizer)
        worker = ForkJoinRolloutWorker(write, tokenizer, small_ones, CONFIG)
        worker.update_model_version(1)
        worker.start()
        worker.thread.join(60)
    with pytest.raises(RuntimeError, match="the rollouts failed: .*not trained on.*404"): worker.check_health(60)
    late = ForkJoinRolloutWorker(write, tokenizer, small_ones, CONFIG)
    late.beat = time.time() - 100
    with pytest.raises(RuntimeError, match="no rollout for 100 s"): late.check_health(60)


def test_a_step_whose_adapter_is_taken_away_meanwhile_is_dropped(policies):
    "TRL keeps a few versions; the worker goes on with the one that there is now."
    pytest.importorskip("trl", reason="TRL is not installed")
    _, tokenizer = policies["tiny-sft"]
    def exchanged(request):
        if len(server.bodies) == 4:
            worker.update_model_version(2)
            server.served[:] = ["trl-policy-v2"]
        return Completion([1], [-1.], "stop")
    with StandIn(exchanged, model="trl-policy-v1") as server:
        client = CompletionsClient(server.url, "trl-policy-v1", concurrency=1)
        worker = ForkJoinRolloutWorker(server_rollouts(client, tokenizer), tokenizer, small_ones, CONFIG)
        worker.update_model_version(1)
        assert worker.groups(0) == [] and worker.version == 2
        worker.start()
        sample = worker.rollout_buffer.get(timeout=60)
        worker.check_health(60)
        worker.stop()
        assert sample.model_version == 2 and worker.failed is None
        server.served[:] = ["trl-policy-v3"]   # and nobody has told the worker
        with pytest.raises(EngineError, match="not trained on.*404"): worker.groups(1)


def test_log_probabilities_that_nobody_knows_are_not_trained_on(policies):
    _, tokenizer = policies["tiny-sft"]
    with StandIn(lambda request: Completion([1], [-1.], "stop"), dialects=["sglang"]) as server:
        write = server_rollouts(CompletionsClient(server.url, "tiny-rl"), tokenizer, "tiny-rl")
        hot = lambda questions, config, seeds, version: write(questions, replace(config, temperature=.7), seeds, version)
        with pytest.raises(EngineError, match="no log-probabilities"): ForkJoinRolloutWorker(hot, tokenizer, small_ones, CONFIG).groups(0)
        assert len(ForkJoinRolloutWorker(write, tokenizer, small_ones, CONFIG).groups(0)) == 2


def test_its_health_counts_from_the_start_and_from_each_step(policies, monkeypatch):
    _, tokenizer = policies["tiny-sft"]
    idle = ForkJoinRolloutWorker(None, tokenizer, small_ones, CONFIG)
    idle.beat -= 1000
    monkeypatch.setattr(idle, "_run", lambda: None)
    idle.start()
    idle.check_health(60)
    began, go = threading.Event(), threading.Event()
    def write(*args):
        began.set()
        go.wait(60)
        raise EngineError("over")
    worker = ForkJoinRolloutWorker(write, tokenizer, small_ones, CONFIG)
    worker.beat -= 1000   # it was made long ago
    worker.start()
    assert began.wait(60)
    worker.check_health(60)
    go.set()
    worker.stop()
    worker.beat -= 1000
    with pytest.raises(EngineError, match="over"): worker.groups(1)
    assert time.time() - worker.beat < 60


def test_it_begins_where_a_training_goes_on_and_can_be_started_again(policies, monkeypatch):
    _, tokenizer = policies["tiny-sft"]
    worker, steps = ForkJoinRolloutWorker(None, tokenizer, small_ones, CONFIG, first=5), []
    monkeypatch.setattr(ForkJoinRolloutWorker, "groups", lambda self, step: steps.append(step) or [("p", [], 0)])
    monkeypatch.setattr(ForkJoinRolloutWorker, "samples", lambda self, problem, rollouts, version, number: [step for step in steps[-1:]] * 40)
    for _ in range(2):
        worker.start()
        found = [worker.rollout_buffer.get(timeout=60) for _ in range(50)]
        worker.stop()
        while not worker.rollout_buffer.empty(): worker.rollout_buffer.get()
        assert worker.failed is None and not worker.thread.is_alive() and len({*found}) == 2
    first, again = steps[:1], steps[steps.index(steps[0]) + 1:]
    assert first == [5] and sorted({*steps}) == list(range(5, max(steps) + 1)) and len(again) >= 2
    assert steps.count(max(s for s in steps if steps.count(s) > 1)) == 2   # the step that it was stopped in is done again


def test_settings_that_cannot_be_right(policies):
    tokenizer = policies["tiny-sft"][1]
    cold = PGRPOConfig(temperature=.5)
    with pytest.raises(ValueError, match="temperature=0.5: must be 1"): ForkJoinRolloutWorker(None, tokenizer, small_ones, cold)
    with pytest.raises(ValueError, match="sequential=0.5: must be 0"): ForkJoinRolloutWorker(None, tokenizer, small_ones, PGRPOConfig(sequential=.5))
    with pytest.raises(ValueError, match="no problems"): ForkJoinRolloutWorker(None, tokenizer, [], CONFIG)
