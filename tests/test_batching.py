"""Continuous batching as an engine: against the local decoder; what is cancelled, refused, and not known."""
import copy
import dataclasses
import random

import pytest
import torch
from helpers import TOKENIZERS, random_text, tiny
from transformers.generation import configuration_utils
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from threadweaver_ref.batching import BatchingEngine, batching_options
from threadweaver_ref.decode import DecodeConfig, generate
from threadweaver_ref.domains import split_problems
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.model import add_lora, load_policy
from threadweaver_ref.remote import generate_remote
from threadweaver_ref.sampling import filter_logits
from threadweaver_ref.scoring import collate, tree_logprobs

char = TOKENIZERS["char"]()


def mixed(n): return [p.question for some in zip(*split_problems("programs", "dev", n).values()) for p in some]


def same(a, b, logprobs=True):
    for f in ("text", "answer", "finish_reason", "token_latency", "total_tokens", "decode_steps", "peak_context", "end", "tree", "errors"):
        assert getattr(a, f) == getattr(b, f), f
    assert sorted((i.branch, i.start, i.end, i.ids) for i in a.timeline) == sorted((i.branch, i.start, i.end, i.ids) for i in b.timeline)
    return torch.allclose(a.logprobs, b.logprobs, atol=1e-3) if logprobs else a.logprobs.isnan().all()


@pytest.mark.parametrize("policy, join, n", [
    ("tiny-rl", "concat", 3), ("tiny-result", "result", 2),
    pytest.param("tiny-rl", "concat", 20, marks=pytest.mark.slow), pytest.param("tiny-result", "result", 20, marks=pytest.mark.slow)])
def test_greedy_is_token_for_token_the_local_rollout(policy, join, n):
    model, tokenizer = load_policy(policy, device="cpu")
    config, questions = DecodeConfig(join=join, batch=256), mixed(n)
    local, batched = generate(model, tokenizer, questions, config), generate_remote(BatchingEngine(model, tokenizer), tokenizer, questions, config)
    assert sum(map(same, batched, local)) == len(questions) == 5 * n and sum(r.forks for r in local) >= n
    with torch.no_grad(): scored = [tree_logprobs(model, collate([r.tree.pack()])) for r in batched[:5]]
    assert all(torch.allclose(r.logprobs, s, atol=1e-3) for r, s in zip(batched, scored))


def test_in_bf16_texts_part_only_where_two_tokens_are_as_likely():
    "Invariant 4 in lower precision: up to where the two likeliest tokens are closer than twice the noise of the format, the texts are the same."
    model, tokenizer = load_policy("tiny-sft", device="cpu")
    half, questions = copy.deepcopy(model).bfloat16(), mixed(4)
    local = generate(half, tokenizer, questions, DecodeConfig("sequential"))
    batched = generate_remote(BatchingEngine(half, tokenizer), tokenizer, questions, DecodeConfig("sequential"))
    parted = 0
    for a, b in zip(local, batched):
        ids = [sum(r.tree.ids, []) for r in (a, b)]
        if ids[0] == ids[1]: continue
        parted += 1
        at = next(i for i, (x, y) in enumerate(zip(*ids)) if x != y)
        with torch.no_grad(): exact, rounded = (m(torch.tensor([ids[0][:at]])).logits[0].float() for m in (model, half))
        top = exact[-1].topk(2).values
        assert top[0] - top[1] <= 2 * (exact - rounded).abs().max() and {ids[0][at], ids[1][at]} <= {*exact[-1].topk(3).indices.tolist()}
    assert parted < len(questions) / 2


@pytest.mark.parametrize("arch", ["Llama", "Qwen2"])
@pytest.mark.parametrize("mode", ["sequential", "autoregressive"])
def test_other_architectures_on_one_line(arch, mode):
    model, rng = tiny(arch, char), random.Random(arch)
    questions, config = [random_text(rng, 6) + "?" for _ in range(6)], DecodeConfig(mode, limits=Limits(max_tokens=20))
    batched = generate_remote(BatchingEngine(model, char), char, questions, config)
    assert all(same(a, b, mode != "sequential") for a, b in zip(batched, generate(model, char, questions, config)))


def test_adapters_are_merged_into_a_copy():
    torch.manual_seed(0)
    model = add_lora(tiny("Qwen3", char), train_tokens=())
    for p in model.parameters():
        if p.requires_grad: torch.nn.init.normal_(p, std=.3)
    config = DecodeConfig("autoregressive", limits=Limits(max_tokens=20))
    before = {n: p.clone() for n, p in model.named_parameters()}
    batched = generate_remote(BatchingEngine(model, char), char, ["1+1?", "2+2?"], config)
    assert all(map(same, batched, generate(model, char, ["1+1?", "2+2?"], config)))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_deadlines_are_the_same():
    model, tokenizer = load_policy("tiny-rl", device="cpu")
    config, questions = DecodeConfig(deadline=20, limits=Limits(max_tokens=400), batch=256), mixed(1)
    local = generate(model, tokenizer, questions, config)
    assert any("deadline" in str(r.errors) for r in local)
    for a, b in zip(generate_remote(BatchingEngine(model, tokenizer), tokenizer, questions, config), local):
        assert sorted(map(str, a.errors)) == sorted(map(str, b.errors)) and same(dataclasses.replace(a, errors=[]), dataclasses.replace(b, errors=[]))


def test_sampled_rollouts_end_and_have_no_log_probabilities_of_the_model():
    model, tokenizer = load_policy("tiny-rl", device="cpu")
    rollouts = generate_remote(BatchingEngine(model, tokenizer), tokenizer, mixed(1)[1:4] * 2, DecodeConfig(temperature=1.0, top_p=.95))
    assert {r.finish_reason for r in rollouts} == {"stop"} and all(r.logprobs.isnan().all() for r in rollouts)


def test_at_temperature_one_the_log_probabilities_are_the_models():
    model, tokenizer = load_policy("tiny-rl", device="cpu")
    rollouts = generate_remote(BatchingEngine(model, tokenizer), tokenizer, mixed(1)[1:3], DecodeConfig(temperature=1.0))
    with torch.no_grad(): scored = [tree_logprobs(model, collate([r.tree.pack()])) for r in rollouts]
    assert all(torch.allclose(r.logprobs, s, atol=1e-3) for r, s in zip(rollouts, scored)) and sum(map(len, scored)) > 50


@pytest.mark.parametrize("sampling", [dict(top_p=.9), dict(top_k=5), dict(top_k=1)])
def test_of_another_distribution_than_the_models_nothing_is_known(sampling):
    config = DecodeConfig("autoregressive", temperature=1.0, limits=Limits(max_tokens=3), **sampling)
    r, = generate_remote(BatchingEngine(tiny("Qwen3", char), char), char, ["1+1?"], config)
    assert r.logprobs.isnan().all()


@pytest.mark.parametrize("sampling", [dict(temperature=9.0), dict(temperature=1.0, top_p=.5), dict(temperature=2.0, top_k=4)])
def test_tokens_are_drawn_from_the_distribution_that_was_asked_for(sampling):
    "500 draws of one token against the shares."
    model, n = tiny("Qwen3", char), 500
    config = DecodeConfig("autoregressive", limits=Limits(max_tokens=1), batch=n, **sampling)
    rollouts = generate_remote(BatchingEngine(model, char), char, ["1+1?"] * n, config)
    with torch.no_grad(): shares = filter_logits(model(torch.tensor([rollouts[0].tree.ids[0]])).logits[0, -1:], **sampling).softmax(-1)[0]
    drawn = torch.bincount(torch.tensor([r.tree.ids[1][0] for r in rollouts]), minlength=len(shares)) / n
    assert (drawn - shares).abs().max() < .08 and drawn[shares == 0].sum() == 0
    plain = model(torch.tensor([rollouts[0].tree.ids[0]])).logits[0, -1].softmax(-1)
    assert (plain - shares).abs().max() > .1   # so it matters


def test_other_seeds_are_other_draws():
    config = DecodeConfig("autoregressive", temperature=30.0, limits=Limits(max_tokens=20))
    engine = BatchingEngine(tiny("Qwen3", char), char)
    one, same_again, two = (generate_remote(engine, char, ["1+1?"], config, seeds=[s])[0].text for s in (1, 1, 2))
    assert one == same_again != two


def test_what_requests_begin_with_alike_is_read_once(monkeypatch):
    "The threads of a fork find what stands before it, in whole pages."
    found, real = [], PagedAttentionCache.search_prefix_match
    monkeypatch.setattr(PagedAttentionCache, "search_prefix_match", lambda self, *args: found.append(real(self, *args)) or found[-1])
    model, tokenizer = load_policy("tiny-rl", device="cpu")
    r, = generate_remote(BatchingEngine(model, tokenizer), tokenizer, ["a=7+3x9;b=2+5x12;c=4-1x8;d=6+2x10;e=a+b;f=c-d;ef?"])
    assert r.forks and sum(n >= 16 for n in found) >= 2 and all(n % 16 == 0 for n in found)


def test_a_transformers_that_cannot_is_refused_at_once(monkeypatch):
    model = tiny("Qwen3", char)
    monkeypatch.delattr(configuration_utils, "ContinuousBatchingConfig")
    with pytest.raises(ValueError, match="install transformers>=5.17"): BatchingEngine(model, char)


def test_a_request_that_is_not_taken_or_fails_ends_its_rollout(monkeypatch):
    engine, config = BatchingEngine(tiny("Qwen3", char), char), DecodeConfig("autoregressive", limits=Limits(max_tokens=5))
    real = ContinuousBatchingManager.add_request
    def full(self, ids, *args, **named): return None if len(ids) == 4 else real(self, ids, *args, **named)
    monkeypatch.setattr(ContinuousBatchingManager, "add_request", full)
    one, two = generate_remote(engine, char, ["1+1?", "12+2?"], config)
    assert one.finish_reason == "error" and "takes no more requests" in str(one.errors) and two.finish_reason != "error"
    def failing(self, *args): raise RuntimeError("out of pages")
    monkeypatch.setattr(ContinuousBatchingManager, "_generation_step", failing)
    monkeypatch.setattr("transformers.generation.continuous_batching.continuous_api.logger.error", lambda *args, **named: None)
    one, two = generate_remote(engine, char, ["12+1?", "12+2?"], config)
    assert {one.finish_reason, two.finish_reason} == {"error"} and "out of pages" in str(one.errors)


def test_a_time_that_is_over_cancels_the_request(monkeypatch):
    cancelled, real = [], ContinuousBatchingManager.cancel_request
    monkeypatch.setattr(ContinuousBatchingManager, "cancel_request", lambda self, name: cancelled.append(name) or real(self, name))
    engine = BatchingEngine(tiny("Qwen3", char, max_position_embeddings=100_000), char)
    config = DecodeConfig("autoregressive", limits=Limits(max_tokens=3000))
    monkeypatch.setattr(engine, "stops", ())
    r, = generate_remote(engine, char, ["1+1?"], config, seconds=.5)
    assert r.finish_reason == "cancelled" and len(cancelled) == 1


def test_options():
    found = batching_options(False, .1, 3)["continuous_batching_config"]
    assert (found.use_cuda_graph, found.max_memory_percent, found.return_logprobs, found.seed) == (False, .1, True, 3)
    assert batching_options(True)["continuous_batching_config"].max_memory_percent == .5


def test_the_window_and_the_stops_are_the_models():
    model = tiny("Qwen3", char, max_position_embeddings=30)
    model.generation_config.eos_token_id = [1, 20]
    engine = BatchingEngine(model, char)
    assert engine.window == 30 and engine.stops == (1, 20)
