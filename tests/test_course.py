"""What the notebooks share: the running example to the letter, random cases, exercises that check themselves."""
import random
import re

import pytest
import torch

from threadweaver_ref.course import QUESTION, char_length, check, example, random_text, random_trajectory
from threadweaver_ref.format import Fork, Text, check_format, parse, render
from threadweaver_ref.tokenizer import char_tokenizer

# DESIGN.md's example: outlines, threads, main thread
OUTLINES = ["a=7+3x4", "b=2+5x3"]
THREADS = ["a=7+3x4: 4)7+3=0 3)0+3=3 2)3+3=6 1)6+3=9 a9;", "b=2+5x3: 3)2+5=7 2)7+5=2 1)2+5=7 b7;"]
MAIN = "c=9+7=6;\\boxed{6}"
FORMS = [{}, {"fork": False}, {"conclude": True}]
forms = pytest.mark.parametrize("options", FORMS, ids=["forked", "sequential", "conclusions"])


def test_the_running_example_to_the_letter():
    fork, closing = example()
    assert QUESTION == "a=7+3x4;b=2+5x3;c=a+b;c?" and closing == Text(MAIN)
    assert fork.outlines == OUTLINES and [t.body for t in fork.threads] == [[Text(t)] for t in THREADS]
    assert example(fork=False) == [Text("".join(THREADS) + MAIN)]
    assert [t.body[0].text + t.conclusion for t in example(conclude=True)[0].threads] == THREADS


@forms
def test_the_arithmetic_of_the_running_example(options):
    "Each equation holds on the dial of ten, each loop is the one that the question asks for, each name has its value."
    text, value = render(example(**options)), {}
    for name, start, step, turns in re.findall(r"([a-z])=(\d)\+(\d)x(\d)", QUESTION):
        value[name] = (int(start) + int(step) * int(turns)) % 10
        now = int(start)
        for left in range(int(turns), 0, -1):
            now, before = (now + int(step)) % 10, now
            assert text.count(f" {left}){before}+{step}={now} ") == 1
        assert now == value[name] and re.search(rf"[ >]{name}{now};", text)
    value["c"] = (value["a"] + value["b"]) % 10
    assert text.endswith(f"c={value['a']}+{value['b']}={value['c']};\\boxed{{{value['c']}}}")
    for a, b, c in re.findall(r"(\d)\+(\d)=(\d)", text): assert (int(a) + int(b)) % 10 == int(c)


@forms
def test_the_character_tokenizer_round_trips_the_running_example(options):
    tokenizer, text = char_tokenizer(), render(example(**options))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids and len(ids) == char_length(text)
    assert tokenizer.decode(tokenizer.encode(QUESTION)) == QUESTION and parse(text) == example(**options)


def test_random_trajectories():
    made = [random_trajectory(random.Random(seed), 3, conclusions=True) for seed in range(200)]
    assert made == [random_trajectory(random.Random(seed), 3, conclusions=True) for seed in range(200)]
    assert all(check_format(render(t)) == [] and parse(render(t)) == t for t in made)
    assert "<Conclusion>" in "".join(map(render, made)) and "<Thread>1:<Parallel>" in "".join(map(render, made))
    assert not any(isinstance(n, Fork) for n in random_trajectory(random.Random(0), 0)) and random_text(random.Random(0))


# ---- check

CASES = [(1,), (2,), (3,)]
SAYS = {   # what comes out, what is expected, is it the same?
    "tensors": (torch.tensor([1., 2]), torch.tensor([1., 2 + 1e-8]), True), "other tensors": (torch.tensor([1.]), torch.tensor([1.1]), False),
    "a tensor as a list": ([1, 0], torch.tensor([True, False]), True), "other shapes": (torch.zeros(2, 1), torch.zeros(2), False),
    "a tensor and a text": ("0", torch.zeros(1), False), "infinities": (float("-inf"), float("-inf"), True),
    "other infinities": (float("inf"), 1., False),
    "nan": (float("nan"), float("nan"), True), "near": (1, 1 + 1e-9, True), "far": (1.0, 1.1, False), "a float and a text": ("a", 1.0, False),
    "lists": ([1.0, [2]], (1.0, [2]), True), "other lists": ([1], [1, 2], False), "dictionaries": ({"a": torch.ones(2)}, {"a": torch.ones(2)}, True),
    "other dictionaries": ({"a": 1}, {"a": 1, "b": 2}, False), "nodes": ([Text("x")], [Text("x")], True),
    "other nodes": ([Text("x")], [Text("y")], False),
    "half is not zero": (0, 0.5, False), "the same infinity in a tensor": (torch.tensor([-torch.inf]), torch.tensor([-torch.inf]), True),
}


@pytest.mark.parametrize("name", SAYS)
def test_what_counts_as_the_same(name):
    found, expected, same = SAYS[name]
    assert check(lambda x: found, lambda x: expected, CASES) is same


def test_what_check_says(capsys):
    def double(x): ...
    assert check(double, lambda x: 2 * x, CASES) is None and capsys.readouterr().out == "double: not yet\n"
    def double(x): return 2
    assert check(double, lambda x: 2 * x, CASES) is False and capsys.readouterr().out == "double(2)\n  gives    2\n  expected 4\n"
    def double(x): return x + x
    assert check(double, lambda x: 2 * x, CASES) is True and capsys.readouterr().out == "double: correct on 3 cases\n"
    def long(x): return "a" * 10_000
    assert check(long, lambda x: "b" * 10_000, [("c" * 10_000,)]) is False and len(capsys.readouterr().out) < 2000


def test_each_function_gets_arguments_of_its_own():
    def grow(items):
        items.append(1)
        return items
    cases = [([],), ([5],)]
    assert check(grow, grow, cases) and cases == [([],), ([5],)]
    assert check(lambda rng: rng.random(), lambda rng: rng.random(), [(random.Random(seed),) for seed in range(3)])


def test_errors_of_an_attempt_are_seen():
    with pytest.raises(ZeroDivisionError): check(lambda x: x / 0, lambda x: x, CASES)
