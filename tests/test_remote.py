"""Fork and join through an engine: against the local decoder, in any order of the answers, and with answers that cannot be right."""
import asyncio
import dataclasses
import random
import threading
import time
import warnings
from contextlib import asynccontextmanager

import pytest
import torch
from helpers import TOKENIZERS, bpe_tokenizer, random_text, tiny
from test_decode import Script, block, deep_plan, random_plan, same_logprobs

from threadweaver_ref.decode import DecodeConfig, generate
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.model import load_policy
from threadweaver_ref.remote import Completion, EngineError, RemoteRow, Request, blocking, check_completion, generate_remote
from threadweaver_ref.tokenizer import control_ids, encode_prompt, encode_text

char = TOKENIZERS["char"]()
LIMITS = Limits(max_tokens=400, max_thread_tokens=60)


class Scripted:
    "An engine that reads everything anew for every token, writes what a script says, and answers in any order."
    window = None

    def __init__(self, model, script=None, rng=None, bad=None):
        self.model, self.script, self.rng, self.bad = model, script, rng or random.Random(0), bad or (lambda request: None)
        self.branches, self.asked, self.now, self.most, self.cancelled = {}, [], 0, 0, 0

    @asynccontextmanager
    async def session(self, config):
        opened = RemoteRow.open
        def spy(row, branch, *rest):
            self.branches[row.index, branch.path] = branch
            return opened(row, branch, *rest)
        RemoteRow.open = spy
        try: yield self.complete
        finally: del RemoteRow.open

    async def complete(self, request):
        self.asked.append(request)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            for _ in range(self.rng.randint(0, 20)): await asyncio.sleep(0)
            if fault := self.bad(request): return fault if isinstance(fault, Completion) else await fault
            return self.write(request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally: self.now -= 1

    @torch.no_grad()
    def write(self, request):
        branch, ids, logprobs = self.branches[request.rollout, request.path], [], []
        while len(ids) < request.budget and not (ids and ids[-1] in request.stop_ids):
            own = self.model(input_ids=torch.tensor([request.context_ids + ids]), use_cache=False).logits[0, -1]
            logits = self.script(branch, ids, own) if self.script else own.clone()
            logits[list(request.banned_ids)] = -torch.inf
            ids.append(int(logits.argmax()))
            logprobs.append(float(own.log_softmax(-1)[ids[-1]]))
        return Completion(ids, logprobs, "stop" if ids[-1] in request.stop_ids else "length")


def asked(rng, n): return [random_text(rng, 6) + "?" for _ in range(n)]
def steps(r): return sorted((i.branch, i.start, i.end, i.ids) for i in r.timeline)
def forced(r): return sum(i.forced for i in r.timeline)


FIELDS = ("text", "answer", "finish_reason", "token_latency", "total_tokens", "decode_steps", "peak_context", "end", "trajectory")


def same(a, b):
    "Is a rollout through an engine the local one?"
    assert {f: getattr(a, f) for f in FIELDS} == {f: getattr(b, f) for f in FIELDS}
    assert a.tree == b.tree and sorted(map(str, a.errors)) == sorted(map(str, b.errors))
    assert torch.allclose(a.logprobs, b.logprobs, atol=1e-4) and steps(a) == steps(b) and forced(a) == forced(b)
    return True


def both(model, tokenizer, questions, config, plan, **options):
    "Rollouts through an engine and of the local decoder, with the same script."
    config = dataclasses.replace(config, batch=len(questions))
    local = generate(model, tokenizer, questions, dataclasses.replace(config, hook=Script(tokenizer, plan)))
    engine = Scripted(model, Script(tokenizer, plan), **options)
    return generate_remote(engine, tokenizer, questions, config), local, engine


@pytest.mark.parametrize("join", ["concat", "result"])
@pytest.mark.parametrize("arch, tokenizer", [("Qwen3", "char"), ("Llama", "bpe")])
def test_an_engine_gives_the_local_rollout(arch, tokenizer, join):
    tokenizer = TOKENIZERS[tokenizer]()
    model, questions = tiny(arch, tokenizer), asked(random.Random(join), 8)
    remote, local, engine = both(model, tokenizer, questions, DecodeConfig(join=join, limits=LIMITS), random_plan, rng=random.Random(1))
    assert all(map(same, remote, local)) and sum(r.forks for r in local) > 4 and any(r.errors for r in local)
    assert engine.most > 8 and all(r.peak_slots == 0 and r.load == [] for r in remote)
    same_logprobs(model, remote)


def test_forks_three_deep():
    remote, local, _ = both(tiny("Qwen3", char), char, ["1+1?", "2+2?"], DecodeConfig(limits=Limits(max_tokens=2000)), deep_plan)
    assert all(map(same, remote, local)) and local[0].forks == 7


@pytest.mark.parametrize("limits", [Limits(max_tokens=30), Limits(max_thread_tokens=12, max_tokens=200),
                                    Limits(max_depth=1, max_forks=1, max_tokens=300)])
def test_limits_are_the_same(limits):
    remote, local, engine = both(tiny("Qwen3", char), char, asked(random.Random(3), 8), DecodeConfig(limits=limits), random_plan)
    assert all(map(same, remote, local)) and any(r.errors or r.finish_reason == "length" for r in local)


@pytest.mark.parametrize("where", ["config", "engine"])
@pytest.mark.parametrize("window", [12, 25, 40])
def test_no_token_stands_behind_the_window(window, where):
    model, questions = tiny("Qwen3", char), asked(random.Random(window), 10)
    config = DecodeConfig(window=window, limits=LIMITS, batch=10)
    local = generate(model, char, questions, dataclasses.replace(config, hook=Script(char, random_plan)))
    engine = Scripted(model, Script(char, random_plan))
    if where == "engine": engine.window, config = window, dataclasses.replace(config, window=None)
    assert all(map(same, generate_remote(engine, char, questions, config), local))
    assert all(len(r.context_ids) + r.budget <= window for r in engine.asked)


@pytest.mark.parametrize("deadline", [1, 2, 5, 17, 30])
@pytest.mark.parametrize("plan", [random_plan, deep_plan])
def test_deadlines_are_the_same(deadline, plan):
    config = DecodeConfig(deadline=deadline, limits=LIMITS)
    remote, local, _ = both(tiny("Qwen3", char), char, asked(random.Random(deadline), 8), config, plan)
    assert all(map(same, remote, local)) and any("deadline" in str(r.errors) for r in local) == (deadline < 30 or plan is random_plan)


@pytest.mark.parametrize("mode", ["sequential", "autoregressive"])
def test_on_one_line(mode):
    model, questions, config = tiny("Qwen3", char), asked(random.Random(mode), 4), DecodeConfig(mode, limits=Limits(max_tokens=30), batch=4)
    assert all(map(same, generate_remote(Scripted(model), char, questions, config), generate(model, char, questions, config)))


def test_the_order_of_the_answers_changes_nothing():
    model, questions = tiny("Qwen3", char), asked(random.Random(5), 6)
    first, *others = [generate_remote(Scripted(model, Script(char, random_plan), random.Random(i)), char, questions, DecodeConfig(limits=LIMITS))
                      for i in range(4)]
    for other in others:
        assert all(map(same, other, first))
        for a, b in zip(other, first): assert a.timeline == b.timeline and list(map(str, a.errors)) == list(map(str, b.errors))


def test_errors_stand_in_the_order_of_their_steps():
    "Thread 2's inner fork is refused at once, thread 1 ends late in an end of sequence, though its answer is the first to come."
    def plan(branch, tokenizer):
        if not branch.path: return [None, tokenizer.eos_token_id] if branch.forks else encode_text(tokenizer, block("1:p", "2:q"))
        if branch.name == "1": return [None] * 40 + [tokenizer.eos_token_id]
        return [None] * 5 + encode_text(tokenizer, "</Thread>") if branch.tail else encode_text(tokenizer, block("1:p"))
    model = tiny("Qwen3", char)
    class Late(Scripted):
        async def complete(self, request):
            if request.path == ((1, 2),): await asyncio.sleep(.3)
            return self.write(request)
    r, = generate_remote(Late(model, Script(char, plan)), char, ["1+1?"])
    assert [str(e) for e in r.errors][1:] == ["end of sequence in thread 1"] and len(r.errors) == 2
    local, = generate(model, char, ["1+1?"], DecodeConfig(hook=Script(char, plan)))
    assert [str(e) for e in local.errors] == [str(e) for e in r.errors]


# ---- faults

def test_a_failed_request_ends_its_own_rollout():
    model, questions = tiny("Qwen3", char), asked(random.Random(7), 8)
    config = DecodeConfig(limits=LIMITS, batch=8)
    local = generate(model, char, questions, dataclasses.replace(config, hook=Script(char, random_plan)))
    fork = next(i for i, r in enumerate(local) if r.forks)
    async def gone(): raise EngineError("the server is gone")
    async def bug(): raise KeyError("choices")
    for fault, said in [(gone, "the server is gone"), (bug, "choices")]:
        engine = Scripted(model, Script(char, random_plan), bad=lambda r, fault=fault: fault() if r.rollout == fork and r.path else None)
        remote = generate_remote(engine, char, questions, config)
        assert remote[fork].finish_reason == "error" and said in str(remote[fork].errors[-1])
        assert remote[fork].text and len(remote[fork].logprobs) == sum(len(i) for i, s in zip(remote[fork].tree.ids, remote[fork].tree.sampled) if s)
        assert all(same(a, b) for i, (a, b) in enumerate(zip(remote, local)) if i != fork)


def test_the_other_requests_of_a_failed_rollout_are_cancelled():
    async def forever(): await asyncio.sleep(1000)
    async def gone(): raise EngineError("gone")
    def bad(request): return None if not request.path else gone() if request.path == ((1, 1),) else forever()
    engine = Scripted(tiny("Qwen3", char), Script(char, deep_plan), bad=bad)
    r, = generate_remote(engine, char, ["1+1?"])
    assert r.finish_reason == "error" and engine.cancelled == 1 and engine.now == 0


def test_a_cancel_that_is_swallowed_comes_again():
    "As `asyncio.wait_for` does in Python 3.10 and 3.11, where an answer comes in the same moment; and the client then waits for another attempt."
    async def deaf():
        try: await asyncio.sleep(1000)
        except asyncio.CancelledError: await asyncio.sleep(1000)
    engine = Scripted(tiny("Qwen3", char), Script(char, deep_plan), bad=lambda r: deaf() if r.path else None)
    began = time.perf_counter()
    r, = generate_remote(engine, char, ["1+1?"], seconds=.3)
    assert r.finish_reason == "cancelled" and engine.now == 0 and time.perf_counter() - began < 5


def test_time_is_over():
    async def forever(): await asyncio.sleep(1000)
    model = tiny("Qwen3", char)
    engine = Scripted(model, Script(char, deep_plan), bad=lambda r: forever() if r.rollout == 1 and r.path else None)
    rollouts = generate_remote(engine, char, ["1+1?", "2+2?"], seconds=5)
    assert [r.finish_reason for r in rollouts] == ["stop", "cancelled"] and "not finished within 5 s" in str(rollouts[1].errors)
    assert engine.cancelled == 2 and rollouts[1].text.endswith("</Parallel>")


REQUEST = Request([1, 2], (7, 8), budget=3, banned_ids=(5,))


@pytest.mark.parametrize("ids, logprobs, reason, said", [
    ([], [], "stop", "no token ids"), (None, None, "stop", "no token ids"),
    ([1, None], None, "length", "no numbers"), ([-1, 7], None, "stop", "no numbers"),
    ([1, 2, 3, 7], None, "stop", "4 tokens, 3 were allowed"), ([5, 7], None, "stop", "token 5, which was banned"),
    ([7, 1], None, "length", "after a stop token"), ([8, 7], None, "stop", "after a stop token"),
    ([1, 2], None, "stop", "last token, 2, is no stop"), ([1, 2], None, "length", "cut off after 2 of 3"),
    ([1, 7], None, "abort", "ended with 'abort'"), ([1, 7], [-1.], "stop", "1 log-probabilities for 2"),
    ([1, 7], [-1., None], "stop", "that are none"), ([1, 7], [-1., float("nan")], "stop", "that are none"),
    ([1, 7], [.5, -1.], "stop", "that are none")])
def test_answers_that_cannot_be_right(ids, logprobs, reason, said):
    with pytest.raises(EngineError, match=said) as refused: check_completion(REQUEST, Completion(ids, logprobs, reason))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("completion", [Completion([1, 7], [-1., 0.], "stop"), Completion([1, 2, 3], None, "length"),
                                        Completion([1, 2, 8], [-1, -2, 1e-6], "length"), Completion([7], None, "stop")])
def test_answers_that_can_be_right(completion): assert check_completion(REQUEST, completion) is completion


def test_a_wrong_answer_ends_the_rollout_whatever_the_engine_checks():
    stripped = Completion([20, 21], [-1., -1.], "stop")
    r, = generate_remote(Scripted(tiny("Qwen3", char), bad=lambda r: stripped), char, ["1+1?"])
    assert r.finish_reason == "error" and "no stop token of ours: has the model further `stops`?" in str(r.errors[0]) and r.text == ""


def test_unknown_log_probabilities_are_not_numbers():
    end = Completion([char.eos_token_id], None, "stop")
    r, = generate_remote(Scripted(tiny("Qwen3", char), bad=lambda r: end), char, ["1+1?"])
    assert r.finish_reason == "stop" and r.logprobs.isnan().tolist() == [True]


# ---- how many at a time, and what is asked

@pytest.mark.parametrize("batch, lanes, most", [(1, None, 9), (3, None, 27), (8, 2, 2), (3, 1, 1)])
def test_how_many_are_under_way(batch, lanes, most):
    engine = Scripted(tiny("Qwen3", char), Script(char, deep_plan))
    config = DecodeConfig(batch=batch, max_lanes=lanes, limits=Limits(max_tokens=2000))
    rollouts = generate_remote(engine, char, ["1+1?", "2+2?", "3+3?"], config)
    assert (engine.most == most if lanes else most / 3 < engine.most <= most) and all(r.forks == 7 for r in rollouts)
    if batch == 1: assert [r.rollout for r in engine.asked] == sorted(r.rollout for r in engine.asked)


def test_every_request_has_a_seed_of_its_own_and_they_come_again():
    def seeds(seed): return [
        {(r.rollout, r.path, len(r.context_ids)): r.seed for r in e.asked}
        for e in [Scripted(tiny("Qwen3", char), Script(char, deep_plan))] if generate_remote(e, char, ["1?", "1?"], DecodeConfig(seed=seed))][0]
    one = seeds(0)
    assert one == seeds(0) and len({*one.values()}) == len(one) and not {*one.values()} & {*seeds(1).values()} and max(one.values()) < 2 ** 62


def test_counts():
    stats, engine = {}, Scripted(tiny("Qwen3", char), Script(char, deep_plan))
    generate_remote(engine, char, ["1+1?", "2+2?"], stats=stats)
    assert stats["requests"] == len(engine.asked) and stats["prompt_tokens"] == sum(len(r.context_ids) for r in engine.asked)
    assert 0 < stats["client_seconds"] and 0 < stats["seconds"] < 100


def test_stops_of_the_engine_end_a_text_too():
    extra = encode_text(char, "!")[0]
    engine = Scripted(tiny("Qwen3", char), bad=lambda r: Completion([extra], [-1.], "stop"))
    engine.stops = (extra,)
    r, = generate_remote(engine, char, ["1+1?"])
    assert r.finish_reason == "stop" and r.end == extra and extra in engine.asked[0].stop_ids and char.eos_token_id in engine.asked[0].stop_ids


@pytest.mark.parametrize("options, said", [(dict(join="kv"), "choose concat or result"), (dict(hook=lambda *a: None), "hook needs"),
                                           (dict(fork_below=3), "fork_below needs")])
def test_what_needs_a_decoder_of_our_own(options, said):
    with pytest.raises(ValueError, match=said): generate_remote(Scripted(None), char, ["1+1?"], DecodeConfig(**options))


@pytest.mark.parametrize("bad, said", [("", "question 1 is empty"), (3, "question 1: a question is a text"), ("\ud800", "question 1: half")])
def test_a_bad_question_is_named_before_anything_is_asked(bad, said):
    engine = Scripted(None)
    with pytest.raises(ValueError, match=said): generate_remote(engine, char, ["1+1?", bad])
    with pytest.raises(ValueError, match="not one string"): generate_remote(engine, char, "1+1?")
    with pytest.raises(ValueError, match="2 seeds for 1"): generate_remote(engine, char, ["1+1?"], seeds=[1, 2])
    assert not engine.asked and generate_remote(engine, char, []) == []


def test_within_an_event_loop_too():
    async def inner(): return threading.current_thread().name
    async def outer(): return blocking(inner())
    assert blocking(inner()) == "MainThread" != asyncio.run(outer())
    async def fails(): raise ValueError("x")
    with pytest.raises(ValueError): blocking(fails())


def test_an_interrupt_within_an_event_loop_ends_the_requests(monkeypatch):
    "As in a notebook: the cell is interrupted while its thread waits for an answer."
    from concurrent import futures
    ended, waiting = [], threading.Event()
    async def forever():
        waiting.set()
        try: await asyncio.sleep(20)
        finally: ended.append(True)
    def interrupted(self, timeout=None):
        if self.done(): return real(self, timeout)
        waiting.wait(10)
        monkeypatch.undo()
        raise KeyboardInterrupt
    async def cell(): blocking(forever())
    real, began = futures.Future.result, time.perf_counter()
    monkeypatch.setattr(futures.Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt): asyncio.run(cell())
    assert ended == [True] and time.perf_counter() - began < 5


def test_a_question_outside_what_the_model_knows_is_said():
    model, tokenizer = load_policy("tiny-sft", device="cpu")
    engine, config = Scripted(model), DecodeConfig("sequential", limits=Limits(max_tokens=5))
    questions = ["a=7+3x4;b=2+5x3;c=a+b;c?", "Who are you?", "What is love?"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        silent = generate_remote(engine, tokenizer, questions, config)
    assert not said and not any(r.warnings for r in silent)   # this engine does not know the model's config
    engine.config = model.config
    with pytest.warns(UserWarning, match="this policy was trained on") as said: found = generate_remote(engine, tokenizer, questions, config)
    with pytest.warns(UserWarning): local = generate(model, tokenizer, questions, config)
    assert len(said) == 1 and [r.warnings for r in found] == [r.warnings for r in local] and [bool(r.warnings) for r in found] == [False, True, True]


def test_sequential_bans_control_tokens():
    engine = Scripted(tiny("Qwen3", char))
    generate_remote(engine, char, ["1+1?"], DecodeConfig("sequential", limits=Limits(max_tokens=5)))
    assert set(engine.asked[0].banned_ids) == {*control_ids(char).values()} and engine.asked[0].context_ids == encode_prompt(char, "1+1?")
    assert bpe_tokenizer() is TOKENIZERS["bpe"]()
