"""Fine-tuning: packed against unit by unit, each token once, arrangements and shares, ready trees."""
import random
from collections import Counter
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from helpers import spied, tiny
from training import MIXED, RUNNING, SHORT, TOKENIZER, drawing, flat, forked, fresh, prompt

from threadweaver_ref import sft
from threadweaver_ref.domains import Grouped, RandomForks, Sequential, WheneverReady
from threadweaver_ref.replay import replay, units
from threadweaver_ref.schoolbook import mixture
from threadweaver_ref.scoring import collate, tree_logprobs
from threadweaver_ref.sft import SFTConfig, concluding, example_tree, step_batches, train_sft
from threadweaver_ref.train import TrainConfig, micro_batches
from threadweaver_ref.tree import SpanTree


# ---- packed against unit by unit

@pytest.mark.parametrize("arch", ["Qwen3", "Llama"])
@pytest.mark.parametrize("problems", [[RUNNING], MIXED], ids=["one sum", "every family"])
@pytest.mark.parametrize("join", ["concat", "result"])
def test_packed_loss_and_gradient(arch, problems, join):
    model, written = tiny(arch, TOKENIZER), lambda p: forked(p, conclude=join == "result")
    requests = [u for p in problems for u in units(written(p), prompt(p), TOKENIZER, join)]
    count = sum(len(completion) for _, completion in requests)
    alone = 0
    for context, completion in requests:   # one plain causal run each
        logprobs = model(torch.tensor([context + completion])).logits[0, len(context) - 1:-1].log_softmax(-1)
        loss = -logprobs[range(len(completion)), completion].sum() / count
        loss.backward()
        alone += loss.item()
    slow = flat(p.grad for p in model.parameters())
    model.zero_grad()
    packed = [replay(written(p), prompt(p), TOKENIZER, join).pack() for p in problems]
    together = 0
    for group in micro_batches(packed, 2048):
        loss = -tree_logprobs(model, collate(group)).sum() / count
        loss.backward()
        together += loss.item()
    fast = flat(p.grad for p in model.parameters())
    assert together == pytest.approx(alone, rel=1e-5)
    assert (fast - slow).norm() / slow.norm() < 1e-5


def test_each_generated_token_once():
    for p in [RUNNING, *MIXED]:
        packed = replay(forked(p), prompt(p), TOKENIZER).pack()
        written = Counter(i for _, completion in units(forked(p), prompt(p), TOKENIZER) for i in completion)
        assert Counter(packed.input_ids[packed.sampled].tolist()) == written


# ---- settings

@dataclass(frozen=True)
class Mute:
    "An arrangement of a reader's own, without conclusions."
    def arrange(self, problem, rng=None): return Sequential().arrange(problem)


@pytest.mark.parametrize("bad, message", [
    (dict(sequential=.8, autoregressive=.3), "sum"), (dict(sequential=-.5, autoregressive=1), "between 0 and 1"), (dict(steps=0), "steps=0"),
    (dict(arrangement="sometimes"), "arrangement"), (dict(arrangement=WheneverReady), "arrangement"),
    (dict(arrangement=Mute(), join="result"), "Mute"), (dict(join="zip"), "zip"), (dict(window=0), "window=0: must be at least 1")])
def test_config_is_validated(bad, message):
    with pytest.raises(ValueError, match=message): SFTConfig(**bad)


def test_defaults_are_the_ones_written_down():
    config = SFTConfig()
    own = {k: v for k, v in asdict(config).items() if k not in asdict(TrainConfig())}
    assert own == dict(arrangement={"conclude": False}, sequential=.3, autoregressive=.1, window=None) and config.arrangement == WheneverReady()
    assert {**asdict(config), **asdict(TrainConfig())} == asdict(config)


def test_joins_that_conclude_ask_for_conclusions():
    assert concluding(RandomForks(.3), "result") == RandomForks(.3, conclude=True) and concluding(Mute(), "concat") == Mute()
    assert concluding(WheneverReady(), "kv") == WheneverReady() and concluding(WheneverReady(True), "concat") == WheneverReady(True)


# ---- what a batch shows

def test_modes():
    config = SFTConfig(sequential=1, autoregressive=0)
    assert len(example_tree(RUNNING, TOKENIZER, config, random.Random(0))) == 2
    flat_line = example_tree(RUNNING, TOKENIZER, SFTConfig(sequential=0, autoregressive=1), random.Random(0))
    assert len(flat_line) == 2 and TOKENIZER.decode(flat_line.ids[1]).count("<Thread>") == 2
    assert len(example_tree(RUNNING, TOKENIZER, SFTConfig(sequential=0, autoregressive=0), random.Random(0))) > 2


@pytest.mark.parametrize("draw, mode", [(.05, "flat"), (.099, "flat"), (.101, "tree"), (.5, "tree"), (.699, "tree"), (.701, "line"), (.99, "line")])
def test_shares_do_not_overlap(draw, mode):
    "The first tenth of all draws are shown as one flat line with their control tokens, the last three tenths without forks."
    tree = example_tree(RUNNING, TOKENIZER, SFTConfig(), drawing(draw))
    assert (len(tree) > 2, len(tree) == 2 and "<Parallel>" in TOKENIZER.decode(tree.ids[1])) == (mode == "tree", mode == "flat")


def after_one(rng):
    rng.random()
    return rng


@pytest.mark.parametrize("join", ["concat", "result", "kv"])
@pytest.mark.parametrize("arrangement", [WheneverReady(), RandomForks(.7), Grouped()])
def test_settings_of_the_trees_arrive(monkeypatch, join, arrangement):
    "Arrangement, join, chat and the generator of the step."
    grown, asked = spied(monkeypatch, sft, "replay"), spied(monkeypatch, sft, "encode_prompt")
    tree = example_tree(MIXED[1], TOKENIZER, SFTConfig(arrangement=arrangement, join=join, chat=False), drawing(.5))
    wanted = replace(arrangement, conclude=join == "result").arrange(MIXED[1], after_one(drawing(.5)))
    assert grown[0][0][3:] == (join, "parallel") and grown[0][0][0] == wanted
    assert tree == replay(wanted, prompt(MIXED[1]), TOKENIZER, join) and [c[0][1:] for c in asked] == [(MIXED[1].question, False)]


def test_shares_of_the_config_arrive(monkeypatch):
    grown = spied(monkeypatch, sft, "replay")
    for draw in (.39, .41): example_tree(RUNNING, TOKENIZER, SFTConfig(join="kv", sequential=.6, autoregressive=.4), drawing(draw))
    assert [c[0][3:] for c in grown] == [("kv", "autoregressive"), ("kv", "parallel")]
    assert len(grown[1][0][0]) == 1   # one text: no fork


def test_a_step_depends_on_seed_and_number_alone():
    config = SFTConfig(batch=6)
    one, two, other = (step_batches(MIXED, 3, TOKENIZER, c) for c in (config, config, replace(config, seed=1)))
    ids = [[p.input_ids.tolist() for g in groups for p in g] for groups in (one, two, other)]
    assert ids[0] == ids[1] != ids[2]


def test_micro_tokens_arrive(monkeypatch):
    cut = spied(monkeypatch, sft, "micro_batches")
    step_batches(MIXED, 0, TOKENIZER, SFTConfig(batch=3, micro_tokens=99))
    assert [(len(c[0][0]), c[0][1]) for c in cut] == [(3, 99)]


def test_trees_that_need_more_positions_are_left_out():
    "Exactly those: a window of n positions holds the places 0 to n - 1."
    config = SFTConfig(batch=8, sequential=0, autoregressive=0)
    def found(window): return sorted(int(p.position_ids.max()) for g in step_batches(MIXED, 0, TOKENIZER, replace(config, window=window)) for p in g)
    ends = found(None)
    assert len(ends) == 8 and len(set(ends)) > 2
    for n in sorted(set(ends)):
        assert found(n + 1) == [e for e in ends if e <= n]
        if n > ends[0]: assert found(n) == [e for e in ends if e < n]
    row, = train_sft(fresh(), TOKENIZER, MIXED, replace(config, steps=1, window=ends[1] + 1))
    assert row["loss"] > 0


def test_a_window_that_holds_no_tree():
    with pytest.raises(ValueError, match="^window=3: there is nothing to learn in step 1"):
        train_sft(fresh(), TOKENIZER, MIXED, replace(SHORT, window=3))


def test_a_sampler_is_asked_again_where_the_window_holds_no_tree():
    "Most of its problems are too long: a run does not end there, and a step stays a function of its number."
    short, long = MIXED[0], replace(MIXED[0], closing="2;" * 300 + MIXED[0].closing)
    def sampler(rng, step): return short if rng.random() < .2 else long
    config = replace(SHORT, batch=1, window=200, sequential=0, autoregressive=0)
    found = [step_batches(sampler, step, TOKENIZER, config) for step in range(8)]
    assert all(sum(map(len, groups)) == 1 for groups in found)
    again = step_batches(sampler, 5, TOKENIZER, config)
    assert torch.equal(again[0][0].input_ids, found[5][0][0].input_ids)
    with pytest.raises(ValueError, match="window=200: there is nothing to learn in step 4"):
        step_batches(lambda rng, step: long, 3, TOKENIZER, config)


# ---- training

def test_it_learns_and_ends_in_eval_mode():
    model = fresh()
    log = train_sft(model, TOKENIZER, [RUNNING], SFTConfig(steps=40, batch=2, lr=1e-2, sequential=0, autoregressive=0))
    assert log[-1]["loss"] < log[0]["loss"] / 2 and not model.training
    assert [row["step"] for row in log] == list(range(1, 41)) and all(row["lr"] >= 0 for row in log)


def test_a_sampler_trains_too():
    row, = train_sft(fresh(), TOKENIZER, mixture, SFTConfig(steps=1, batch=3))
    assert row["sampled"] <= row["tokens"] and row["loss"] > 0


def test_ready_trees_are_taken_as_they_are():
    trees = [replay(forked(p), prompt(p), TOKENIZER) for p in MIXED]
    assert example_tree(trees[0], TOKENIZER, SFTConfig(), random.Random(0)) is trees[0]
    assert [t.scored() for t in trees] == trees   # nothing is lost
    one, two, config = fresh(), fresh(), SFTConfig(steps=2, batch=4, sequential=0, autoregressive=0)
    assert [r["loss"] for r in train_sft(one, TOKENIZER, trees, config)] == [r["loss"] for r in train_sft(two, TOKENIZER, MIXED, config)]


def forced_tree():
    tree = SpanTree()
    tree.add([6], [tree.add([5, 5])])
    return tree


def test_nothing_to_learn():
    with pytest.raises(ValueError, match="there is nothing to learn"): train_sft(fresh(), TOKENIZER, [forced_tree()] * 2, SHORT)
    trees = [forced_tree(), replay(forked(RUNNING), prompt(RUNNING), TOKENIZER)]   # some have something
    assert train_sft(fresh(), TOKENIZER, trees, replace(SHORT, steps=1, batch=2))[0]["loss"] > 0


def test_no_problems(tmp_path):
    with pytest.raises(ValueError, match="there are no problems to train on"):
        train_sft(fresh(), TOKENIZER, [], replace(SHORT, folder=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
