"Long arithmetic against Python's, traces against those of the first edition, questions and their problems, development questions."
import hashlib
import json
import operator
import random
import re
import unicodedata
from itertools import accumulate
from pathlib import Path

import pytest

from threadweaver_ref import schoolbook as room
from threadweaver_ref.domains import BestFlat, Grouped, RandomForks, Sequential, WheneverReady, best_flat, data_dir, get_domain, grade, levels
from threadweaver_ref.format import Fork, Text, check_format, render
from threadweaver_ref.operations import draw_chain, draw_expression, draw_number, gsm8k_graphs, redrawn
from threadweaver_ref.schoolbook import (
    FAMILIES,
    bracketed,
    decisions,
    from_question,
    gsm8k,
    held_out,
    heldout_problems,
    mixture,
    product_of,
    program,
    schoolbook,
    sum_of_products,
    sums,
    training_problem,
    write_heldout,
)
from threadweaver_ref.tokenizer import CARRIED, COLUMNS, LEFT, RIGHT, char_tokenizer
from threadweaver_ref.working import calculate, named, plain, running_total, work_out

PYTHON = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
TOKENIZER = char_tokenizer()
RUNNING = sum_of_products([(12, 3), (4, 5)])
OLD = json.loads((Path(__file__).parent / "data" / "schoolbook_traces.json").read_text(encoding="utf-8"))["rows"]


def samples(family, n, seed=0):
    rng = random.Random(f"{family} {seed}")
    return [FAMILIES[family](rng) for _ in range(n)]


# ---- the first edition's problems, texts and schedules

def digest(nodes): return hashlib.sha256(render(nodes).encode()).hexdigest()[:8]


@pytest.mark.parametrize("name", OLD)
def test_traces_are_those_of_the_first_edition(name):
    "1,086 problems: the same draws, the same texts, the same schedules."
    rng = random.Random(f"traces {name}")
    for i, (question, answer, best, sequential, digests) in enumerate(OLD[name]):
        p = sums(rng, 9 + i // 2) if name == "wide" else FAMILIES[name](rng)
        assert (p.question, p.answer) == (question, str(answer))
        groups, how = (from_question(question, "sums", subtotals=True), Grouped) if p.family == "sums" else (p, WheneverReady)
        made = [digest(h(c).arrange(q)) for c in (False, True) for h, q in ((Sequential, p), (WheneverReady, p), (how, groups))]
        assert " ".join(made) == digests
        found = best_flat(p)
        assert found.sequential == sequential
        if len(p.steps) <= 9: assert found.best == best
        else: assert 0 <= found.best - best <= 1   # a two-digit thread number: the old oracle put the longest thread first


# ---- working

def number(digits, kind):
    "Read a number whose digits, lowest first, are marked as `kind`: roman numerals, sub- or superscripts."
    marks = {"column": "ROMAN NUMERAL", "left": "SUBSCRIPT", "right": "SUPERSCRIPT"}[kind]
    places, values = digits[::2], digits[1::2]
    assert all(marks in unicodedata.name(m) for m in places) and len(places) == len(values)
    return sum(unicodedata.digit(v) * 10 ** k for k, v in enumerate(values))


def random_pair(rng, op):
    a, b = rng.randint(0, 10 ** rng.randint(1, 7)), rng.randint(1, 10 ** rng.randint(0, 5))
    if op == "-": a, b = max(a, b), min(a, b)
    return (a * (b % 10 + 1), b % 10 + 1) if op == "/" else (a, b)


@pytest.mark.parametrize("op", "+-*/")
def test_results_against_python(op):
    rng = random.Random(0)
    for _ in range(1000):
        a, b = random_pair(rng, op)
        work, result = work_out("x", op, (a, b), {})
        asked, operands = work.split(":")[:2]
        assert asked == f"x={a}{op}{b}" and (op == "+" or result == named("x", PYTHON[op](a, b)))   # a sum circles its carries
        assert int(plain(result)) == calculate(op, a, b) == PYTHON[op](a, b)
        left, right = operands.split(op)[0], operands.split(op)[1].split("=")[0].split(":")[0]
        assert number(left, "left") == a and number(right, "right") == b


def test_circled_digits_are_the_carries():
    rng = random.Random(0)
    for _ in range(2000):
        a, b = random_pair(rng, "+")
        digits = work_out("x", "+", (a, b), {})[1][2:-1]
        for k in range(max(len(str(a)), len(str(b)))):
            carries = (a % 10 ** (k + 1)) + (b % 10 ** (k + 1)) >= 10 ** (k + 1)
            assert digits[2 * k + 1].isdecimal() != carries


def test_every_entry_of_a_product_is_correct():
    rng = random.Random(1)
    for _ in range(1000):
        a, b = random_pair(rng, "*")
        rows = re.search("x=.+?:.+?:(.+)", work_out("x", "*", (a, b), {})[0])[1].split("|")
        assert len(rows) == len(str(b))
        for j, row in enumerate(rows):
            head, entries, last = re.fullmatch(r"[⁰¹²³⁴-⁹](\d):((?:[₀-₉].+?[Ⅰ-Ⅻ]\d(?=[₀-₉Ⅰ-Ⅻ]))+)[Ⅰ-Ⅻ](\d)", row).groups()
            entries = [tuple(int(d or 0) for d in e) for e in re.findall(r"[₀-₉](\d)=(\d\d)(?:\+[Ⅰ-Ⅻ](\d))?\+(\d)=(\d)[Ⅰ-Ⅻ](\d)", entries)]
            assert [e[0] for e in entries] == [int(d) for d in str(a)[::-1]] and int(head) == int(str(b)[::-1][j])
            assert all(x * int(head) == p and p + there + carry == 10 * tens + ones for x, p, there, carry, tens, ones in entries)
            assert [e[3] for e in entries] == [0, *(e[4] for e in entries[:-1])] and int(last) == entries[-1][4]


def test_a_mark_is_always_new_or_means_the_newest_digit():
    "What an entry of a product reads from a column is what the newest entry of that column wrote."
    rng = random.Random(5)
    for _ in range(300):
        a, b = rng.randint(10, 99999), rng.randint(10, 9999)
        columns, work = {}, work_out("x", "*", (a, b), {})[0]
        for read, there, write, digit, last, carry in re.findall(r"(?:\+([Ⅰ-Ⅻ])(\d))?\+\d=\d([Ⅰ-Ⅻ])(\d)(?:([Ⅰ-Ⅻ])(\d))?", work):
            if read: assert read == write and columns[read] == there
            columns[write] = digit
            if last: columns[last] = carry   # the row's last carry
        assert [columns[k] for k in sorted(columns)] == list(f"{a * b:0{len(columns)}}"[::-1])


def test_every_entry_of_a_division_is_correct():
    rng = random.Random(2)
    for _ in range(1000):
        a, b = random_pair(rng, "/")
        body, rest = re.search("x=.+?:.+?:(.+)", work_out("x", "/", (a, b), {})[0])[1], 0
        for digit, entry in zip(str(a), body.split(","), strict=True):
            r, d, q, taken, left = map(int, re.fullmatch(r"(\d)[₀-₉](\d)=[Ⅰ-Ⅻ](\d)-(\d\d)r(\d)", entry).groups())
            assert (r, d) == (rest, int(digit)) and taken == q * b and taken + left == 10 * r + d and left < b
            rest = left
        assert rest == 0


def terms(total):
    "Name, term and total so far, of every term of a running total."
    for name, entries in re.findall(r"([a-zA-Z]'?)((?:[Ⅰ-Ⅻ]\d[0-9⓪①-⑨])+)", total):
        columns = [entries[i:i + 3] for i in range(0, len(entries), 3)]
        yield name, number("".join(c[:2] for c in columns), "column"), number("".join(c[0] + c[2] for c in columns), "column")


def test_running_totals():
    rng = random.Random(3)
    for _ in range(500):
        known = {name: rng.randint(0, 10 ** rng.randint(1, 6)) for name in "abcdefghi"[:rng.randint(2, 9)]}
        found = [*terms(running_total(known, known))]
        assert [(n, v) for n, v, _ in found] == [*known.items()] and [t for *_, t in found] == [*accumulate(known.values())]


@pytest.mark.parametrize("make, message", [
    (lambda: calculate("^", 1, 2), "unknown operation '^': choose + - * or /"),
    (lambda: calculate("+", -1, 2), "operand -1 is below zero"),
    (lambda: calculate("/", 7, 2), "7/2 is not a whole number"),
    (lambda: calculate("/", 7, 0), "7/0 is not a whole number"),
    (lambda: calculate("/", 1000, 25), "1000/25: divisors above 10"),
    (lambda: calculate("-", 2, 7), "2-7 is below zero"),
    (lambda: program([("a", "+", ("b", 2))]), "step 'a' needs 'b', which is no earlier step"),
    (lambda: program([("a", "+", (1, 2)), ("a", "+", (1, 2))]), "two steps are called 'a'"),
    (lambda: sum_of_products([]), "1 to 51 pairs, not 0"),
    (lambda: product_of([1]), "2 to 52 factors, not 1"),
    (lambda: schoolbook(random.Random(0), "algebra"), "unknown family 'algebra': choose one of gsm8k, sums, chain, product, nested"),
    (lambda: heldout_problems("algebra"), "unknown family 'algebra': choose one of gsm8k, sums, chain, product, nested"),
    (lambda: gsm8k_graphs("dev"), "unknown split 'dev': choose train or test"),
], ids=range(13))
def test_bad_input_gets_one_clear_line(make, message):
    with pytest.raises(ValueError, match=re.escape(message)): make()


# ---- families

@pytest.mark.parametrize("family", FAMILIES)
def test_problems_are_well_formed_and_correct(family):
    for i, p in enumerate([*samples(family, 60), *heldout_problems(family, 40)]):
        assert p.domain == "schoolbook" and p.family == family
        for how in (Sequential(), WheneverReady(), WheneverReady(True), BestFlat(), RandomForks(.5), Grouped()):
            text = render(how.arrange(p, random.Random(i)))
            assert check_format(text) == [] and grade(text, p) and TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_restates_what_its_outline_or_the_question_says(family):
    for p in [*samples(family, 40, seed=6), *heldout_problems(family, 40)]:
        for s in (s for s in p.steps if s.outline):
            asked = s.work.partition(":")[0]
            assert asked == s.outline or (s.outline == s.name and f";{asked};" in f";{p.question}")
            assert s.result.startswith(f"={s.name}") and s.result.endswith(";")
        for s in (s for s in p.steps if not s.outline): assert s.text.startswith(">") or s is p.steps[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_needs_are_what_the_work_reads(family):
    for p in samples(family, 60, seed=9):
        values = {s.name: plain(s.result) for s in p.steps}
        for s in (s for s in p.steps if s.outline):
            _, asked, operands = re.split("[=:]", s.work)[:3]
            read = [o for o in re.split("[-+*/]", asked) if not o.isdigit()]
            assert set(read) == {n for n in s.needs if not n.startswith(">")}
            digits = [plain(re.split(":|=", o)[0].translate(str.maketrans("", "", LEFT + RIGHT))) for o in re.split("[-+*/]", operands)][:2]
            for o, d in zip(re.split("[-+*/]", asked), digits, strict=True): assert int(values.get(o, o)) == int(d)


def test_answers_against_python():
    for family in ("sums", "product", "nested"):
        for p in samples(family, 200, seed=2): assert str(eval(p.question[:-1], {})) == p.answer   # our own text, no model's
    for family in ("chain", "gsm8k"):
        for p in samples(family, 200, seed=2):
            known = {}
            *steps, asked = p.question[:-1].split(";")
            for step in steps:
                name, left, op, right = re.fullmatch(r"(\w)=(\w+)([-+*/])(\w+)", step).groups()
                left, right = (known[x] if x in known else int(x) for x in (left, right))
                assert op != "/" or left % right == 0 and right <= 10
                known[name] = PYTHON[op](left, right)
            assert str(known[asked]) == p.answer and min(known.values()) >= 0


def test_no_product_of_a_sum_comes_twice():
    for p in [*samples("sums", 200, seed=7), *heldout_problems("sums")]:
        products = p.question[:-1].split("+")
        assert len(products) == len(set(products))


def test_the_total_adds_what_the_steps_ended_with():
    for p in samples("sums", 40, seed=6):
        found = [*terms(p.steps[-1].text)]
        assert [(n, str(v)) for n, v, _ in found] == [(s.name, plain(s.result)) for s in p.steps[:-1]] and str(found[-1][2]) == p.answer


def test_running_example():
    assert RUNNING.question == "12*3+4*5?" and RUNNING.answer == "56"
    fork = WheneverReady().arrange(RUNNING)[0]
    assert fork.outlines == ["a=12*3", "b=4*5"] and fork.threads[1].body == [Text("b=4*5:₀4*⁰5:⁰5:₀4=20+0=2Ⅰ0Ⅱ2=bⅠ0Ⅱ2;")]
    written = "".join(t.body[0].text for t in fork.threads) + r"aⅠ66Ⅱ33+bⅠ06Ⅱ25;\boxed{56}"
    assert render(Sequential().arrange(RUNNING)) == written
    assert best_flat(RUNNING).best == best_flat(RUNNING).sequential - 8 == 103


def test_what_the_families_allow():
    assert not any(best_flat(p).pays for p in heldout_problems("chain", 100))
    assert all(best_flat(sum_of_products([(99, 99)] * n)).pays for n in (2, 8, 16))
    assert not best_flat(sum_of_products([(123456789, 8), (2, 3)])).pays   # the short thread saves less than the outlines cost


def last_total(text):
    "Do the terms of a running total add up? Returns the last one."
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
        p = sums(rng, n, subtotals=True)
        nodes, value = Grouped(conclude).arrange(p), {s.name: int(plain(s.result)) for s in p.steps[:n]}
        assert check_format(render(nodes)) == [] and grade(render(nodes), p)
        if n < 9:
            assert p == from_question(p.question, "sums") and nodes == WheneverReady(conclude).arrange(p)   # nothing to gain
            continue
        sizes = []
        for outline, group in zip(nodes[0].outlines, nodes[0].threads, strict=True):
            first, last = re.fullmatch(r"(.=\d+\*\d+)-(.)", outline).groups()
            fork, text = group.body
            assert fork.outlines[0] == first and fork.outlines[-1][0] == last
            members = [o[0] for o in fork.outlines]
            total, result = (text.text + (group.conclusion or "")).split("=")
            assert last_total(total) == sum(value[m] for m in members) == int(plain(result)) and result.startswith(f"{first[0]}'")
            sizes.append(len(members))
        assert sum(sizes) == n and max(sizes) - min(sizes) <= 1 and abs(len(sizes) - n ** .5) <= .5
        assert str(last_total(nodes[1].text.split(";")[0])) == p.answer


@pytest.mark.parametrize("family", FAMILIES)
def test_samplers_follow_their_generator(family):
    assert samples(family, 5, seed=7) == samples(family, 5, seed=7) != samples(family, 5, seed=8)


def test_the_domain_draws_from_every_family():
    drawn = [get_domain("schoolbook")(random.Random(seed)) for seed in range(60)]
    assert {p.family for p in drawn} == {*FAMILIES} and {p.domain for p in drawn} == {"schoolbook"}
    assert schoolbook(random.Random(1), "sums", n=3) == sums(random.Random(1), n=3)


def test_operations():
    rng = random.Random(0)
    for _ in range(200):
        assert 2 <= draw_number(rng, 1) <= 9 and len(str(draw_number(rng, 4))) == 4
        values = [int(plain(s.result)) for s in program(draw_chain(rng, 5, 999)).steps]
        assert all(0 < v <= 999 for v in values)
        text, value = draw_expression(rng, 3)
        assert eval(text, {}) == value and 0 < value <= 9999


def test_redrawn_problems_keep_their_graph():
    def shape(operations): return [(op, [o for o in args if isinstance(o, str)]) for _, op, args in operations]
    rng, whole = random.Random(5), 0
    for graph in gsm8k_graphs("train")[:300]:
        drawn = redrawn(rng, graph)
        whole += drawn is not None
        if drawn: assert shape(drawn) == shape(graph) and all(0 < int(plain(s.result)) < 10 ** 6 for s in program(drawn).steps)
    assert whole > 200
    shapes = {str(shape(g)) for g in gsm8k_graphs("train")}
    for p in samples("gsm8k", 100):
        asked = [s.work.partition("=")[2].partition(":")[0] for s in p.steps]
        assert str([(re.search("[-+*/]", a)[0], [o for o in re.split("[-+*/]", a) if not o.isdigit()]) for a in asked]) in shapes


# ---- from a question to its problem

@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_gives_its_problem_back(family):
    for p in samples(family, 150, seed=11): assert from_question(p.question, family) == p == from_question(p.question.removesuffix("?") + "?", family)


def test_the_label_is_found():
    guessed = {f: {from_question(p.question).family for p in samples(f, 60, seed=12)} for f in FAMILIES}
    assert guessed == {"gsm8k": {"gsm8k", "chain"}, "sums": {"sums"}, "chain": {"chain"}, "product": {"product"}, "nested": {"nested"}}
    assert from_question("12*3?").family == "product" and from_question("12*3?", "sums").family == "sums"


@pytest.mark.parametrize("question", [
    "", "?", "How many?", "12+3?", "12*3+4?", "12*3+?", "a=48/2;b=48+a;a?", "a=48/2;b?", "a=48;a?", ";?", "((1+2)*3?", "(1+2))?",
    "(1+2)+3?", "(12)?", "()?", "a=48/7;a?", "a=1-2;a?", "(1-2)?", "a=b+1;a?", "A=1^2;A?", "(a+b)?", "a=1+2;a=1+2;a?",
    "*".join("2" * 53) + "?", "+".join(["2*3"] * 52) + "?", "(" * 60 + "1" + "+2)" * 60 + "?", "<Thread>?", "1*2+3*4\n?"])
def test_any_other_question_is_refused_in_one_line(question):
    with pytest.raises(ValueError) as refused: from_question(question)
    assert "\n" not in str(refused.value)


# ---- development problems

@pytest.mark.parametrize("family", FAMILIES)
def test_five_hundred_distinct_questions(family):
    problems = heldout_problems(family)
    assert len(problems) == len({p.question for p in problems}) == 500 and {p.family for p in problems} == {family}
    assert {p.question for p in problems} <= held_out() and heldout_problems(family, 3) == problems[:3]
    rows = [json.loads(line) for line in (data_dir() / "schoolbook" / f"{family}.jsonl").read_text().splitlines()]
    assert [(r["question"], r["answer"]) for r in rows] == [(p.question, p.answer) for p in problems]


def test_training_never_draws_a_held_out_question():
    rng = random.Random(0)
    drawn = {training_problem(rng).question for _ in range(1000)}
    drawn |= {sampler(rng, step).question for sampler in (mixture, decisions) for step in (0, 10 ** 6) for _ in range(250)}
    assert not drawn & held_out()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_held_out_question_is_drawn_again(family, monkeypatch):
    offers = [*heldout_problems(family, 3), RUNNING]
    monkeypatch.setitem(FAMILIES, family, lambda rng: offers.pop(0))
    assert training_problem(random.Random(0), [family]) == RUNNING and offers == []


def test_gsm8k_without_redrawing_is_guarded_too():
    rng, test = random.Random(0), {program(g).question for g in gsm8k_graphs("test")} & held_out()
    drawn = {training_problem(rng, ["gsm8k"], split="test", redraw=False).question for _ in range(600)}
    assert test and not drawn & test
    assert gsm8k(random.Random(1), "test", redraw=False).question in {program(g).question for g in gsm8k_graphs("test")}


def test_the_development_files_can_be_made_again(tmp_path):
    write_heldout(tmp_path)
    for family in FAMILIES:
        assert (tmp_path / "schoolbook" / f"{family}.jsonl").read_bytes() == (data_dir() / "schoolbook" / f"{family}.jsonl").read_bytes()


def test_mixtures():
    "Small problems at first, then full ones; `decisions` are short and of every family. Both follow their generator."
    def steps(step): return [len(mixture(random.Random(seed), step).steps) for seed in range(150)]
    assert sum(steps(0)) < .8 * sum(steps(10 ** 6)) and steps(0) == steps(0)
    for sampler in (mixture, decisions):
        assert {sampler(random.Random(seed), 10 ** 6).family for seed in range(80)} == {*FAMILIES}
        assert sampler(random.Random(3), 5) == sampler(random.Random(3), 5)


def test_levels_of_rounds():
    p = product_of([2, 3, 4, 5, 6])
    assert [[s.name for s in level] for level in levels(p.steps)] == [["a", "b"], [">b"], ["c"], [">c"], ["d"]]
    assert [s.text for s in p.steps if s.name.startswith(">")] == [">a*b*6;", ">c*6;"] and p.answer == "720"
    assert [s.text for s in bracketed("((12+3)*(10-4))").steps if not s.outline] == [">(a*b);"]
    assert not any(isinstance(n, Fork) and len(n.outlines) != 2 for n in WheneverReady().arrange(p))


def test_marks_are_the_tokenizers():
    assert room.running_total("a", {"a": 9}) == f"a{COLUMNS[0]}99" and CARRIED[5] == "⑤"
