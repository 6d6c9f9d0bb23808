"""Batched branch decoding: against a plain loop without cache, against the text, among neighbours, and under nonsense."""
import copy
import dataclasses
import functools
import inspect
import random
from collections import Counter

import pytest
import torch
from helpers import ARCHITECTURES, TOKENIZERS, chat_tokenizer, random_text, tiny
from test_sampling import SAMPLING

from threadweaver_ref import decode, reader, rows
from threadweaver_ref.cache import FlatCache
from threadweaver_ref.decode import DecodeConfig, generate
from threadweaver_ref.draw import show_timeline
from threadweaver_ref.forkjoin import ForkJoin, Limits, ThreadError
from threadweaver_ref.replay import replay
from threadweaver_ref.joins import JOINS
from threadweaver_ref.model import add_lora
from threadweaver_ref.format import CONTROL_TOKENS, Fork
from threadweaver_ref.tokenizer import control_ids, encode_prompt, encode_text
from threadweaver_ref.scoring import check_model, collate, tree_logits, tree_logprobs

char = TOKENIZERS["char"]()
ROOMY = Limits(max_tokens=3000, max_thread_tokens=300)


def block(*lines): return "<Parallel><Outlines>" + "".join(f"<Outline>{l}</Outline>" for l in lines) + "</Outlines>"


# ---- structure from a script, since random weights do not fork

def reserved(tokenizer): return sorted({*control_ids(tokenizer).values(), *tokenizer.all_special_ids})


class Script:
    """A hook: `plan(branch)` says token by token what a branch writes until it next stops; where it says None, or has
    ended, the model is free, but for control and special tokens. Plans depend on the branch alone."""
    def __init__(self, tokenizer, plan):
        self.reserved, self.plans = reserved(tokenizer), {}
        self.make = lambda branch: plan(branch, tokenizer)

    def forced(self, branch, ids):
        key = (tuple(branch.machine.tree.ids[0]), branch.path, branch.forks, len(branch.tail))
        if key not in self.plans: self.plans[key] = self.make(branch)
        return self.plans[key][len(ids)] if len(ids) < len(self.plans[key]) else None

    def __call__(self, branch, ids, logits):
        token, out = self.forced(branch, ids), logits.clone()
        if token is None: out[self.reserved] = -torch.inf
        else:
            out[:] = -torch.inf
            out[token] = 0
        return out


def random_block(rng, depth):
    if rng.random() < .1: return rng.choice([block("1:p"), block("1:p", "3:q"), block("2:p", "1:q"), "</Outlines>"])   # no fork
    n = rng.choice([2, 2, 2, 3])
    return block(*(f"{i}:{random_text(rng, 2)}" for i in range(1, n + 1)))


def random_plan(branch, tokenizer, deepest=3):
    "Some free tokens, then a fork, or an end of one of several kinds."
    rng = random.Random(repr((branch.machine.tree.ids[0], branch.path, branch.forks, len(branch.tail))))
    free, depth, eos = [None] * rng.randint(0, 3), branch.depth, [tokenizer.eos_token_id]
    if depth < deepest and branch.forks < 2 and rng.random() < (.75, .4, .4)[depth] - .3 * branch.forks:
        return free + encode_text(tokenizer, random_block(rng, depth))
    if not depth: return free + eos
    ends = ["</Thread>"] * 6 + ["<Conclusion>7</Conclusion></Thread>", None, "endless"]
    end = rng.choice(ends)
    if end == "endless": return []
    return free + (encode_text(tokenizer, end) if end else eos)


def deep_plan(branch, tokenizer):
    "Two threads down to depth 3, whatever the question."
    if branch.depth < 3 and not branch.forks: return [None] * 2 + encode_text(tokenizer, block("1:p", "2:q"))
    return [None] * 2 + (encode_text(tokenizer, "</Thread>") if branch.path else [tokenizer.eos_token_id])


def clean_plan(branch, tokenizer):
    "As `random_plan`, but everything is well-formed and ends by itself."
    rng = random.Random(repr(("clean", branch.machine.tree.ids[0], branch.path, branch.forks)))
    free = [None] * rng.randint(1, 4)
    if branch.depth < 2 and branch.forks < 2 and rng.random() < .6:
        return free + encode_text(tokenizer, block(*(f"{i}:x" for i in range(1, rng.randint(2, 4) + 1))))
    return free + (encode_text(tokenizer, "</Thread>") if branch.path else [tokenizer.eos_token_id])


def last_logits(model, tree, span, ids):
    "What a branch predicts next where no plain causal run can say: the whole tree, read anew under its mask."
    tree = copy.deepcopy(tree)
    last = tree.add(ids, [span]) if ids else span
    packed = tree.pack()
    return tree_logits(model, collate([packed]))[0, (packed.span_ids == last).nonzero()[-1, 0]]


@torch.no_grad()
def plain_loop(model, tokenizer, question, config):
    "One branch after another, one token after another, everything read anew; no cache, no mask."
    machine = ForkJoin(encode_prompt(tokenizer, question), tokenizer, config.join, config.limits, config.mode)
    while not machine.done:
        branch, ids = machine.ready[0], []
        context, tree = branch.context_ids, machine.tree
        room = min(branch.budget, (config.window or 10 ** 9) - tree.end(branch.span))
        while len(ids) < room and not (ids and ids[-1] in branch.stop_ids):
            token = config.hook.forced(branch, ids) if config.hook else None
            if token is None:
                if config.join == "kv": logits = last_logits(model, tree, branch.span, ids)
                else: logits = model(input_ids=torch.tensor([context + ids]), attention_mask=None, use_cache=False).logits[0, -1]
                if config.hook: logits = config.hook(branch, ids, logits)
                logits[list(branch.banned_ids)] = -torch.inf
                token = int(logits.argmax())
            ids.append(token)
        machine.feed(branch, ids, "stop" if ids and ids[-1] in branch.stop_ids else "length")
    return machine


def same_logprobs(model, rollouts, size=8):
    "Are the recorded log-probabilities those of the packed trees?"
    for i in range(0, len(rollouts), size):
        group = rollouts[i:i + size]
        with torch.no_grad(): scored = tree_logprobs(model, collate([r.tree.pack() for r in group]))
        assert torch.allclose(torch.cat([r.logprobs for r in group]), scored, atol=1e-4)


def replayed(rollout, tokenizer, config, stops=None):
    prompt = encode_prompt(tokenizer, rollout.question)
    return replay(rollout.trajectory, prompt, tokenizer, config.join, config.mode, rollout.finish_reason, stops=stops, end=rollout.end)


def same(a, b):
    return (a.tree == b.tree and a.text == b.text and a.finish_reason == b.finish_reason and a.token_latency == b.token_latency
            and a.total_tokens == b.total_tokens and torch.allclose(a.logprobs, b.logprobs, atol=1e-4))


def depth(nodes): return max((1 + max(depth(t.body) for t in n.threads) for n in nodes if isinstance(n, Fork)), default=0)
def questions(rng, n): return [random_text(rng, 6) + "?" for _ in range(n)]


# ---- decoded = re-run (invariant 2), tree = replay (invariant 3)

@pytest.fixture(scope="module", params=[(a, t) for a in ARCHITECTURES for t in TOKENIZERS], ids=lambda p: "-".join(p))
def setting(request):
    arch, name = request.param
    tokenizer = TOKENIZERS[name]()
    return tiny(arch, tokenizer), tokenizer, "-".join(request.param)


@pytest.fixture(params=[False, True], ids=["line", "rectangle"])
def padded(request, monkeypatch):
    "Models that can read without padding do so; or they may not."
    if request.param: monkeypatch.setattr(reader, "reads_by_rows", lambda model: False)
    return request.param


def check_against_plain_loop(model, tokenizer, asked, config):
    rollouts = generate(model, tokenizer, asked, config)
    for question, rollout in zip(asked, rollouts, strict=True):
        machine = plain_loop(model, tokenizer, question, config)
        assert rollout.question == question and rollout.text == machine.text and rollout.tree == machine.tree
        assert rollout.finish_reason == machine.finish_reason and rollout.trajectory == machine.trajectory
        assert Counter(map(str, rollout.errors)) == Counter(map(str, machine.errors))
        assert rollout.tree == replayed(rollout, tokenizer, config)
    same_logprobs(model, rollouts)
    return rollouts


def test_decoded_is_rerun(setting, padded):
    model, tokenizer, name = setting
    limits = Limits(max_tokens=400, max_thread_tokens=60)
    config = DecodeConfig(hook=Script(tokenizer, random_plan), batch=5, limits=limits)
    rollouts = check_against_plain_loop(model, tokenizer, questions(random.Random(name), 22), config)
    depths = Counter(depth(r.trajectory) for r in rollouts)
    assert sum(n for d, n in depths.items() if d) >= 10 and any(d >= 2 for d in depths) and any(r.errors for r in rollouts)


def test_decoded_is_rerun_at_depth_three(setting):
    model, tokenizer, name = setting
    config = DecodeConfig(hook=Script(tokenizer, deep_plan), batch=2, limits=ROOMY)
    for r in check_against_plain_loop(model, tokenizer, questions(random.Random(name), 3), config):
        assert depth(r.trajectory) == 3 and r.forks == 7 and not r.errors and r.well_formed


@pytest.mark.parametrize("join", [j for j in JOINS if j != "concat"])
def test_decoded_is_rerun_whatever_the_join(setting, join):
    model, tokenizer, name = setting
    config = DecodeConfig(join=join, hook=Script(tokenizer, random_plan), batch=3, limits=Limits(max_tokens=300, max_thread_tokens=60))
    rollouts = check_against_plain_loop(model, tokenizer, questions(random.Random(name), 7), config)
    assert any(r.forks for r in rollouts)
    config = DecodeConfig(join=join, hook=Script(tokenizer, deep_plan), batch=2, limits=ROOMY)
    for r in check_against_plain_loop(model, tokenizer, questions(random.Random(name), 2), config):
        assert depth(r.trajectory) == 3 and not r.errors


def test_slots_that_nobody_sees_are_used_again():
    "Five forks, one after another. `kv` keeps all it wrote; `result` keeps the outlines only; both give what a plain loop gives."
    model, rounds = tiny("Qwen3", char), 5
    def plan(branch, tokenizer):
        if not branch.path and branch.forks < rounds: return [None] + encode_text(tokenizer, block("1:p", "2:q", "3:r"))
        return [None] * 30 + (encode_text(tokenizer, "<Conclusion>7</Conclusion></Thread>") if branch.path else [tokenizer.eos_token_id])
    rollouts = {}
    for join in JOINS:
        config = DecodeConfig(join=join, hook=Script(char, plan), limits=ROOMY)
        rollouts[join], = check_against_plain_loop(model, char, ["1+1?"], config)
    written = {j: sum(map(len, r.tree.ids)) for j, r in rollouts.items()}
    assert written["kv"] - 1 <= rollouts["kv"].peak_slots <= written["kv"]   # the last token is never read
    assert rollouts["result"].peak_slots < .5 * rollouts["kv"].peak_slots
    assert rollouts["concat"].peak_slots < .7 * written["concat"]
    assert not any(len(ids) > 1 and ids[-1:] == encode_text(char, "</Parallel>") for ids in rollouts["kv"].tree.ids)   # nothing is read again
    assert rollouts["result"].peak_context < rollouts["kv"].peak_context / 2


# ---- the model's window

@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("window", [12, 25, 40])
def test_no_token_stands_behind_the_window(join, window):
    model = tiny("Qwen3", char)
    asked = questions(random.Random(window), 12)
    config = DecodeConfig(join=join, window=window, hook=Script(char, random_plan), limits=ROOMY)
    rollouts = check_against_plain_loop(model, char, asked, config)
    for r in rollouts: assert all(r.tree.end(s) <= window for s in range(len(r.tree)) if r.tree.sampled[s])
    assert any(r.finish_reason == "length" or any(getattr(e, "rule", "") == "length" for e in r.errors) for r in rollouts)


def test_a_question_longer_than_the_window_gets_no_token():
    r, = generate(tiny("Qwen3", char), char, ["1+1+1+1+1+1+1?"], DecodeConfig(window=8))
    assert (r.finish_reason, r.text, r.answer, r.total_tokens, len(r.logprobs)) == ("length", "", None, 0, 0)


def test_the_window_is_the_models_own():
    model = tiny("Qwen3", char, max_position_embeddings=30)
    r, = generate(model, char, ["1+1?"], DecodeConfig(hook=Script(char, lambda branch, tokenizer: [])))
    assert r.finish_reason == "length" and r.tree.end(len(r.tree) - 1) == 30


# ---- width under load

@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("lanes", [1, 2, 3, 7, 1000])
def test_waiting_for_a_lane_changes_no_token(join, lanes, monkeypatch):
    "Only when it is written. Lanes are never more than allowed, and every problem has one; where enough are free, none waits."
    model, seen, step = tiny("Qwen3", char), [], reader.Reader.step
    def spy(self, rows):
        seen.append([len(row.live) for row in rows])
        return step(self, rows)
    monkeypatch.setattr(reader.Reader, "step", spy)
    asked = questions(random.Random(lanes), 9)
    config = DecodeConfig(join=join, hook=Script(char, random_plan), batch=3, limits=Limits(max_tokens=400, max_thread_tokens=60), temperature=1.0)
    free = generate(model, char, asked, config)
    widest, seen[:] = max(map(sum, seen)), []
    held = generate(model, char, asked, dataclasses.replace(config, max_lanes=lanes))
    assert widest > 3 and all(map(same, free, held)) and all(min(row) > 0 for row in seen)
    assert max(map(sum, seen)) == min(lanes, widest)
    steps = [sum(r.decode_steps for r in rollouts) for rollouts in (free, held)]
    assert steps[0] == steps[1] if lanes == 1000 else steps[0] < steps[1] if lanes < 3 else steps[0] <= steps[1]


@pytest.mark.parametrize("below, forks", [(3, [0, 0, 0]), (4, [1, 1, 1])])
def test_no_fork_begins_while_so_many_branches_are_decoded(below, forks):
    "Three problems that want to fork at once. Below three branches none may; the one that is alone at last may, but does not want to any more."
    model, opening = tiny("Qwen3", char), encode_text(char, block("1:p", "2:q"))
    def hook(branch, ids, logits):
        out = logits.clone()
        out[reserved(char)] -= 100
        end = control_ids(char)["</Thread>"] if branch.path else char.eos_token_id
        if branch.path or branch.forks or len(ids) >= len(opening): out[end] += 1000 * (len(ids) > 20 + len(branch.path))
        else: out[opening[len(ids)]] += 1000
        return out
    config = DecodeConfig(hook=hook, batch=3, limits=ROOMY)
    assert [r.forks for r in generate(model, char, ["1+1?", "2+2?", "3+3?"], config)] == [1, 1, 1]
    held = dataclasses.replace(config, fork_below=below)
    assert [r.forks for r in generate(model, char, ["1+1?", "2+2?", "3+3?"], held)] == forks
    alone, = generate(model, char, ["1+1?"], held)
    assert alone.forks == 1


# ---- stragglers

def test_a_deadline_closes_what_is_late():
    "Thread 2 would write for ever, thread 1 of the inner fork too; the others end by themselves. All is joined, and the main thread goes on."
    model = tiny("Qwen3", char)
    def plan(branch, tokenizer):
        if not branch.path: return [None, tokenizer.eos_token_id] if branch.forks else encode_text(tokenizer, block("1:p", "2:q", "3:r"))
        if branch.name == "3" and not branch.forks: return encode_text(tokenizer, block("1:s", "2:t"))
        return [] if branch.name in ("2", "3.1") else [None] * 4 + encode_text(tokenizer, "</Thread>")
    for join in JOINS:
        config = DecodeConfig(join=join, hook=Script(char, plan), limits=ROOMY, deadline=60)
        r, = generate(model, char, ["1+1?"], config)
        assert r.finish_reason == "stop" and sorted(map(str, r.errors)) == [f"deadline in thread {n}" for n in ("2", "3", "3.1")]
        assert 60 <= r.decode_steps < 140 and r.tree == replayed(r, char, config)
        same_logprobs(model, [r])
        roomy = DecodeConfig(join=join, hook=Script(char, plan), limits=Limits(max_tokens=900, max_thread_tokens=200))
        free, = generate(model, char, ["1+1?"], roomy)
        assert free.decode_steps > r.decode_steps


@pytest.mark.parametrize("mode", ["sequential", "autoregressive"])
def test_decoded_is_rerun_on_one_line(mode):
    model, asked = tiny("Qwen3", char), questions(random.Random(mode), 8)
    config = DecodeConfig(mode=mode, batch=3, limits=Limits(max_tokens=40))   # no hook: the model may write any token
    for r in check_against_plain_loop(model, char, asked, config): assert not r.forks


@pytest.mark.parametrize("arch", ["Qwen3", "Gemma"])
def test_long_prompts_and_growing_caches(arch, padded):
    "Prompts of very different lengths, and rollouts that outgrow the first 256 slots of a row."
    model, rng = tiny(arch, char), random.Random("long")
    asked = ["".join(rng.choice("0123456789+") for _ in range(n)) for n in (3, 700, 250, 256, 1, 40)]
    def plan(branch, tokenizer):
        if not branch.path and branch.forks < 5: return [None] * 5 + encode_text(tokenizer, block("1:p", "2:q", "3:r"))
        return [None] * 7 + (encode_text(tokenizer, "</Thread>") if branch.path else [tokenizer.eos_token_id])
    config = DecodeConfig(hook=Script(char, plan), batch=3, limits=ROOMY)
    assert max(sum(map(len, r.tree.ids)) for r in check_against_plain_loop(model, char, asked, config)) > 1024


# ---- batch independence (invariant 6)

NEIGHBOURS = [(name, "concat", options) for name in TOKENIZERS for options in SAMPLING] + [("char", j, dict()) for j in ("result", "kv")]


@pytest.mark.parametrize("name, join, options", NEIGHBOURS, ids=str)
def test_neighbours_change_nothing(name, join, options):
    tokenizer = TOKENIZERS[name]()
    model, asked = tiny("Qwen3", tokenizer), questions(random.Random("neighbours"), 8)
    config = lambda **more: DecodeConfig(**{"temperature": 1., "hook": Script(tokenizer, random_plan), "batch": 3, "join": join,
                                            "limits": Limits(max_tokens=400, max_thread_tokens=40), **options, **more})
    together = generate(model, tokenizer, asked, config())
    assert any(r.forks for r in together)
    for r in together: assert r.tree == replayed(r, tokenizer, config())
    same_logprobs(model, together)
    for r in together[:4]: assert same(r, generate(model, tokenizer, [r.question], config())[0])
    order = random.Random(1).sample(range(8), 8)
    for batch in (1, 5, 64):
        for i, r in zip(order, generate(model, tokenizer, [asked[i] for i in order], config(batch=batch)), strict=True):
            assert same(r, together[i])
    other = generate(model, tokenizer, asked, config(seed=1))
    assert sum(not same(a, b) for a, b in zip(together, other, strict=True)) >= 7


def test_copies_of_a_question_differ():
    model, config = tiny("Qwen3", char), DecodeConfig(temperature=1., mode="sequential", limits=Limits(max_tokens=30))
    a, b, c = generate(model, char, ["7*8?", "7*8?", "1+1?"], config)
    assert a.text != b.text and same(a, generate(model, char, ["7*8?"], config)[0])
    seeds = [5, 5, "x"]
    x, y, z = generate(model, char, ["7*8?"] * 3, config, seeds=seeds)
    assert same(x, y) and not same(x, z) and same(z, generate(model, char, ["7*8?"], config, seeds=["x"])[0])


def test_greedy_ignores_the_seed():
    model = tiny("Llama", char)
    config = lambda seed: DecodeConfig(seed=seed, mode="sequential", limits=Limits(max_tokens=30))
    a, b = (generate(model, char, ["7*8?"] * 2, config(seed)) for seed in (0, 1))
    assert same(a[0], b[0]) and same(a[0], a[1])


# ---- what is counted

def chars(text):
    "The tokens of a text, for the character tokenizer; no parser."
    out = []
    while text:
        tag = next((t for t in CONTROL_TOKENS if text.startswith(t)), text[0])
        out.append(tag)
        text = text[len(tag):]
    return out


def latency(text):
    "Tokens on the longest way through a well-formed text: at each fork, through its longest thread. No parser."
    stack = [[0, 0]]   # open lines of reasoning: tokens so far, longest thread of the open fork
    for token in chars(text):
        if token == "<Thread>": stack.append([0, 0])
        if token == "</Parallel>":
            stack[-1][0] += stack[-1][1]
            stack[-1][1] = 0
        stack[-1][0] += 1
        if token == "</Thread>":
            own, _ = stack.pop()
            stack[-1][1] = max(stack[-1][1], own)
    assert len(stack) == 1
    return stack[0][0]


def said(*texts):
    "A plan: what the main thread writes until each stop, and what every thread writes."
    main, threads = texts[0], texts[1]
    def plan(branch, tokenizer):
        text = threads[branch.path[-1][1] - 1] if branch.path else main[branch.forks]
        return encode_text(tokenizer, text)
    return DecodeConfig(hook=Script(char, plan), limits=ROOMY)


def test_counts_by_hand():
    #        <P><Os> <O>1:p</O> <O>2:q</O> </Os>: 2 + 5 + 5 + 1 = 13 tokens, 15 with `x=`
    config = said(["x=" + block("1:p", "2:q"), "abc<eos>"], ["12345</Thread>", "1</Thread>"])
    r = generate(tiny("Qwen3", char), char, ["7?"], config)[0]
    assert r.text == "x=" + block("1:p", "2:q") + "<Thread>1:12345</Thread><Thread>2:1</Thread></Parallel>abc"
    #  thread 1: <Thread> 1 : 12345 </Thread> = 9; thread 2: 5; then </Parallel> a b c <eos>
    assert r.token_latency == 15 + 9 + 1 + 4 and r.total_tokens == 15 + 9 + 5 + 1 + 4
    #  A line's last token is written in the very step in which the next line writes its first: 15 + 6 + 4 tokens, two seams
    assert r.decode_steps == 15 + 6 + 4 - 2
    assert (r.finish_reason, r.forks, r.errors, r.well_formed, r.answer) == ("stop", 1, [], True, None)
    #  <eos> sees the prompt (2) and the joined line: all 34 tokens but itself, and itself
    assert r.peak_context == 2 + 34
    found = [(i.branch, i.start, i.end, i.forced) for i in r.timeline]
    #  the main thread's last token and the seed `<Thread> i :` of both; then thread 1's last, thread 2 anew, and </Parallel>
    assert found == [("main", 0, 14, 2), ("2", 14, 15, 0), ("1", 14, 19, 7), ("main", 19, 22, 7)]
    assert show_timeline(r)
    assert "forks=1" in repr(r)


def test_answer_is_what_stands_in_the_box():
    r = generate(tiny("Qwen3", char), char, ["7?"], said(["so \\boxed{56}<eos>"], []))[0]
    assert r.answer == "56" and r.token_latency == r.total_tokens == r.decode_steps == len("so \\boxed{56}") + 1


def test_counts_against_the_text():
    model, asked = tiny("Qwen3", char), questions(random.Random("counts"), 40)
    rollouts = generate(model, char, asked, DecodeConfig(hook=Script(char, clean_plan), limits=ROOMY, batch=16))
    assert sum(r.forks > 1 for r in rollouts) > 10
    for r in rollouts:
        assert r.finish_reason == "stop" and r.well_formed
        assert r.total_tokens == len(chars(r.text)) + 1 and r.token_latency == latency(r.text) + 1   # and <eos>
        assert r.token_latency <= r.total_tokens and (r.token_latency < r.total_tokens) == bool(r.forks)
        assert r.decode_steps <= r.token_latency and r.seconds > 0
        mask = r.tree.ancestors.long() @ torch.tensor([len(i) for i in r.tree.ids])
        assert r.peak_context == mask.max()


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("options", [dict(), dict(deadline=9), dict(window=60), dict(max_lanes=3)], ids=str)
def test_nonsense_with_every_join(join, options, padded):
    "Every rollout ends within its limits, as it would alone, and its logprobs are those of its tree."
    model = tiny("Qwen3", char, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, head_dim=8, intermediate_size=16)
    limits = TIGHT["deep"]
    config = DecodeConfig(temperature=1., limits=limits, batch=32, hook=Push(), join=join, **options)
    rollouts = generate(model, char, [str(i) for i in range(100)], config)
    for r in rollouts:
        n = sampled(r.tree)
        assert n <= limits.max_tokens and len(r.logprobs) == n and within(r.trajectory, limits)
        assert max(r.tree.end(s) for s in range(len(r.tree)) if r.tree.sampled[s]) <= options.get("window", 10 ** 6)
    assert any(r.forks for r in rollouts) and {"stop", "length"} >= {r.finish_reason for r in rollouts}
    same_logprobs(model, rollouts)
    for i in (0, 7, 40): assert same(rollouts[i], generate(model, char, [str(i)], config)[0])


def test_questions_come_in_a_list_and_training_mode_comes_back():
    model = tiny("Qwen3", char).train()
    with pytest.raises(ValueError, match="a list of strings"): generate(model, char, "12?")
    def burst(branch, ids, logits): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): generate(model, char, ["12?"], DecodeConfig(hook=burst))
    assert model.training


def test_steps_do_not_depend_on_the_batch():
    model, asked = tiny("Qwen3", char), questions(random.Random("steps"), 8)
    runs = [generate(model, char, asked, DecodeConfig(hook=Script(char, clean_plan), limits=ROOMY, batch=b)) for b in (1, 3, 8)]
    for a, *others in zip(*runs, strict=True):
        for b in others: assert a.decode_steps == b.decode_steps
    stats = {}
    generate(model, char, asked, DecodeConfig(hook=Script(char, clean_plan), limits=ROOMY, batch=8), stats=stats)
    assert stats["steps"] + 1 == max(r.decode_steps for r in runs[0]) and stats["forwards"] > stats["steps"] and stats["seconds"] > 0


# ---- limits

def sampled(tree): return sum(len(ids) for ids, s in zip(tree.ids, tree.sampled, strict=True) if s)


def test_rollout_budget():
    model = tiny("Qwen3", char)
    free = Script(char, lambda branch, tokenizer: [])
    r = generate(model, char, ["7?"], DecodeConfig(hook=free, limits=Limits(max_tokens=20)))[0]
    assert r.finish_reason == "length" and sampled(r.tree) == r.total_tokens == r.token_latency == r.decode_steps == 20
    endless = lambda branch, tokenizer: [] if branch.path else encode_text(tokenizer, block("1:p", "2:q", "3:r"))
    r = generate(model, char, ["7?"], DecodeConfig(hook=Script(char, endless), limits=Limits(max_tokens=38)))[0]
    assert len(chars(block("1:p", "2:q", "3:r"))) == 18                     # 20 are left: 6 for each thread, 2 for the main thread
    assert r.finish_reason == "length" and sampled(r.tree) == 18 + 3 * 6 + 2
    assert [str(e) for e in r.errors] == [f"length in thread {i}" for i in "123"] and r.forks == 1


@pytest.mark.parametrize("end, rule", [("", "length"), ("<eos>", "end of sequence")])
def test_thread_that_does_not_end(end, rule):
    def plan(branch, tokenizer):
        if branch.path: return encode_text(tokenizer, "ab</Thread>" if branch.path[-1][1] == 2 else "a" + end)
        return encode_text(tokenizer, "so \\boxed{56}<eos>" if branch.forks else block("1:p", "2:q"))
    config = DecodeConfig(hook=Script(char, plan), limits=Limits(max_thread_tokens=9))
    r = generate(tiny("Qwen3", char), char, ["7?"], config)[0]
    assert r.finish_reason == "stop" and r.answer == "56" and r.text.count("</Thread>") == 2 and r.text.endswith("}")
    assert [(e.rule, e.path) for e in r.errors if isinstance(e, ThreadError)] == [(rule, "1")] and not r.well_formed
    wrote = {9: 9, 2: 1}[9 if not end else 2]   # tokens of thread 1 that stay
    assert r.token_latency == 13 + 3 + max(wrote + 1 + bool(end), 3) + 1 + len("so \\boxed{56}") + 1


FRAGMENTS = [encode_text(char, t) for t in [
    block("1:p", "2:q"), block("1:p", "2:q"), block("1:p", "2:q", "3:r"), block("1:p", "2:q", "3:r", "4:s", "5:t"), block("1:p"),
    block("2:p", "1:q"), block(), "<Parallel>", "<Outlines></Outlines>", "</Outlines>", "</Thread>", "</Thread>", "<eos>",
    "<Conclusion>7</Conclusion></Thread>", "<Conclusion>", "</Conclusion>", "</Parallel>", "<Thread>1:"]]
ALL_CONTROL = [*control_ids(char).values(), char.eos_token_id]


def nonsense(branch):
    "Fragments of control tokens, whole forks among them, and free tokens between."
    rng, plan = random.Random(repr((branch.machine.tree.ids[0], branch.path, branch.forks, len(branch.tail)))), []
    while len(plan) < 24:
        kind = rng.random()
        if kind < .5: plan += rng.choice(FRAGMENTS)
        elif kind < .8: plan += [rng.choice(ALL_CONTROL)]
        else: plan += [None] * rng.randint(1, 3)
    return plan


class Push:
    "A hook that adds a large bonus; where there is none, any token may come."
    def __init__(self): self.plan = functools.cache(lambda branch, stop: nonsense(branch))
    def __call__(self, branch, ids, logits):
        plan = self.plan(branch, len(branch.tail))
        if len(ids) >= len(plan) or plan[len(ids)] is None: return logits
        logits = logits.clone()
        logits[plan[len(ids)]] += 1000.
        return logits


def within(nodes, limits, level=1):
    forks = [n for n in nodes if isinstance(n, Fork)]
    return len(forks) <= limits.max_forks and (not forks or level <= limits.max_depth) and all(
        2 <= len(f.threads) <= limits.max_threads and all(within(t.body, limits, level + 1) for t in f.threads) for f in forks)


TIGHT = {"deep": Limits(max_threads=4, max_forks=2, max_depth=2, max_tokens=48, max_thread_tokens=20),
         "flat": Limits(max_threads=4, max_forks=1, max_depth=1, max_tokens=64, max_thread_tokens=17)}


@pytest.mark.parametrize("limits", TIGHT.values(), ids=TIGHT)
def test_a_thousand_rollouts_of_nonsense(limits):
    model = tiny("Qwen3", char, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, head_dim=8, intermediate_size=16)
    config = DecodeConfig(temperature=1., limits=limits, batch=250, hook=Push())
    rollouts = generate(model, char, [str(i) for i in range(1000)], config)
    assert len(rollouts) == 1000
    reasons, forks, errors = Counter(), Counter(), Counter()
    for i, r in enumerate(rollouts):
        n = sampled(r.tree)
        assert r.question == str(i) and n <= limits.max_tokens and len(r.logprobs) == n and within(r.trajectory, limits)
        assert r.tree == replayed(r, char, config)
        assert r.finish_reason != "length" or n == limits.max_tokens
        assert torch.isfinite(r.logprobs).all() and 0 < r.token_latency <= r.total_tokens and r.decode_steps <= r.token_latency
        reasons[r.finish_reason] += 1
        forks[r.forks] += 1
        errors.update({e.rule for e in r.errors})
    assert set(reasons) == {"stop", "length"} and min(reasons.values()) > 50
    assert sum(n for f, n in forks.items() if f) > 200
    expected = {"length", "end of sequence", "max_threads", "close_without_open", "too_few_outlines"}
    assert expected | ({"max_depth", "max_forks"} if limits.max_depth == 1 else set()) <= set(errors) and max(forks) >= limits.max_forks
    same_logprobs(model, rollouts[:40])


# ---- the coin, hooks, and numbers that are none

class Coin:
    """A hook: at its first token and behind every join and every refused block the main thread forks with probability 1/2, as the logits
    say and the sampler draws; threads end at once."""
    def __init__(self, refused=False):
        self.block = encode_text(char, block("1:p") if refused else block("1:p", "2:q"))

    def __call__(self, branch, ids, logits):
        logits[:] = -torch.inf
        if branch.path: logits[control_ids(char)["</Thread>"]] = 0
        elif ids and ids[0] == self.block[0]: logits[self.block[len(ids)]] = 0
        else: logits[[self.block[0], char.eos_token_id]] = 0


@pytest.mark.parametrize("refused", [False, True])
def test_a_branch_draws_anew_behind_a_join_and_a_refused_block(refused):
    model = tiny("Qwen3", char)
    config = DecodeConfig(temperature=1., hook=Coin(refused), limits=Limits(max_forks=4, max_tokens=600))
    rollouts = generate(model, char, ["1+1?"] * 400, config)
    asked = Counter(sum(i.ids[:1] == (control_ids(char)["<Parallel>"],) for i in r.timeline if i.branch == "main") for r in rollouts)
    once, twice = sum(n for k, n in asked.items() if k >= 1), sum(n for k, n in asked.items() if k >= 2)
    assert 160 < once < 240 and .38 < twice / once < .62, asked


def test_no_random_number_is_used_twice(monkeypatch):
    "Not within a rollout, whatever it forks, joins, and is refused."
    places, real = [], decode.uniforms
    def spy(keys, steps):
        places.extend(zip(keys.tolist(), steps.tolist()))
        return real(keys, steps)
    monkeypatch.setattr(decode, "uniforms", spy)
    config = DecodeConfig(temperature=1., hook=Script(char, random_plan), batch=4, limits=Limits(max_tokens=300, max_thread_tokens=60))
    rollouts = generate(tiny("Qwen3", char), char, questions(random.Random("places"), 16), config)
    assert any(r.forks > 1 for r in rollouts) and len(places) == sum(len(i.ids) for r in rollouts for i in r.timeline)
    assert len(set(places)) == len(places)


def test_a_hook_may_change_its_logits_in_place():
    def in_place(branch, ids, logits):
        logits[:] = -1e9
        logits[char.eos_token_id if len(ids) > 4 else 40] = 0
    def anew(branch, ids, logits): return torch.full_like(logits, -1e9).index_fill_(0, torch.tensor(char.eos_token_id if len(ids) > 4 else 40), 0)
    model = tiny("Qwen3", char)
    a, b = (generate(model, char, ["1+1?"], DecodeConfig(hook=h))[0] for h in (in_place, anew))
    assert same(a, b) and a.logprobs.max() < -1e-3
    same_logprobs(model, [a])


def test_logits_that_are_no_numbers():
    model = tiny("Qwen3", char)
    with torch.no_grad(): model.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not numbers"): generate(model, char, ["1+1?"])
    with torch.no_grad(): model.model.norm.weight[0] = 1
    generate(model, char, ["1+1?"], DecodeConfig(limits=Limits(max_tokens=3)))   # that was no verdict on the model
    model = tiny("Qwen3", char)
    generate(model, char, ["1+1?"], DecodeConfig(limits=Limits(max_tokens=3)))
    with torch.no_grad(): model.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not numbers"): generate(model, char, ["1+1?"])


@pytest.mark.parametrize("bad, message", [("", "question 1 is empty"), ((), "question 1 is empty"), ("\ud800", "question 1: .*surrogate"),
                                          (None, "question 1: .* not None"), (7, "question 1: .* not 7"), ([1.5], r"question 1: .* not \(1.5,\)")])
def test_a_bad_question_is_named_before_anything_is_decoded(bad, message, monkeypatch):
    monkeypatch.setattr(decode.Decoder, "turn", lambda *a: pytest.fail("decoding began"))
    with pytest.raises(ValueError, match=message): generate(tiny("Qwen3", char), char, ["1+1?", bad, "2?"])


def test_questions_may_be_token_ids_and_come_from_a_generator():
    model, config = tiny("Qwen3", char), DecodeConfig(limits=Limits(max_tokens=12))
    text, ids = (generate(model, char, q, config)[0] for q in ((q for q in ["1+1?"]), [encode_prompt(char, "1+1?")]))
    assert text.tree == ids.tree and ids.question == tuple(encode_prompt(char, "1+1?"))


def test_every_stop_id_of_the_generation_config_ends_a_text():
    "Of the main thread, and of a thread; and the rollout's tree is still the replay of its trajectory."
    model, other = tiny("Qwen3", char), encode_text(char, "!")[0]
    model.generation_config.eos_token_id = [char.eos_token_id, other]
    def plan(branch, tokenizer):
        if not branch.path and not branch.forks: return encode_text(char, block("1:p", "2:q"))
        return [30, other, 31, 32] if branch.path[-1:] != ((1, 2),) else encode_text(char, "5</Thread>")
    config = DecodeConfig(hook=Script(char, plan), limits=Limits(max_tokens=90))
    rollout = generate(model, char, ["1+1?"], config)[0]
    assert rollout.end == other and rollout.finish_reason == "stop" and [e.rule for e in rollout.errors] == ["end of sequence"]
    assert [i.ids[-1] for i in rollout.timeline if i.branch in ("1", "main")][-1] == other and rollout.forks == 1
    assert rollout.tree == replayed(rollout, char, config, stops=(char.eos_token_id, other))
    same_logprobs(model, [rollout])


def test_a_question_is_the_users_turn_of_a_chat_template():
    tokenizer = chat_tokenizer()
    model, asked, limits = tiny("Qwen3", tokenizer), "What is 2+2? <|im_end|>", Limits(max_tokens=8)
    chat, plain = (generate(model, tokenizer, [asked], DecodeConfig(chat=chat, limits=limits))[0] for chat in (None, False))
    assert chat.tree.ids[0] == encode_prompt(tokenizer, asked, True) and plain.tree.ids[0] == encode_prompt(tokenizer, asked, False)
    frame = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [chat.tree.ids[0].count(i) for i in frame] == [2, 1] and not set(frame) & set(plain.tree.ids[0])
    assert decode.Decoder(model, tokenizer, DecodeConfig()).stops == (tokenizer.eos_token_id, frame[1])


def test_a_long_question_is_read_in_parts(monkeypatch, padded):
    model, asked = tiny("Qwen3", char), ["1+" * 90 + "1?", "2*3?", "7-" * 40 + "1?"]
    config = DecodeConfig(hook=Script(char, random_plan), limits=Limits(max_tokens=200, max_thread_tokens=60))
    whole = generate(model, char, asked, config, stats=(stats := {}))
    monkeypatch.setattr(reader, "PREFILL_CELLS", 900)
    parts = generate(model, char, asked, config, stats=(more := {}))
    assert all(map(same, whole, parts)) and any(r.forks for r in whole)
    assert more["prefill_tokens"] == stats["prefill_tokens"] and more["forwards"] > stats["forwards"] + 20


# ---- modes

def wants_forks(token):
    def hook(branch, ids, logits):
        logits = logits.clone()
        logits[token] += 1000.
        return logits
    return hook


@pytest.mark.parametrize("temperature", [0., 1.])
def test_sequential_never_forks(temperature):
    opening = control_ids(char)["<Parallel>"]
    config = DecodeConfig(mode="sequential", temperature=temperature, hook=wants_forks(opening), limits=Limits(max_tokens=25))
    for r in generate(tiny("Qwen3", char), char, ["7?", "8?"], config):
        assert all(opening not in ids for ids in r.tree.ids) and not r.forks
        assert r.tree.sampled == [False, True] and r.token_latency == r.total_tokens


def test_autoregressive_is_one_line():
    text = block("1:p", "2:q") + "<Thread>1:7</Thread><Thread>2:8</Thread></Parallel>\\boxed{56}"
    config = DecodeConfig(mode="autoregressive", hook=Script(char, lambda branch, tokenizer: encode_text(tokenizer, text + "<eos>")))
    r = generate(tiny("Qwen3", char), char, ["7?"], config)[0]
    assert r.text == text and r.tree.sampled == [False, True] and r.finish_reason == "stop" and r.answer == "56"
    assert r.tree.ids[1] == encode_text(char, text + "<eos>") and r.tree == replayed(r, char, config)
    assert r.token_latency == r.total_tokens == r.decode_steps == len(chars(text)) + 1


# ---- the cache

def spied(monkeypatch):
    "A FlatCache whose every forward pass is recorded: where it wrote, and whether anything else changed or moved."
    log = []
    class Spy(FlatCache):
        def aim(self, rows, where, used, parts=None):
            super().aim(rows, where, used, parts)
            log.append({"flat": (self.row * self.slots + self.where).flatten().tolist(), "moved": False})

        def update(self, keys, values, layer, *args, **kwargs):
            stores = [s[layer] for s in (self.keys, self.values) if layer < len(s)]
            before = [(s.data_ptr(), s.clone()) for s in stores]
            out = super().update(keys, values, layer, *args, **kwargs)
            others = [i for i in range(self.rows * self.slots) if i not in set(log[-1]["flat"])]
            for (address, old), store in zip(before, [self.keys[layer], self.values[layer]], strict=False):
                log[-1]["moved"] |= store.data_ptr() != address
                assert torch.equal(store.transpose(1, 2).flatten(0, 1)[others], old.transpose(1, 2).flatten(0, 1)[others])
            return out

        def move(self, source, target, used): log.append("move"); super().move(source, target, used)
        def grow(self, slots): log.append("grow"); super().grow(slots)
    monkeypatch.setattr(reader, "FlatCache", Spy)
    return log


def test_a_fork_copies_nothing(monkeypatch, padded):
    model, log, stats = tiny("Qwen3", char), spied(monkeypatch), {}
    plan = lambda branch, tokenizer: deep_plan(branch, tokenizer) if branch.depth < 2 else encode_text(tokenizer, "ab</Thread>")
    r = generate(model, char, ["7?"], DecodeConfig(join="kv", hook=Script(char, plan), limits=ROOMY), stats=stats)[0]   # frees no slot
    assert r.forks == 3 and "move" not in log
    passes = [e for e in log if isinstance(e, dict)]
    assert len(passes) == stats["forwards"]
    assert "grow" not in log and not any(p["moved"] for p in passes)        # the tensors stay where they are
    written = Counter(i for p in passes for i in p["flat"])
    assert padded or 255 not in written
    slots = sorted(i for i in written if i != 255)                          # the last one takes padding
    assert all(written[i] == 1 for i in slots) and slots == list(range(len(slots)))   # no slot twice, none left out
    #  every token of the tree lies in exactly one slot, but for <eos>, which nobody reads
    unread = sum(1 for s in range(len(r.tree)) if r.tree.sampled[s] and not any(s in p for p in r.tree.parents))
    assert unread == 1 and len(slots) == sum(map(len, r.tree.ids)) - unread


def test_a_fork_reads_only_the_seeds():
    "At a fork the model reads the last token of the main thread and the seeds; the shared prefix is not read again."
    model, sizes = tiny("Qwen3", char), []
    check_model(model), rows.reads_by_rows(model)   # ask the model, once
    config = said(["x=" + block("1:p", "2:q", "3:r"), "y<eos>"], ["12</Thread>"] * 3)
    handle = model.register_forward_pre_hook(lambda m, a, kw: sizes.append(tuple(kw["input_ids"].shape)), with_kwargs=True)
    generate(model, char, ["12345678?"], config)
    handle.remove()
    #  prompt; the main thread token by token; </Outlines> and 3 seeds of 3; three lanes twice; then the joined line at once
    joined = 1 + 2 * (3 + 3) + 1
    assert sizes == [(1, 9)] + [(1, 1)] * 19 + [(1, 1 + 3 * 3)] + [(1, 3)] * 2 + [(1, joined)] + [(1, 1)]


def test_many_problems_are_read_without_padding(padded):
    "48 problems, some of which fork: what each says is what it says alone. In one line a step reads as many tokens as there are live branches."
    model, asked, sizes = tiny("Qwen3", char), [f"{k}?" for k in range(48)], []
    def plan(branch, tokenizer):
        if branch.depth: return encode_text(tokenizer, "12345</Thread>")
        forks = branch.machine.tree.ids[0][0] % 4 == 0 and not branch.forks
        return encode_text(tokenizer, "ab" + block(*(f"{i}:p" for i in range(1, 7))) if forks else "abcd" * 18 + "<eos>")
    check_model(model), rows.reads_by_rows(model)
    handle = model.register_forward_pre_hook(lambda m, a, kw: sizes.append(tuple(kw["input_ids"].shape)), with_kwargs=True)
    together = generate(model, char, asked, DecodeConfig(hook=Script(char, plan)))
    handle.remove()
    forked = sum(r.forks for r in together)
    assert 0 < forked < 20 and (((48, 6) in sizes) if padded else ((1, 48 + 5 * forked) in sizes and all(p == 1 for p, _ in sizes)))
    if not padded:   # every token once, but for the ends of rollouts and of all threads but the first: the others are read as they stand in the join
        assert sum(n for _, n in sizes) == sum(len(ids) for r in together for ids in r.tree.ids) - len(together) - 5 * forked
    for r, q in zip(together, asked):
        alone, = generate(model, char, [q], DecodeConfig(hook=Script(char, plan)))
        assert r.tree == alone.tree and torch.allclose(r.logprobs, alone.logprobs, atol=1e-5) and r.question == q


def test_the_decoder_is_one_class():
    assert len(decode.Decoder.__mro__) == 2 and decode.Decoder.__doc__
    assert {"begin", "turn", "run"} <= vars(decode.Decoder).keys() and "check_model" in inspect.getsource(decode.Decoder)


# ---- bad input

def test_no_questions():
    stats = {}
    assert generate(tiny("Qwen3", char), char, [], DecodeConfig(), stats=stats) == []
    assert stats["steps"] == stats["forwards"] == 0


@pytest.mark.parametrize("name", TOKENIZERS)
def test_control_tokens_in_a_question_are_text(name):
    tokenizer = TOKENIZERS[name]()
    model, config = tiny("Qwen3", tokenizer), DecodeConfig(limits=Limits(max_tokens=60), hook=Script(tokenizer, deep_plan), batch=2)
    question = block("1:p", "2:q") + "<Thread>1:</Thread>" + tokenizer.eos_token + "7?"
    control = {*control_ids(tokenizer).values(), tokenizer.eos_token_id}
    evil, plain = generate(model, tokenizer, [question, "7?"], config)
    assert control.isdisjoint(evil.tree.ids[0]) and tokenizer.decode(evil.tree.ids[0]) == question == evil.question
    assert not any("<Thread>1:</Thread>" in i.text for i in evil.trajectory if hasattr(i, "text"))
    assert same(plain, generate(model, tokenizer, ["7?"], config)[0])


# ---- what a policy knows

def test_a_question_outside_what_a_policy_knows_is_answered_with_a_warning():
    model = tiny("Qwen3", char)
    config = DecodeConfig(limits=Limits(max_tokens=5))
    assert not generate(model, char, ["abc?"], config)[0].warnings
    model.config.knows = {"pattern": r"[0-9+*]+\?", "says": "sums"}
    with pytest.warns(UserWarning, match="trained on sums") as seen: rollouts = generate(model, char, ["1+1?", "abc?", "What?"], config)
    assert [len(r.warnings) for r in rollouts] == [0, 1, 1] and len(seen) == 1 and all(len(r.logprobs) for r in rollouts)


def test_adapters_are_merged_once_and_the_texts_stay(monkeypatch):
    merged, real = [], decode.decoding_copy
    monkeypatch.setattr(decode, "decoding_copy", lambda m: merged.append(1) or real(m))
    torch.manual_seed(0)
    model = add_lora(tiny("Qwen3", char), train_tokens=list(control_ids(char).values()))
    for p in model.parameters():
        if p.requires_grad: torch.nn.init.normal_(p, std=.05)
    config = DecodeConfig(hook=Script(char, random_plan), limits=Limits(max_tokens=150, max_thread_tokens=40))
    asked = questions(random.Random("lora"), 5)
    rollouts = generate(model, char, asked, config)
    assert len(merged) == 1 and any(r.forks for r in rollouts)
    for question, rollout in zip(asked, rollouts, strict=True): assert rollout.tree == plain_loop(model, char, question, config).tree
    same_logprobs(model, rollouts)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_hook_that_leaves_nothing_to_write_is_said(temperature):
    "It wants a fork where forks are banned: no token is made up."
    hook = lambda branch, ids, logits: torch.full_like(logits, -torch.inf).index_fill_(0, torch.tensor(control_ids(char)["<Parallel>"]), 0)
    with pytest.raises(ValueError, match="^a hook and what is banned here leave no token to write$"):
        generate(tiny("Qwen3", char), char, ["1+1?"], DecodeConfig("sequential", hook=hook, temperature=temperature, limits=Limits(9)))
