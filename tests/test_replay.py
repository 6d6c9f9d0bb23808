"""Replay: units against the paper's description in text, trees against rollouts, packing against counting by hand."""
import random
from collections import Counter

import pytest
import torch
from helpers import TOKENIZERS, random_forks, random_text, random_trajectory, rngs

from threadweaver_ref.branch import Limits
from threadweaver_ref.course import QUESTION, example
from threadweaver_ref.forkjoin import ForkJoin
from threadweaver_ref.format import Fork, FormatError, Text, Thread, check_format, parse, render
from threadweaver_ref.joins import JOINS
from threadweaver_ref.replay import packing_counts, packing_ratio, play, replay, units
from threadweaver_ref.tokenizer import encode_prompt, encode_text

char = TOKENIZERS["char"]()
tokenizers = pytest.mark.parametrize("tokenizer", [f() for f in TOKENIZERS.values()], ids=TOKENIZERS)


def block(*lines): return "<Parallel><Outlines>" + "".join(f"<Outline>{l}</Outline>" for l in lines) + "</Outlines>"


# ---- units

def unit_texts(before, nodes, end="<eos>"):
    "What the state machine must ask for, written from the paper's description, in text."
    said = ""
    for node in nodes:
        if isinstance(node, Text): said += node.text
        else:
            said += block(*(f"{i}:{o}" for i, o in enumerate(node.outlines, 1)))
            yield before, said
            before, said = before + said, ""
            for i, t in enumerate(node.threads, 1):
                conclusion = "" if t.conclusion is None else f"<Conclusion>{t.conclusion}</Conclusion>"
                yield from unit_texts(f"{before}<Thread>{i}:", t.body, conclusion + "</Thread>")
            before += "".join(render([Fork([], [t])]).replace("<Parallel><Outlines></Outlines><Thread>1:", f"<Thread>{i}:", 1)
                              .removesuffix("</Parallel>") for i, t in enumerate(node.threads, 1)) + "</Parallel>"
    yield before, said + end


@tokenizers
def test_units_in_text(tokenizer):
    for rng in rngs(60, "units"):
        trajectory = random_trajectory(rng, 3, conclusions=True)
        made = units(trajectory, encode_prompt(tokenizer, "7?"), tokenizer)
        decode = lambda ids: tokenizer.decode(ids).replace(tokenizer.eos_token, "<eos>")
        assert Counter((decode(c), decode(w)) for c, w in made) == Counter(unit_texts("7?", trajectory))


# ---- replay

@tokenizers
def test_replay_is_the_rollout(tokenizer):
    for rng in rngs(60, "replay"):
        trajectory, prompt = random_trajectory(rng, 3, conclusions=True), encode_prompt(tokenizer, random_text(rng))
        tree = replay(trajectory, prompt, tokenizer)
        machine = [*play(trajectory, prompt, tokenizer, rng=rng)][-1][0]
        assert machine.tree == tree and not machine.errors and machine.finish_reason == "stop"
        assert machine.trajectory == trajectory == parse(machine.text) and not check_format(machine.text)
        assert replay(machine.trajectory, prompt, tokenizer) == tree


@tokenizers
def test_one_line_has_the_ids_of_the_joined_line(tokenizer):
    for rng in rngs(20, "line"):
        trajectory, prompt = random_forks(rng), encode_prompt(tokenizer, "7?")
        machine = [*play(trajectory, prompt, tokenizer)][-1][0]
        for mode in ("sequential", "autoregressive"):
            tree = replay(trajectory, prompt, tokenizer, mode=mode)
            assert tree.ids == [prompt, machine.main.context_ids[len(prompt):]] and tree.sampled == [False, True]
            flat = ForkJoin(prompt, tokenizer, mode=mode)
            flat.feed(flat.main, tree.ids[1])
            assert flat.tree == tree == replay(flat.trajectory, prompt, tokenizer, mode=mode)
            assert flat.text == render(trajectory) and not flat.errors
    with pytest.raises(ValueError, match="unknown mode 'x'"): replay(trajectory, prompt, tokenizer, mode="x")


@pytest.mark.parametrize("fork, rule", [(Fork(["a"], [Thread([])]), "too_few_outlines"), (Fork(["a", "b"], [Thread([])]), "thread_count"),
                                        (Fork(["a", "<Thread>"], [Thread([])] * 2), "tag_outside_block")])
def test_replay_of_what_cannot_be(fork, rule):
    with pytest.raises(FormatError) as caught: replay([fork], [20], char)
    assert caught.value.rule == rule


def test_a_block_that_stayed_text_stays_text():
    "Well-formed, but over a limit of the rollout: the replay may not fork there, neither from ids nor from text."
    machine = ForkJoin(encode_prompt(char, "7?"), char, limits=Limits(max_threads=2))
    three, two = block("1:a", "2:b", "3:c"), block("1:p", "2:q")
    for name, text in [("main", three), ("main", "no. " + two), ("1", "x</Thread>"), ("2", two)]:
        machine.feed(next(b for b in machine.ready if b.name == name), encode_text(char, text))
    for name in ("2.1", "2.2", "2"): machine.feed(next(b for b in machine.ready if b.name == name), encode_text(char, "</Thread>"))
    machine.feed(machine.main, encode_text(char, "6<eos>"))
    assert [e.rule for e in machine.errors] == ["max_threads"] and len(machine.trajectory) == 3
    assert replay(machine.trajectory, machine.tree.ids[0], char) == machine.tree
    plain = [Text(three + "no. "), *machine.trajectory[1:]]   # no ids kept
    assert replay(plain, machine.tree.ids[0], char) == machine.tree


# ---- what packing saves

def test_packing_of_the_running_example():
    "By hand, in characters: question, block, two seeds, two threads, and the join that holds thread 2 again."
    outlines = len(encode_text(char, block("1:a=7+3x4", "2:b=2+5x3")))
    one, two = (len(t.body[0].text) + 1 for t in example()[0].threads)
    closing, question = len(example()[1].text) + 1, len(QUESTION)
    again = 3 + two + 1
    packed = question + outlines + 3 + one + 3 + two + again + closing
    context = question + outlines + 3
    alone = question + outlines + (context + one) + (context + two) + (context + one + again + closing)
    assert packing_counts(example(), encode_prompt(char, QUESTION), char) == (alone, packed)
    assert packing_counts(example(fork=False), encode_prompt(char, QUESTION), char)[0] == packing_counts(
        example(fork=False), encode_prompt(char, QUESTION), char)[1]


@tokenizers
@pytest.mark.parametrize("join", JOINS)
def test_packing_counts_are_those_of_the_paths(tokenizer, join):
    "The units' tokens, counted along the paths of the packed tree instead of from the machine."
    pairs = []
    for rng in rngs(20, "packing" + join):
        trajectory, prompt = random_forks(rng, 2, conclusions=True), encode_prompt(tokenizer, random_text(rng))
        tree = replay(trajectory, prompt, tokenizer, join)
        sizes = torch.tensor([len(ids) for ids in tree.ids])
        along = tree.ancestors.long() @ sizes   # tokens from the root to the end of each span
        pairs.append(packing_counts(trajectory, prompt, tokenizer, join))
        assert pairs[-1] == (along[torch.tensor(tree.sampled)].sum(), sizes.sum())
    assert packing_ratio(pairs) == sum(a for a, _ in pairs) / sum(b for _, b in pairs) > 1


# ---- what mutants found

FORKED = block("1:p", "2:q") + "<Thread>1:xx</Thread><Thread>2:y</Thread></Parallel>"


def test_a_line_without_forks_is_the_whole_text_whatever_the_join():
    trajectory = parse("a" + FORKED + "b")
    lines = [replay(trajectory, [20], char, join, "autoregressive") for join in JOINS]
    assert lines[0] == lines[1] == lines[2] and lines[0].ids[1] == encode_text(char, render(trajectory)) + [char.eos_token_id]


def test_a_recording_may_be_played_in_any_order():
    trajectory = parse("a" + FORKED + "b")
    orders, trees = set(), []
    for seed in range(12):
        steps = [(b.name, m) for m, b, _ in play(trajectory, [20], char, rng=random.Random(seed))]
        orders.add(tuple(name for name, _ in steps))
        trees.append(steps[-1][1].tree)
    assert len(orders) == 2 and all(t == trees[0] == replay(trajectory, [20], char) for t in trees)


def test_a_fork_with_too_few_threads_is_refused_at_its_beginning():
    with pytest.raises(FormatError, match="thread_count at character 0"): replay([Fork(["a", "b"], [Thread([])])], [20], char)


@pytest.mark.parametrize("said", ["<eos>", "<pad>"])
def test_special_tokens_of_a_text_are_refused(said):
    "Of one that we wrote ourselves: what is only meant would end the text. A decoded text has its own ids."
    for nodes in ([Text(f"a{said}b")], [Fork(["p", "q"], [Thread([Text("x")]), Thread([Text(said)])])]):
        with pytest.raises(ValueError, match=f"holds {said}, which this tokenizer reads as a special token"): replay(nodes, [20], char)
    replay([Text(f"a{said}b", tuple(encode_text(char, "ab")))], [20], char)
