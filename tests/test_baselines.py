"""Baselines: votes, the search and forced forks against what they say they do; their costs against sums by hand."""
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny

from threadweaver_ref import baselines as room
from threadweaver_ref.baselines import (BASELINES, SAMPLED, FixedFork, RandomFork, Thought, best_of_n, consensus_stop, decompose, dictated, find_way,
                                        fixed_fork, random_fork, samples, self_consistency, tree_of_thoughts)
from threadweaver_ref.decode import DecodeConfig, generate
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.model import load_policy
from threadweaver_ref.rollout import all_forks
from threadweaver_ref.tokenizer import char_tokenizer, control_ids, encode_text

CHAR = char_tokenizer()
MODEL = tiny("Qwen3", CHAR)
SHORT = replace(SAMPLED, limits=Limits(max_tokens=12))
QUESTIONS = ["a=7+3x4;b=2+5x3;c=a+b;c?", "a=1+2;b=3+4;ab?"]


@pytest.fixture(scope="module")
def policy(): return load_policy("tiny-sft", device="cpu")


def told(monkeypatch, *answers):
    "Let the samples of every question be these (answer, tokens, mean log-probability)."
    known, = generate(MODEL, CHAR, QUESTIONS[:1], SHORT)
    def fake(model, tokenizer, questions, config, seeds=None):
        def made(i, a, n, p): return replace(known, answer=a, text=f"{i}", token_latency=n, total_tokens=n, decode_steps=n - 1, seconds=n / 10,
                                             logprobs=known.logprobs * 0 + p)
        return [made(i, a, n, p) for i, (a, n, p) in enumerate(answers * (len(questions) // len(answers)))]
    monkeypatch.setattr(room, "generate", fake)


# ---- votes

def test_samples_are_those_of_plain_decoding_and_differ():
    found = samples(MODEL, CHAR, QUESTIONS, SHORT, 3)
    assert [len(g) for g in found] == [3, 3] and [g[0].question for g in found] == QUESTIONS
    assert len({r.text for r in found[0]}) == 3
    alone = generate(MODEL, CHAR, QUESTIONS[1:] * 3, SHORT)
    assert [r.text for r in alone] == [r.text for r in found[1]]
    with pytest.raises(ValueError, match="n=0"): samples(MODEL, CHAR, QUESTIONS, SHORT, 0)


def test_a_vote_pays_for_all_and_waits_for_the_longest(monkeypatch):
    told(monkeypatch, ("7", 40, -1.0), ("6", 10, -2.0), ("6", 30, -.5), (None, 50, -3.0))
    for r in self_consistency(MODEL, CHAR, QUESTIONS, n=4):
        assert (r.answer, r.text[-1:] in "15", r.token_latency, r.total_tokens, r.decode_steps, r.seconds) == ("6", True, 50, 130, 49, 5.0)
    for r in best_of_n(MODEL, CHAR, QUESTIONS, n=4): assert (r.answer, r.token_latency, r.total_tokens) == ("6", 50, 130) and r.logprobs.mean() == -.5


def test_no_answer_is_no_vote_and_equals_go_to_the_first(monkeypatch):
    told(monkeypatch, (None, 4, -1.0), (None, 5, -1.0), ("8", 6, -1.0), ("9", 7, -1.0))
    assert self_consistency(MODEL, CHAR, QUESTIONS[:1], n=4)[0].answer == "8"
    told(monkeypatch, (None, 4, -1.0), (None, 5, -1.0))
    assert self_consistency(MODEL, CHAR, QUESTIONS[:1], n=2)[0].answer is None


def test_a_consensus_stops_all_samples(monkeypatch):
    told(monkeypatch, ("7", 40, -1.0), ("6", 10, -1.0), (None, 5, -1.0), ("6", 30, -1.0))
    r, = consensus_stop(MODEL, CHAR, QUESTIONS[:1], n=4, agree=2)
    assert (r.answer, r.token_latency, r.total_tokens, r.decode_steps) == ("6", 30, 30 + 10 + 5 + 30, 30)
    r, = consensus_stop(MODEL, CHAR, QUESTIONS[:1], n=4, agree=1)
    assert (r.answer, r.token_latency, r.total_tokens) == ("6", 10, 10 + 10 + 5 + 10)
    r, = consensus_stop(MODEL, CHAR, QUESTIONS[:1], n=4, agree=3)   # never: a vote
    assert (r.answer, r.token_latency, r.total_tokens) == ("6", 40, 85)


@pytest.mark.parametrize("call, says", [
    (lambda: consensus_stop(MODEL, CHAR, QUESTIONS, DecodeConfig(temperature=1.0)), "mode='parallel'"),
    (lambda: consensus_stop(MODEL, CHAR, QUESTIONS, n=2, agree=3), "agree=3: must be from 1 to n=2"),
    (lambda: tree_of_thoughts(MODEL, CHAR, QUESTIONS, DecodeConfig()), "mode='parallel'"),
    (lambda: tree_of_thoughts(MODEL, CHAR, QUESTIONS, depth=0), "must be at least 1"),
    (lambda: fixed_fork(MODEL, CHAR, QUESTIONS, k=1), "k=1"),
    (lambda: random_fork(MODEL, CHAR, QUESTIONS, p=2), "p=2"),
    (lambda: fixed_fork(MODEL, CHAR, QUESTIONS, SAMPLED), "mode='sequential': nothing forks in it"),
    (lambda: random_fork(MODEL, CHAR, QUESTIONS, SAMPLED), "mode='sequential': nothing forks in it"),
])
def test_refused_in_one_line(call, says):
    with pytest.raises(ValueError, match=says): call()


# ---- the search

def test_a_greedy_search_without_choice_is_plain_decoding(policy):
    greedy = DecodeConfig("sequential")
    plain, searched = generate(*policy, QUESTIONS, greedy), tree_of_thoughts(*policy, QUESTIONS, greedy, width=1, keep=1, depth=3, length=20)
    for field in ("question", "text", "answer", "token_latency", "total_tokens"):
        assert [getattr(r, field) for r in plain] == [getattr(r, field) for r in searched]


def test_the_likeliest_line_stays_and_all_is_paid_for(monkeypatch):
    seen = []
    def spy(model, tokenizer, prompts, config):
        seen.append(generate(model, tokenizer, prompts, config))
        return seen[-1]
    monkeypatch.setattr(room, "generate", spy)
    short = replace(SHORT, limits=Limits(max_tokens=9))
    found, = tree_of_thoughts(MODEL, CHAR, QUESTIONS[:1], short, width=3, keep=2, depth=2, length=4)
    first, second, last = seen
    assert (len(first), len(second), len(last)) == (3, 6, 1)
    likeliest = sorted(first, key=lambda r: -r.logprobs.mean())[:2]
    assert len({r.question for r in second}) == 2 and all(r.tree.ids[0][-4:] in [k.tree.ids[1] for k in likeliest] for r in second)
    whole = {}
    for r in second:
        before = next(k for k in first if k.tree.ids[1] == r.tree.ids[0][-4:])
        whole[before.text + r.text] = float(before.logprobs.sum() + r.logprobs.sum()) / 8
    assert found.text == max(whole, key=whole.get) + last[0].text
    assert found.token_latency == 4 + 4 + last[0].token_latency and found.total_tokens == 3 * 4 + 6 * 4 + last[0].total_tokens
    assert found.seconds == sum(max(r.seconds for r in stage) for stage in seen)


def test_a_line_is_judged_by_its_mean_log_probability():
    assert Thought([], logprob=-4.0, tokens=8).value == -.5 and Thought([]).value == 0


# ---- forks that the model does not choose

def test_an_outline_of_a_fixed_fork_ends():
    "Of a model that would never close one."
    hook = FixedFork(CHAR, 2, longest=7)
    def endless(branch, ids, logits): return hook(branch, ids, logits.index_fill(0, torch.tensor(control_ids(CHAR)["</Outline>"]), -100.0))
    for r in generate(MODEL, CHAR, QUESTIONS, DecodeConfig(hook=endless, limits=Limits(max_tokens=400, max_thread_tokens=6))):
        fork, = all_forks(r.trajectory)
        assert [len(encode_text(CHAR, o)) for o in fork.outlines] == [7, 7]


@pytest.mark.parametrize("k", [2, 3, 5])
def test_a_fixed_fork_has_k_threads_whatever_the_model_is(k, policy):
    for model, config in ((policy[0], DecodeConfig()), (MODEL, DecodeConfig(temperature=1.0, limits=Limits(max_tokens=4000, max_thread_tokens=6)))):
        for r in fixed_fork(model, CHAR, QUESTIONS, config, k=k):
            fork, = all_forks(r.trajectory)
            assert r.trajectory[0] is fork and len(fork.outlines) == len(fork.threads) == k
            assert not any(tag in o for o in fork.outlines for tag in "<>") or model is MODEL


def test_a_fixed_fork_is_not_tried_again_where_it_is_refused(policy):
    r, = fixed_fork(*policy, QUESTIONS[:1], DecodeConfig(limits=Limits(max_threads=2)), k=3)
    assert r.forks == 0 and [e.rule for e in r.errors] == ["max_threads"] and r.finish_reason == "stop"


def test_random_forks_begin_where_steps_do_and_are_no_neighbours_business(policy):
    none, = random_fork(*policy, QUESTIONS[:1], p=0)
    plain, = generate(*policy, QUESTIONS[:1], DecodeConfig("sequential"))
    assert none.forks == 0 and none.text == plain.text
    always, = random_fork(*policy, QUESTIONS[:1], p=1)
    assert always.text.startswith("<Parallel>") and "</Parallel><Parallel>" in always.text
    half = random_fork(*policy, QUESTIONS, p=.5)
    assert [r.text for r in half] == [random_fork(*policy, [q], p=.5)[0].text for q in QUESTIONS]
    seeds = {random_fork(*policy, QUESTIONS[:1], DecodeConfig(seed=s), p=.5)[0].text for s in range(6)}
    assert len(seeds) > 1 and any(t.startswith("<Parallel>") and "</Parallel><Parallel>" not in t for t in seeds)   # a new coin behind a join
    assert not any("<Parallel>" in t.split("</Outlines>")[1].split("</Parallel>")[0] for t in seeds if "</Outlines>" in t)   # threads do not fork


def test_hooks_can_be_named_in_a_config():
    assert DecodeConfig(hook=FixedFork(CHAR, 2)) == DecodeConfig(hook=FixedFork(CHAR, 2)) != DecodeConfig(hook=RandomFork(CHAR))


def test_what_is_dictated_is_the_right_answer_whatever_the_model(policy):
    for model, tokenizer in (policy, (MODEL, CHAR)):
        found = dictated(model, tokenizer, QUESTIONS)
        assert [r.answer for r in found] == ["6", "a3b7"] and {r.finish_reason for r in found} == {"stop"} and not any(r.forks for r in found)
    own = generate(*policy, QUESTIONS[:1], DecodeConfig("sequential"))[0]
    assert own.text == dictated(*policy, QUESTIONS[:1])[0].text and own.token_latency == found[0].token_latency == len(CHAR(own.text).input_ids) + 1
    with pytest.raises(ValueError, match="no forks"): dictated(*policy, QUESTIONS, DecodeConfig())
    with pytest.raises(ValueError, match="does not end in"): dictated(*policy, ["What is two?"])


# ---- by name

@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_has_a_name(policy, name):
    config, answer = find_way(name, "kv", 3)
    assert (config.join, config.batch) == ("kv", 3) and (config.temperature > 0) == (config.mode == "sequential" and name != "dictated")
    found = answer(*policy, QUESTIONS[:1], replace(config, limits=Limits(max_tokens=40)))
    assert [r.question for r in found] == QUESTIONS[:1]
    if name[-1].isdigit() and "fork" not in name: assert found[0].total_tokens > 2 * found[0].token_latency > 0


def test_modes_have_theirs_and_nothing_else_has():
    assert find_way("sequential", batch=2) == (DecodeConfig("sequential", batch=2), None)
    with pytest.raises(ValueError, match="unknown mode 'best-of-9': choose one of .*parallel.*best-of-4"): find_way("best-of-9")


# ---- where the speed comes from

def test_the_three_factors_multiply_up():
    rng = random.Random(0)
    def report(): return SimpleNamespace(rows=[{"question": q, "seconds": rng.random() + .1, "total_tokens": rng.randint(50, 300),
                                                "token_latency": rng.randint(20, 50)} for q in range(9)])
    for _ in range(50):
        found = decompose(report(), report())
        assert found["shorter"] * found["parallel"] * found["machine"] == pytest.approx(found["speedup"], rel=1e-12)
    measured = (8.0, 100, 100), (4.0, 120, 40)
    one, other = (SimpleNamespace(rows=[{"question": 0, "seconds": s, "total_tokens": n, "token_latency": l}]) for s, n, l in measured)
    assert decompose(one, other) == pytest.approx({"speedup": 2.0, "shorter": 100 / 120, "parallel": 3.0, "machine": (40 / 4) / (100 / 8)})
    with pytest.raises(ValueError, match="different problems"): decompose(one, SimpleNamespace(rows=[]))
