"Problems: working against Python's arithmetic, traces, the oracle against brute force, GSM8K's graphs, held-out questions."
import json
import operator
import random
import re
import unicodedata
from collections import Counter
from dataclasses import replace
from itertools import accumulate, permutations

import pytest

from threadweaver_ref import tasks
from threadweaver_ref.replay import replay, units
from threadweaver_ref.gsm8k import read_jsonl
from threadweaver_ref.tasks import (
    BENCH_FAMILIES,
    FAMILIES,
    HABITS,
    NAMES,
    TRACES,
    Graph,
    LeftOut,
    Problem,
    Step,
    allowed,
    bench,
    count_tokens,
    data_dir,
    extract_answer,
    family,
    from_json,
    get_family,
    gsm8k,
    grade,
    gsm8k_graphs,
    gsm8k_steps,
    held_out,
    levels,
    oracle,
    plain,
    sum_of_products,
    to_json,
    trace,
    training_problem,
    work,
    write_bench,
    write_gsm8k,
)
from threadweaver_ref.format import Fork, Text, check_format, render
from threadweaver_ref.tokenizer import COLUMNS, char_tokenizer, encode_prompt

PYTHON = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
TOKENIZER = char_tokenizer()
RUNNING = sum_of_products([(12, 3), (4, 5)])


def samples(name, n, seed=0):
    rng = random.Random(f"{name} {seed}")
    return [FAMILIES[name](rng) for _ in range(n)]


# ---- working

MARKS = {"left": "₀₁₂₃₄₅₆₇₈₉", "right": "⁰¹²³⁴⁵⁶⁷⁸⁹", "column": "ⅠⅡⅢⅣⅤⅥⅦⅧⅨⅩⅪⅫ"}


def number(text, marks):
    "The number that is written lowest digit first, each digit after the mark of its place; the marks must come in order."
    found, digits = text[::2], text[1::2]
    assert found == (2 * MARKS[marks])[:len(digits)]   # from the start again where they run out
    return int("".join(str(unicodedata.digit(d)) for d in reversed(digits)))


def result(line): return re.fullmatch(r".*=x([^=]+);", line)[1]   # of a step called x


def parts(line):
    "Of a step `x`: as asked, digits of the left operand, of the right one."
    return re.match(r"x=([^:]+):((?:[₀-₉]\d)+)[-+*/]((?:[⁰¹²³⁴-⁹]\d)+)[:=]", line).groups()


def random_pair(rng, op):
    size = rng.randint(1, 8)
    a, b = rng.randint(0, 10 ** size), rng.randint(0, 10 ** rng.randint(1, size))
    if op == "-" and a < b: a, b = b, a
    return (a * (b % 10 + 1), b % 10 + 1) if op == "/" else (a, b)


@pytest.mark.parametrize("op", "+-*/")
def test_working_ends_in_the_right_number(op):
    rng = random.Random(op)
    for _ in range(2000):
        a, b = random_pair(rng, op)
        line = work(Step("x", op, (a, b), ""), {})
        asked, left, right = parts(line)
        assert asked == f"{a}{op}{b}" and (number(left, "left"), number(right, "right")) == (a, b)
        assert number(result(line), "column") == PYTHON[op](a, b) == int(plain(result(line)))


@pytest.mark.parametrize("step, line", [
    (Step("a", "*", (12, 3), ""), "a=12*3:₀2₁1*⁰3:⁰3:₀2=06+0=0Ⅰ6₁1=03+0=0Ⅱ3Ⅲ0=aⅠ6Ⅱ3;"),
    (Step("b", "+", (48, "a"), ""), "b=48+a:₀8₁4+⁰4¹2=bⅠ②Ⅱ7;"),
    (Step("c", "-", (100, "a"), ""), "c=100-a:₀0₁0₂1-⁰4¹2:Ⅰ⑥Ⅱ⑦Ⅲ0=cⅠ6Ⅱ7;"),
    (Step("c", "-", (100, 98), ""), "c=100-98:₀0₁0₂1-⁰8¹9:Ⅰ②Ⅱ⓪Ⅲ0=cⅠ2;"),
    (Step("a", "/", (48, 2), ""), "a=48/2:₀8₁4/⁰2:0₁4=Ⅱ2-04r0,0₀8=Ⅰ4-08r0=aⅠ4Ⅱ2;"),
    (Step("d", "*", ("a", "a"), ""), "d=a*a:₀4₁2*⁰4¹2:⁰4:₀4=16+0=1Ⅰ6₁2=08+1=0Ⅱ9Ⅲ0|¹2:₀4=08+Ⅱ9+0=1Ⅱ7₁2=04+Ⅲ0+1=0Ⅲ5Ⅳ0=dⅠ6Ⅱ7Ⅲ5;"),
    (Step("e", "total", ("a", "z"), ""), "aⅠ44Ⅱ22+zⅠ6⓪Ⅱ36;"),
])
def test_working_written_by_hand(step, line): assert work(step, {"a": 24, "z": 36}) == line


def test_circles_mark_the_carries():
    rng = random.Random(0)
    for _ in range(2000):
        a, b = random_pair(rng, "+")
        digits = result(work(Step("x", "+", (a, b), ""), {}))
        for k in range(max(len(str(a)), len(str(b)))):
            carries = (a % 10 ** (k + 1)) + (b % 10 ** (k + 1)) >= 10 ** (k + 1)
            assert digits[2 * k + 1].isdecimal() != carries


def test_every_entry_of_a_product_is_right():
    rng = random.Random(1)
    for _ in range(1000):
        a, b = random_pair(rng, "*")
        rows = re.search("x=.+?:.+?:(.+)=x", work(Step("x", "*", (a, b), ""), {}))[1].split("|")
        assert len(rows) == len(str(b))
        for j, row in enumerate(rows):
            head, entries, last = re.fullmatch(r"[⁰¹²³⁴-⁹](\d):((?:[₀-₉].+?[Ⅰ-Ⅻ]\d(?=[₀-₉Ⅰ-Ⅻ]))+)[Ⅰ-Ⅻ](\d)", row).groups()
            entries = [tuple(int(d or 0) for d in e) for e in re.findall(r"[₀-₉](\d)=(\d\d)(?:\+[Ⅰ-Ⅻ](\d))?\+(\d)=(\d)[Ⅰ-Ⅻ](\d)", entries)]
            assert [e[0] for e in entries] == [int(d) for d in str(a)[::-1]] and int(head) == int(str(b)[::-1][j])
            assert all(x * int(head) == p and p + there + carry == 10 * tens + ones for x, p, there, carry, tens, ones in entries)
            assert [e[3] for e in entries] == [0, *(e[4] for e in entries[:-1])] and int(last) == entries[-1][4]


def test_every_entry_of_a_division_is_right():
    rng = random.Random(2)
    for _ in range(1000):
        a, b = random_pair(rng, "/")
        body = re.search("x=.+?:.+?:(.+)=x", work(Step("x", "/", (a, b), ""), {}))[1]
        rest = 0
        for digit, entry in zip(str(a), body.split(","), strict=True):
            r, d, q, taken, left = map(int, re.fullmatch(r"(\d)[₀-₉](\d)=[Ⅰ-Ⅻ](\d)-(\d\d)r(\d)", entry).groups())
            assert (r, d) == (rest, int(digit)) and taken == q * b and taken + left == 10 * r + d and left < b
            rest = left
        assert rest == 0


def running_total(line):
    "Name, term and total so far, of every term of a total."
    for name, entries in re.findall(r"([a-zA-Z])((?:[Ⅰ-Ⅻ]\d[0-9⓪①-⑨])+)[+;]", line):
        columns = [entries[i:i + 3] for i in range(0, len(entries), 3)]
        yield name, number("".join(c[:2] for c in columns), "column"), number("".join(c[0] + c[2] for c in columns), "column")


def test_total():
    rng = random.Random(3)
    for _ in range(500):
        values = [rng.randint(0, 10 ** rng.randint(1, 6)) for _ in range(rng.randint(2, 9))]
        known = dict(zip(NAMES, values, strict=False))
        terms = list(running_total(work(Step("z", "total", tuple(known), ""), known)))
        assert [(n, v) for n, v, _ in terms] == list(known.items()) and [t for *_, t in terms] == list(accumulate(values))


@pytest.mark.parametrize("make, message", [
    (lambda: Step("a", "^", (1, 2), ""), "unknown operation"),
    (lambda: Step("a", "+", (1, 2, 3), ""), "two operands"),
    (lambda: Step("a", "+", (-1, 2), ""), "below zero"),
    (lambda: Graph(((Step("a", "+", (1, 2), ""),), ())), "2 phases, but 1 remarks"),
    (lambda: Graph(((Step("a", "+", ("b", 2), ""), Step("b", "+", (1, 2), "")),)), "no earlier step"),
    (lambda: Graph(((Step("a", "+", (1, 2), ""), Step("a", "+", (1, 2), "")),)), "two steps are called a"),
    (lambda: Graph(((Step("a", "/", (7, 2), ""),),)).values(), "7/2 is not a whole number"),
    (lambda: Graph(((Step("a", "/", (7, 0), ""),),)).values(), "7/0 is not a whole number"),
    (lambda: Graph(((Step("a", "-", (2, 7), ""),),)).values(), "2-7 is below zero"),
    (lambda: sum_of_products([]), "1 to 51 pairs"),
    (lambda: trace(RUNNING, "sometimes"), "unknown fork mode"),
    (lambda: get_family("algebra"), "unknown family 'algebra': choose one of sums"),
    (lambda: bench("algebra"), "no held-out set 'algebra': choose one of chain"),
    (lambda: gsm8k_graphs("dev"), "unknown split"),
], ids=range(14))
def test_bad_input_gets_one_clear_line(make, message):
    with pytest.raises(ValueError, match=re.escape(message)): make()


# ---- traces and grading

@pytest.mark.parametrize("name", BENCH_FAMILIES)
@pytest.mark.parametrize("fork", [True, False])
def test_traces_are_well_formed_and_right(name, fork):
    for p in [*samples(name, 60), *bench(name, 40)]:
        nodes = trace(p, fork)
        text = render(nodes)
        assert check_format(text) == [] and grade(text, p)
        assert all(a.text for a in nodes if isinstance(a, Text))
        assert not any(isinstance(a, Text) and isinstance(b, Text) for a, b in zip(nodes, nodes[1:], strict=False))
        if fork is False: assert not any(isinstance(n, Fork) for n in nodes)
        if fork is True: assert sum(isinstance(n, Fork) for n in nodes) == sum(len(v) > 1 for ph in p.graph.phases for v in levels(ph))


@pytest.mark.parametrize("name", BENCH_FAMILIES)
def test_traces_work_out_every_step_once_and_from_what_is_known(name):
    for p in samples(name, 40, seed=1):
        known = p.graph.values()
        for fork in (True, False):
            text = render(trace(p, fork))
            for s in p.graph.steps: assert text.count(work(s, known)) >= 1
            for node in trace(p, fork):
                if isinstance(node, Fork):   # siblings are independent: no thread reads what another one writes
                    names = [t.body[0].text[0] for t in node.threads]
                    steps = {s.name: s for s in p.graph.steps}
                    assert not any(o in names for n in names for o in steps[n].operands)


@pytest.mark.parametrize("name", BENCH_FAMILIES)
def test_without_forks_the_steps_come_in_the_order_of_the_question(name):
    for p in [*samples(name, 40, seed=6), *bench(name, 40)]:
        text, known = render(trace(p, False)), p.graph.values()
        lines = [work(s, known) for s in p.graph.steps]
        assert text == "".join("".join(lines.pop(0) for _ in ph) + r for ph, r in zip(p.graph.phases, p.graph.remarks, strict=True)) + (
            f"\\boxed{{{p.answer}}}")


@pytest.mark.parametrize("name", BENCH_FAMILIES)
def test_a_step_restates_what_its_outline_or_the_question_says(name):
    for p in [*samples(name, 40, seed=6), *bench(name, 40)]:
        known = p.graph.values()
        for s in (s for s in p.graph.steps if s.op != "total"):
            line = work(s, known)
            asked = line.partition(":")[0]
            assert asked == s.outline or (s.outline == s.name and f";{asked};" in f";{p.question}")
            assert int(plain(line.removesuffix(";").rpartition(f"={s.name}")[2])) == known[s.name]


def test_a_mark_is_always_new_or_means_the_newest_digit():
    "What an entry of a product reads from a column is what the newest entry of that column wrote."
    rng = random.Random(5)
    for _ in range(300):
        a, b = rng.randint(10, 99999), rng.randint(10, 9999)
        columns = {}
        working = work(Step("x", "*", (a, b), ""), {}).rpartition("=x")[0]
        for read, there, write, digit, last, carry in re.findall(r"(?:\+([Ⅰ-Ⅻ])(\d))?\+\d=\d([Ⅰ-Ⅻ])(\d)(?:([Ⅰ-Ⅻ])(\d))?", working):
            if read: assert read == write and columns[read] == there
            columns[write] = digit
            if last: columns[last] = carry   # the row's last carry
        assert [columns[k] for k in sorted(columns)] == list(f"{a * b:0{len(columns)}}"[::-1])


def test_the_total_adds_what_the_steps_ended_with():
    for p in samples("sums", 40, seed=6):
        known = p.graph.values()
        terms = list(running_total(work(p.graph.steps[-1], known)))
        assert [(n, v) for n, v, _ in terms] == [(s.name, known[s.name]) for s in p.graph.steps[:-1]] and terms[-1][2] == p.answer


def test_no_product_of_a_sum_comes_twice():
    for p in [*samples("sums", 200, seed=7), *bench("sums")]:
        products = p.question[:-1].split("+")
        assert len(products) == len(set(products))


def test_answers_against_python():
    for name in ("sums", "product", "nested"):
        for p in samples(name, 200, seed=2): assert eval(p.question[:-1], {}) == p.answer   # our own text, no model's
    for name in ("chain", "gsm8k"):
        for p in samples(name, 200, seed=2):
            known = {}
            *steps, asked = p.question[:-1].split(";")
            for step in steps:
                name, left, op, right = re.fullmatch(r"(\w)=(\w+)([-+*/])(\w+)", step).groups()
                left, right = (known[x] if x in known else int(x) for x in (left, right))
                assert op != "/" or left % right == 0 and right <= 10
                known[name] = PYTHON[op](left, right)
            assert known[asked] == p.answer and min(known.values()) >= 0


def test_grade_takes_the_last_box():
    assert grade(r"\boxed{1}\boxed{56}", RUNNING) and not grade(r"\boxed{56}\boxed{1}", RUNNING)
    assert not grade("56", RUNNING) and not grade("", RUNNING) and not grade(r"\boxed{7*8}", RUNNING)
    assert extract_answer(r"\boxed{5") is None and extract_answer(r"\boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert not grade(r"\boxed{56} no, \boxed{\frac{1}{2}}", RUNNING) and not grade(r"\boxed{56} wrong, \boxed{6", RUNNING)
    assert grade(r"\boxed{ 56 }", RUNNING) and grade(r"\boxed{1,200}", replace(RUNNING, answer=1200))


@pytest.mark.parametrize("said, answer, right", [
    ("1,2", 12, False), ("1,20", 120, False), ("1,2000", 12000, False), ("1200,", 1200, False), (",200", 200, False), ("1,,200", 1200, False),
    ("1234,567", 1234567, False), ("12,345", 12345, True), ("1,234,567", 1234567, True), ("-1,200", -1200, True), ("1,234,56", 123456, False)])
def test_a_comma_parts_thousands_only(said, answer, right):
    assert grade(f"\\boxed{{{said}}}", replace(RUNNING, answer=answer)) == right


def test_allowed_lists_a_dozen_at_most():
    assert allowed("abc") == "a, b, c" and allowed([]) == ""
    assert allowed(f"n{i}" for i in range(12)).count(",") == 11
    assert allowed((f"n{i}" for i in range(40)), 3) == "n0, n1, 38 more"
    names = ["a", "b", "b-x", "b-x-1", "b-x-2", "b-y", "bx", "c-1", "c-2"]
    assert allowed(names, 8) == "a, b, b-x (and 2 b-x-...), b-y, bx, c-1, c-2"
    assert allowed(names, 6) == "a, b (and 4 b-...), bx, c-1, c-2"
    for most in range(2, 10): assert len(allowed(names, most).split(", ")) <= most


def test_long_divisors_are_refused():
    with pytest.raises(ValueError, match="1000/25: divisors above 10"): Graph(((Step("a", "/", (1000, 25), "a"),),)).values()


def test_a_trace_of_ones_own():
    def own(problem, fork, rng): return [Text(repr(fork))]
    def lone(rng): return replace(RUNNING, family="lone")
    family(lone, own)
    try:
        p = lone(None)
        assert trace(p, "nested") == trace(p, True) == [Text("True")] and trace(p, False) == [Text("False")]
        with pytest.raises(ValueError, match="'lone' writes no conclusions"): trace(p, True, conclude=True)
        family(lone)
        assert "lone" not in TRACES
    finally: FAMILIES.pop("lone")


def test_running_example():
    assert RUNNING.question == "12*3+4*5?" and RUNNING.answer == 56
    fork = trace(RUNNING)[0]
    assert fork.outlines == ["a=12*3", "b=4*5"] and fork.threads[1].body == [Text("b=4*5:₀4*⁰5:⁰5:₀4=20+0=2Ⅰ0Ⅱ2=bⅠ0Ⅱ2;")]
    written = "".join(t.body[0].text for t in fork.threads) + r"aⅠ66Ⅱ33+bⅠ06Ⅱ25;\boxed{56}"
    assert render(trace(RUNNING, False)) == written


def test_a_conclusion_is_the_named_result():
    for p in samples("sums", 20, seed=8):
        known = p.graph.values()
        plain_fork, fork = (next(n for n in trace(p, conclude=c) if isinstance(n, Fork)) for c in (False, True))
        for step, whole, thread in zip(p.graph.steps, plain_fork.threads, fork.threads, strict=False):
            assert thread.body[0].text + thread.conclusion == whole.body[0].text and whole.conclusion is None
            assert re.fullmatch(f"={step.name}([^=]+);", thread.conclusion) and int(plain(thread.conclusion)) == known[step.name]
        assert not check_format(render(trace(p, conclude=True)))


def _adds_up(text):
    "Do the terms of a running total add up? Returns the last running total."
    total = 0
    for term in text.split("+"):
        digits = re.findall(f"[{COLUMNS}](.)(.)", term)
        total += int(plain("".join(d for d, _ in digits)))
        assert int(plain("".join(c for _, c in digits))) == total
    return total


@pytest.mark.parametrize("conclude", [False, True])
def test_groups_fork_add_up_and_return_their_sum(conclude):
    rng = random.Random(3)
    for n in (*range(2, 45, 3), 51):
        p = FAMILIES["sums"](rng, n)
        nodes, known = trace(p, "nested", conclude=conclude), p.graph.values()
        assert check_format(render(nodes)) == [] and grade(render(nodes), p)
        if n < 9:
            assert nodes == trace(p, True, conclude=conclude)   # nothing to gain
            continue
        sizes = []
        for outline, group in zip(nodes[0].outlines, nodes[0].threads, strict=True):
            first, last = re.fullmatch(r"(.=\d+\*\d+)-(.)", outline).groups()
            fork, text = group.body
            assert fork.outlines[0] == first and fork.outlines[-1][0] == last
            members = [o[0] for o in fork.outlines]
            summed = text.text + (group.conclusion or "")
            working, result = summed.split("=")
            assert _adds_up(working) == sum(known[m] for m in members)
            assert result.startswith(f"{first[0]}'") and int(plain(result)) == sum(known[m] for m in members)
            sizes.append(len(members))
        assert sum(sizes) == n and max(sizes) - min(sizes) <= 1 and abs(len(sizes) - n ** .5) <= .5
        assert _adds_up(nodes[1].text.split(";")[0]) == p.answer


def test_only_wide_sums_are_grouped():
    for name in set(BENCH_FAMILIES) - {"sums"}:
        for p in samples(name, 10): assert trace(p, "nested") == trace(p, True)


def test_random_forks_vary_and_follow_their_generator():
    p = sum_of_products([(12, 3), (4, 5), (6, 7), (8, 9), (3, 3)])
    texts = [render(trace(p, "random", random.Random(seed))) for seed in range(40)]
    assert texts == [render(trace(p, "random", random.Random(seed))) for seed in range(40)]
    assert 0 < sum("<Parallel>" not in t for t in texts) < 40 and len(set(texts)) > 10


def forks(nodes): return [n for n in nodes if isinstance(n, Fork)]


def habit(p, fork):
    "What a fork of a random trace does, read off its outlines alone."
    named = {s.outline: s for s in p.graph.steps}
    steps = [named[o] for o in fork.outlines]
    if len({*fork.outlines}) < len(steps): return "redundant"
    if any(s.name in t.operands for s in steps for t in steps): return "unwise"
    return "whole" if any({s.name for s in v} <= {s.name for s in steps} for ph in p.graph.phases for v in levels(ph)) else "narrow"


@pytest.mark.parametrize("name", BENCH_FAMILIES)
def test_random_traces(name):
    "All habits, none of them rare; only those with a guess go wrong; everything is well-formed and can be replayed."
    rng, found, forked, problems = random.Random(name), Counter(), 0, samples(name, 250, seed=4)
    for p in problems:
        nodes = trace(p, "random", rng)
        habits = [habit(p, f) for f in forks(nodes)]
        found.update(habits)
        forked += bool(habits)
        assert check_format(render(nodes)) == [] and extract_answer(render(nodes)).isdigit()
        if "unwise" not in habits: assert grade(render(nodes), p)
        if not habits: assert nodes == trace(p, False)
        apart = {o for f in forks(nodes) for o in f.outlines}
        together = "".join(n.text for n in nodes if isinstance(n, Text))
        for step in p.graph.steps:   # every step is worked out: in a thread, or in the open
            if step.op != "total": assert (step.outline in apart) != (f"{step.name}={step.operands[0]}{step.op}" in together)
        replay(nodes, encode_prompt(TOKENIZER, p.question), TOKENIZER).pack()
        assert len(units(nodes, encode_prompt(TOKENIZER, p.question), TOKENIZER)) == 1 + sum(1 + len(f.threads) for f in forks(nodes))
    assert .4 < forked / len(problems) < .6
    wanted = {"chain": {"redundant", "unwise"}, "sums": {*HABITS}}.get(name, {"redundant", "unwise", "whole"})
    assert wanted <= {h for h, n in found.items() if n > 5}


def test_an_unwise_thread_guesses_and_the_rest_goes_on_with_it():
    "`b` needs `a`, which its sibling works out: its operand is a number of as many digits, and what follows is computed from its result."
    steps = tuple(Step(n, op, args, n) for n, op, args in [("a", "*", (7, 6)), ("b", "+", ("a", 5)), ("c", "*", ("b", 2))])
    p = Problem("a=7*6;b=a+5;c=b*2;c?", 94, "three", Graph((steps,)))
    seen = set()
    for seed in range(300):
        nodes = trace(p, "random", random.Random(seed))
        for fork in forks(nodes):
            if fork.outlines != ["a", "b"]: continue
            right, guessed = (t.body[0].text for t in fork.threads)
            assert right == work(steps[0], {})
            value = next(v for v in range(10, 100) if work(steps[1], {"a": v}) == guessed)
            seen.add(value)
            assert extract_answer(render(nodes)) == str(2 * (value + 5))
    assert len(seen) > 10


def test_a_guess_never_breaks_what_follows():
    "Subtraction and division behind a guess must still come out whole and from 0 up."
    steps = tuple(Step(n, op, args, n) for n, op, args in [("a", "*", (7, 6)), ("b", "-", ("a", 40)), ("c", "-", (11, "b")), ("d", "/", ("c", 9))])
    p = Problem("a=7*6;b=a-40;c=11-b;d=c/9;d?", 1, "strict", Graph((steps,)))
    for seed in range(300): assert int(extract_answer(render(trace(p, "random", random.Random(seed))))) >= 0


# ---- tokens, latency, oracle

@pytest.mark.parametrize("name", BENCH_FAMILIES)
def test_count_tokens_is_the_char_tokenizers_length(name):
    for p in samples(name, 15):
        for fork in (True, False):
            text = render(trace(p, fork))
            assert count_tokens(text) == len(TOKENIZER.encode(text)) and TOKENIZER.decode(TOKENIZER.encode(text)) == text


def path(text):
    "Token latency of a rendered text with forks that are not nested, read off the text itself."
    tokens, total = lambda t: len(TOKENIZER.encode(t)), 0
    for part in re.split("(<Parallel>.*?</Parallel>)", text):
        threads = re.findall("<Thread>.*?</Thread>", part)
        total += tokens(part) - sum(map(tokens, threads)) + max(map(tokens, threads), default=0)
    return total


@pytest.mark.parametrize("name", BENCH_FAMILIES)
def test_no_trace_beats_the_oracle(name):
    rng = random.Random(0)
    for p in [*samples(name, 25, seed=3), *bench(name, 25)]:
        best = oracle(p)
        assert path(render(trace(p, False))) + 1 == best.sequential
        assert path(render(trace(p, True))) + 1 >= best.best
        for nodes in (trace(p, "random", rng) for _ in range(3)):
            if not any(habit(p, f) == "unwise" for f in forks(nodes)): assert path(render(nodes)) + 1 >= best.best
        assert best.best <= best.sequential and best.pays == (best.speedup > 1)


def brute_force(steps, costs):
    "Every order of every partition into stages, threads in every order: nothing shared with the dynamic program."
    def fork(stage):
        lines = "".join(f"<Outline>{i}:{s.outline}</Outline>" for i, s in enumerate(stage, 1))
        head = len(TOKENIZER.encode(f"<Parallel><Outlines>{lines}</Outlines></Parallel>"))
        return head + max(2 + len(f"{i}:") + costs[s.name] for i, s in enumerate(stage, 1))

    least = float("inf")
    for order in permutations(steps):
        for cuts in range(2 ** (len(order) - 1)):
            stages, done, spent = [[order[0]]], set(), 0
            for i, s in enumerate(order[1:]):
                if cuts >> i & 1: stages.append([s])
                else: stages[-1].append(s)
            for stage in stages:
                if any(isinstance(o, str) and o not in done for s in stage for o in s.operands): break
                spent += costs[stage[0].name] if len(stage) == 1 else fork(stage)
                done |= {s.name for s in stage}
            else: least = min(least, spent)
    return least


def random_problem(rng, n):
    def operand(i): return NAMES[rng.randrange(i)] if i and rng.random() < .3 else rng.randint(1, 10 ** rng.randint(1, 4))
    steps = tuple(Step(NAMES[i], rng.choice("+**"), (operand(i), operand(i)), "o" * rng.randint(1, 20)) for i in range(n))
    return Problem("?", 0, "random", Graph((steps,)))


def test_oracle_against_brute_force():
    rng, pays = random.Random(4), 0
    for n in [1, 2, 3, 4] * 40 + [5] * 20:
        p = random_problem(rng, n)
        costs = {s.name: len(work(s, p.graph.values())) for s in p.graph.steps}
        assert oracle(p).best == brute_force(p.graph.steps, costs) + len(r"\boxed{0}") + 1
        pays += oracle(p).pays
    assert 40 < pays < 140   # both kinds occur


def test_oracle_knows_its_families():
    assert not any(oracle(p).pays for p in bench("chain", 100))
    assert all(oracle(sum_of_products([(99, 99)] * n)).pays for n in (2, 8, 16))
    assert oracle(RUNNING).best == oracle(RUNNING).sequential - 8                     # 103 tokens instead of 111
    assert not oracle(sum_of_products([(123456789, 8), (2, 3)])).pays                 # the short thread saves less than the outlines cost
    with pytest.raises(ValueError, match="no graph"): oracle(Problem("?", 1, "mine", None))


# ---- families

def test_a_user_adds_a_family(monkeypatch):
    monkeypatch.setattr(tasks, "FAMILIES", {}), monkeypatch.setattr(tasks, "TRACES", {})

    @family
    def doubles(rng, n=3): return sum_of_products([(2, rng.randint(1, 9)) for _ in range(n)])
    assert get_family("doubles")(random.Random(0), n=2).question.count("*") == 2

    def mine(problem, fork, rng): return [Text(f"\\boxed{{{problem.answer}}}")]
    family(doubles, trace=mine)
    p = Problem("?", 7, "doubles", None)
    assert grade(render(trace(p)), p) and TRACES == {}


@pytest.mark.parametrize("name", BENCH_FAMILIES)
def test_samplers_follow_their_generator(name):
    assert samples(name, 5, seed=7) == samples(name, 5, seed=7) != samples(name, 5, seed=8)


# ---- GSM8K

@pytest.mark.parametrize("split", ["train", "test"])
def test_gsm8k_graphs_reach_gsm8ks_answers(split):
    rows = read_jsonl(data_dir() / "gsm8k_graphs" / f"{split}.jsonl")
    for row, p in zip(rows, gsm8k_graphs(split), strict=True):
        known = {}
        for name, op, args in row["steps"]:
            a, b = (known.get(o, o) for o in args)
            assert op != "/" or a % b == 0 and b <= 10
            known[name] = PYTHON[op](a, b)
        assert known[row["steps"][-1][0]] == row["answer"] == p.answer and p.wording == row["wording"]
    counts = json.loads((data_dir() / "gsm8k_graphs" / "counts.json").read_text())[split]
    assert counts["of"] == {"train": 7473, "test": 1319}[split] == len(rows) + sum(counts["left_out"].values())
    assert len(rows) == counts["kept"] >= .75 * counts["of"]


@pytest.mark.parametrize("answer, steps", [
    ("<<48/2=24>>24 <<48+24=72>>72 #### 72", [("a", "/", [48, 2]), ("b", "+", [48, "a"])]),
    ("<<16-3-4=9>>9 <<9*2=18>>18 #### 18", [("a", "-", [16, 3]), ("b", "-", ["a", 4]), ("c", "*", ["b", 2])]),
    ("<<.25*40=10>>10 #### 10", [("a", "/", [40, 4])]),
    ("<<3/4*20=15>>15 #### 15", [("a", "*", [3, 20]), ("b", "/", ["a", 4])]),
    ("<<600/24=25>>25 #### 25", [("a", "/", [600, 8]), ("b", "/", ["a", 3])]),
    ("<<2*3=6>>6 <<9*9=81>>81 <<6+20=26.00>>26 #### $26", [("a", "*", [2, 3]), ("b", "+", ["a", 20])]),
    ("<<$5*2=10>>10 #### 10.00", [("a", "*", [5, 2])]),
    ("<<7=7>>7 <<7*2=14>>14 #### 14", [("a", "*", [7, 2])]),
])
def test_gsm8k_steps(answer, steps): assert gsm8k_steps(answer) == steps


@pytest.mark.parametrize("answer, reason", [
    ("<<7/2=3.5>>3.5 #### 3.5", "a division leaves a remainder"),
    ("<<2.5+4=6.5>>6.5 #### 6.5", "a number is not whole"),
    ("<<7*2=14>>14 #### 15", "the answer is not the result of a calculation"),
    ("no calculation #### 15", "the answer is not the result of a calculation"),
    ("<<5-9=-4>>-4 #### 4", "a value is not between"),
    ("<<5*0=0>>0 #### 0", "a value is not between"),
    ("<<52/26=2>>2 #### 2", "divides by a number above 10"),
    ("<<4*5=20>>20 <<40/20=2>>2 #### 2", "divides by a result above 10"),
    ("<<2 plus 3=5>>5 #### 5", "an annotation is not plain arithmetic"),
    ("<<2*3=7>>7 #### 7", "an annotation's result is not"),
    (f"<<{'+'.join('1' * 30)}=30>>30 #### 30", "more than 20 steps"),
    ("<<__import__('os')=1>>1 #### 1", "a number is not whole"),
])
def test_left_out_with_its_reason(answer, reason):
    with pytest.raises(LeftOut, match=reason): gsm8k_steps(answer)


def test_write_gsm8k(tmp_path):
    good, bad = {"question": "q", "answer": "<<48/2=24>>24 #### 24"}, {"question": "r", "answer": "<<7/2=3.5>>3.5 #### 3.5"}
    for split in ("train", "test"): (tmp_path / f"{split}.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    counts = write_gsm8k(tmp_path, tmp_path)
    assert counts["test"] == {"kept": 1, "of": 2, "left_out": {"a division leaves a remainder": 1}}
    assert read_jsonl(tmp_path / "gsm8k_graphs" / "train.jsonl") == [{"steps": [["a", "/", [48, 2]]], "answer": 24, "wording": "q"}]


def test_redrawn_problems_keep_their_graph():
    graph = lambda p: [(s.op, [o for o in s.operands if isinstance(o, str)]) for s in p.graph.steps]
    shapes = {str(graph(p)) for p in gsm8k_graphs("train")}
    for p in samples("gsm8k", 300, seed=5): assert str(graph(p)) in shapes


def test_rewired_problems_leave_something_to_fork():
    "New edges, whole numbers, as many steps as a GSM8K problem has; always two steps that are ready at once."
    rng = random.Random(1)
    drawn = [gsm8k(rng, rewire=True) for _ in range(300)]
    sizes, shapes = {len(p.graph.steps) for p in gsm8k_graphs("train")}, {p.question for p in gsm8k_graphs("train")}
    for p in drawn:
        assert p.answer == p.graph.values()[p.graph.steps[-1].name] and len(p.graph.steps) in sizes and p.question not in shapes
        assert max(map(len, levels(p.graph.steps))) > 1 and grade(render(trace(p)), p)
    assert len({p.question for p in drawn}) > 290


# ---- held out

@pytest.mark.parametrize("name", BENCH_FAMILIES)
def test_five_hundred_distinct_questions(name):
    problems = bench(name)
    assert len(problems) == len({p.question for p in problems}) == 500
    assert {p.family for p in problems} == {name} and all(p.graph.values()[p.graph.steps[-1].name] == p.answer for p in problems)
    assert {p.question for p in problems} <= held_out() and bench(name, 3) == problems[:3]
    assert all(from_json(json.loads(json.dumps(to_json(p)))) == p for p in problems)


def test_training_never_draws_a_held_out_question():
    rng = random.Random(0)
    assert not {training_problem(rng).question for _ in range(2000)} & held_out()


@pytest.mark.parametrize("name", BENCH_FAMILIES)
def test_a_held_out_question_is_drawn_again(name, monkeypatch):
    offers = [*bench(name, 3), RUNNING]
    monkeypatch.setitem(FAMILIES, name, lambda rng: offers.pop(0))
    assert training_problem(random.Random(0), [name]) == RUNNING and offers == []


def test_gsm8k_without_redrawing_is_guarded_too():
    rng, test = random.Random(0), {p.question for p in gsm8k_graphs("test")} & held_out()
    drawn = {training_problem(rng, ["gsm8k"], split="test", redraw=False).question for _ in range(1000)}
    assert test and not drawn & test


def test_the_held_out_files_can_be_made_again(tmp_path):
    write_bench(tmp_path)
    for name in BENCH_FAMILIES:
        assert (tmp_path / "bench" / f"{name}.jsonl").read_bytes() == (data_dir() / "bench" / f"{name}.jsonl").read_bytes()


def test_no_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("THREADWEAVER_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="THREADWEAVER_DATA"): data_dir()
