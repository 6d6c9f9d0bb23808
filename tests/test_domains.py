"Steps, arrangements, the best flat schedule against brute force, domains, files."
import hashlib
import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path

import pytest

from threadweaver_ref import domains
from threadweaver_ref.course import QUESTION, example, random_problem
from threadweaver_ref.domains import (
    BestFlat,
    Grouped,
    Problem,
    RandomForks,
    Sequential,
    Step,
    WheneverReady,
    allowed,
    best_flat,
    char_length,
    data_dir,
    domain,
    domain_names,
    draw_split,
    extract_answer,
    families_of,
    find_domain,
    get_domain,
    grade,
    levels,
    read_jsonl,
    read_rows,
    split_of,
    split_problems,
    training_problem,
    write_jsonl,
    write_rows,
)
from threadweaver_ref.format import CONTROL_TOKENS, Fork, Text, Thread, check_format, parse, render, token_counts
from threadweaver_ref.schedule import stage_cost
from threadweaver_ref.steps import flat, ready_steps, stage
from threadweaver_ref.tokenizer import char_tokenizer

TOKENIZER = char_tokenizer()
A = Step("a", (), "a=7+3x4", "a=7+3x4: 4)7+3=0 3)0+3=3 2)3+3=6 1)6+3=9 ", "a9;")
B = Step("b", (), "b=2+5x3", "b=2+5x3: 3)2+5=7 2)7+5=2 1)2+5=7 ", "b7;")
C = Step("c", ("a", "b"), "c=a+b", "c=9+7=", "6;")
RUNNING = Problem(QUESTION, 6, "example", (A, B, C), closing=r"\boxed{6}")
ARRANGEMENTS = [Sequential(), WheneverReady(), BestFlat(), RandomForks(.5), Grouped(), RandomForks(.8, whole=.5)]


def problems(n, seed=0, most=7): return [random_problem(random.Random(f"{seed} {i}"), 1 + i % most) for i in range(n)]


def names(how): return type(how).__name__


def latency(nodes): return token_counts(nodes, char_length)[0]


# ---- steps and problems

def one(**parts): return Problem(**{"question": "?", "answer": 1, "domain": "d", "closing": r"\boxed{1}", **parts})


@pytest.mark.parametrize("make, message", [
    (lambda: Step("a", "b", "", ""), "needs of step 'a' must be a tuple of names, not 'b'"),
    (lambda: Step("a", (), None, ""), "outline of step 'a' must be a string, not None"),
    (lambda: Step("a", (), "", 3), "work of step 'a' must be a string, not 3"),
    (lambda: Step("a", (), "", "x</Thread>"), "work of step 'a' must not hold the control token </Thread>"),
    (lambda: one(steps=[Step("a", ("b",), "", ""), Step("b", (), "", "")]), "step 'a' needs 'b', which is no earlier step"),
    (lambda: one(steps=[Step("a", ("a",), "", "")]), "step 'a' needs 'a'"),
    (lambda: one(steps=[A, A]), "two steps are called 'a'"),
    (lambda: one(steps=[A], closing="1"), "closing has no"),
    (lambda: one(closing="<Parallel>"), "closing must not hold the control token <Parallel>"),
    (lambda: one(answer=1.5), "answer must be a string, not 1.5"),
    (lambda: one(question=None), "question must be a string, not None"),
    (lambda: RandomForks(1.5), "p must be a probability from 0 to 1, not 1.5"),
    (lambda: RandomForks(whole=-.1), "whole must be a probability from 0 to 1, not -0.1"),
    (lambda: Sequential().arrange(one()), "the problem '?' has no steps to arrange"),
    (lambda: best_flat(one()), "the problem '?' has no steps to arrange"),
    (lambda: get_domain("algebra"), "unknown domain 'algebra': choose one of programs, loops, schoolbook, words"),
    (lambda: families_of("algebra"), "unknown domain 'algebra': choose one of "),
    (lambda: split_problems("algebra", "dev", 1), "unknown domain 'algebra': choose one of "),
    (lambda: training_problem(random.Random(0), name="algebra"), "unknown domain 'algebra': choose one of "),
    (lambda: draw_split("programs", "dev", 1, "tall"), "unknown family 'tall': choose one of wide, quick, chain, mixed, nested"),
    (lambda: draw_split("programs", "heldout", 1), "unknown split 'heldout': choose train, dev or test"),
    (lambda: draw_split("schoolbook", "heldout", 1), "unknown split 'heldout': choose train, dev or test"),
    (lambda: draw_split("schoolbook", "test", 1), "schoolbook keeps no test problems: choose dev"),
], ids=range(23))
def test_bad_input_gets_one_clear_line(make, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused: make()
    assert "\n" not in str(refused.value)


def test_a_problem_keeps_its_parts_as_text():
    p = one(answer=12, steps=[Step("a", ["x"][:0], "", "w", "r")])
    assert p.answer == "12" and p.steps[0].needs == () and p.steps[0].text == "wr" and p.family == ""
    assert hash(p) == hash(replace(p)) and Problem("?", 7, "mine").steps == ()


def test_levels_and_ready_steps():
    assert levels(RUNNING.steps) == [[A, B], [C]] and levels([]) == []
    for p in problems(60):
        done = set()
        for level in levels(p.steps):   # a level is exactly what is ready when all levels before it are done
            assert ready_steps(p.steps, done) == level
            done |= {s.name for s in level}
        assert done == {s.name for s in p.steps}


# ---- arrangements

def test_the_running_example():
    assert Sequential().arrange(RUNNING) == example(fork=False)
    for conclude in (False, True): assert WheneverReady(conclude).arrange(RUNNING) == Grouped(conclude).arrange(RUNNING) == example(conclude=conclude)
    assert stage([C]) == Text("c=9+7=6;") and stage([A, B], True).threads[1] == Thread([Text(B.work)], "b7;")


def written(nodes, done, found):
    "Walk a trajectory whose step texts are `x:...x;`: each step once, and only where all that it needs can be seen. Returns what is done."
    for node in nodes:
        if isinstance(node, Fork): done = done.union(*(written([*t.body, Text(t.conclusion or "")], done, found) for t in node.threads))
        else:
            for name in re.findall("([a-j]):", node.text):
                assert done.issuperset(found[name].needs) and name not in done
                done = done | {name}
    return done


@pytest.mark.parametrize("how", ARRANGEMENTS, ids=names)
@pytest.mark.parametrize("conclude", [False, True])
def test_every_arrangement_is_correct(how, conclude):
    how = replace(how, conclude=conclude)
    for i, p in enumerate(problems(150, most=8)):
        nodes = how.arrange(p, random.Random(i))
        text = render(nodes)
        assert check_format(text) == [] and parse(text) == nodes
        assert text.startswith(p.opening) and text.endswith(p.closing) and grade(text, p)
        assert written(nodes, frozenset(), {s.name: s for s in p.steps}) == {s.name for s in p.steps}
        whole = re.sub("<Conclusion>|</Conclusion>", "", text)
        assert all(whole.count(s.text) == 1 for s in p.steps)
        assert ("<Conclusion>" in text) == (conclude and "<Parallel>" in text)


def forks(nodes):
    for node in nodes:
        if isinstance(node, Fork):
            yield node
            for t in node.threads: yield from forks(t.body)


@pytest.mark.parametrize("how", ARRANGEMENTS, ids=names)
def test_no_text_is_empty_and_none_are_neighbours(how):
    for i, p in enumerate(problems(80)):
        bodies = [how.arrange(p, random.Random(i))]
        bodies += [t.body for f in forks(bodies[0]) for t in f.threads]
        for nodes in bodies:
            kinds = [isinstance(n, Text) for n in nodes]
            assert not any(a and b for a, b in zip(kinds, kinds[1:], strict=False)) and Text("") not in nodes


@pytest.mark.parametrize("how", ARRANGEMENTS, ids=names)
def test_a_step_without_an_outline_is_never_forked(how):
    for i, p in enumerate(problems(80, seed=1)):
        outlines = [o for f in forks(how.arrange(p, random.Random(i))) for o in f.outlines]
        assert "" not in outlines and all(len(f.outlines) > 1 for f in forks(how.arrange(p, random.Random(i))))


def test_whenever_ready_forks_every_level():
    for p in problems(80, seed=2):
        wide = [[s.outline for s in level if s.outline] for level in levels(p.steps)]
        assert [f.outlines for f in forks(WheneverReady().arrange(p))] == [w for w in wide if len(w) > 1]
    plain = Step("p", (), "", "p:", ";")
    assert WheneverReady().arrange(one(steps=(plain, A, B)))[1] == Text(r"p:;\boxed{1}")   # steps without an outline come behind the fork


def test_sequential_keeps_the_order():
    for p in problems(40):
        line = [Text(p.opening + "".join(s.text for s in p.steps) + p.closing)]
        assert Sequential().arrange(p) == line == RandomForks(0).arrange(p)


def test_random_forks_vary_and_follow_their_generator():
    wide = one(steps=[replace(A, name=n, outline=n) for n in "abcde"])
    drawn = [RandomForks(.5).arrange(wide, random.Random(seed)) for seed in range(60)]
    assert drawn == [RandomForks(.5).arrange(wide, random.Random(seed)) for seed in range(60)]
    sizes = {tuple(len(f.outlines) for f in forks(nodes)) for nodes in drawn}
    assert {(), (5,)} <= sizes and any(len(s) == 2 for s in sizes)
    assert all([*forks(RandomForks(1).arrange(wide, random.Random(seed)))] for seed in range(20))
    assert RandomForks(.5).arrange(wide) == RandomForks(.5).arrange(wide, random.Random(0))


def test_a_share_of_the_forks_take_all_that_is_ready():
    "Of five that are ready: a part is 2 to 5 of them, all widths alike; with `whole` it is all five so much more often."
    wide = one(steps=[replace(A, name=n, outline=n) for n in "abcde"])
    def first(whole): return [len(next(forks(RandomForks(1, whole).arrange(wide, random.Random(seed)))).outlines) for seed in range(600)]
    for whole in (0, .4, .9): assert first(whole).count(5) / 600 == pytest.approx(whole + (1 - whole) / 4, abs=.06)   # widths 2 to 5
    assert set(first(1)) == {5} and set(first(0)) == {2, 3, 4, 5}
    plain = Step("p", (), "", "p:", ";")
    beside = one(steps=(plain, A, B))
    for seed in range(20): assert next(forks(RandomForks(1, 1).arrange(beside, random.Random(seed)))).outlines == ["a=7+3x4", "b=2+5x3"]
    for seed in range(20):   # without `whole` no draw is spent on it: one for the fork, then width and threads
        rng = random.Random(seed)
        rng.random()
        drawn = sorted(rng.sample("abcde", rng.randint(2, 5)))
        assert next(forks(RandomForks(1).arrange(wide, random.Random(seed)))).outlines == drawn


def test_grouped_forks_within_forks():
    d, e = replace(A, name="d", outline="d"), replace(B, name="e", outline="e")
    f, g = Step("f", ("d", "e"), "f=d+e", "f:", ";"), Step("g", ("c", "f"), "", "g:", ";")
    nodes = Grouped().arrange(one(steps=(A, B, C, d, e, f, g)))
    assert [x.outlines for x in forks(nodes)] == [["c=a+b", "f=d+e"], ["a=7+3x4", "b=2+5x3"], ["d", "e"]]
    assert nodes[1:] == [Text(r"g:;\boxed{1}")] and nodes[0].threads[0].body[1] == Text(C.text)
    assert Grouped(True).arrange(one(steps=(A, B, C, d, e, f, g)))[0].threads[0].conclusion == "6;"


def test_a_group_hides_nothing_that_is_read_later():
    "`g` reads `a` too, so `a` must not be inside a group that hands back `c` alone."
    d = Step("d", (), "d", "d:", ";")
    g = Step("g", ("a", "c", "d"), "", "g:", ";")
    nodes = Grouped().arrange(one(steps=(A, replace(C, needs=("a",)), d, g)))
    assert [f.outlines for f in forks(nodes)] == [["a=7+3x4", "d"]]


def test_grouped_is_whenever_ready_where_there_are_no_groups():
    for n in range(2, 6):
        steps = [replace(A, name=str(i), outline=str(i)) for i in range(n)]
        p = one(steps=[*steps, Step("sum", tuple(s.name for s in steps), "", "+", ";")])
        assert Grouped().arrange(p) == WheneverReady().arrange(p)


# ---- the best flat schedule

def test_char_length_is_the_char_tokenizers_length():
    for p in problems(30):
        for how in ARRANGEMENTS:
            text = render(how.arrange(p))
            assert char_length(text) == len(TOKENIZER.encode(text))
    assert char_length("".join(CONTROL_TOKENS)) == len(CONTROL_TOKENS) and char_length("") == 0


def path(text):
    "Token latency of a text whose forks are not nested, read off the text itself."
    tokens, total = lambda t: len(TOKENIZER.encode(t)), 1
    for part in re.split("(<Parallel>.*?</Parallel>)", text):
        threads = re.findall("<Thread>.*?</Thread>", part)
        total += tokens(part) - sum(map(tokens, threads)) + max(map(tokens, threads), default=0)
    return total


def stages_of(order):
    "Every way to cut a list into consecutive parts."
    for cuts in range(2 ** (len(order) - 1)):
        parts = [[order[0]]]
        for i, s in enumerate(order[1:]):
            if cuts >> i & 1: parts.append([s])
            else: parts[-1].append(s)
        yield parts


def brute_force(problem, conclude):
    "Every order of every partition into stages, measured as a whole text: nothing shared with the dynamic programme."
    least = float("inf")
    for order in permutations(problem.steps):
        for parts in stages_of(order):
            done = set()
            for part in parts:
                if any(not done.issuperset(s.needs) for s in part) or len(part) > 1 and any(not s.outline for s in part): break
                done |= {s.name for s in part}
            else:
                text = problem.opening
                for part in parts:
                    if len(part) == 1: text += part[0].text; continue
                    outlines = "".join(f"<Outline>{i}:{s.outline}</Outline>" for i, s in enumerate(part, 1))
                    ends = [f"<Conclusion>{s.result}</Conclusion>" if conclude else s.result for s in part]
                    threads = "".join(f"<Thread>{i}:{s.work}{end}</Thread>" for i, (s, end) in enumerate(zip(part, ends, strict=True), 1))
                    text += f"<Parallel><Outlines>{outlines}</Outlines>{threads}</Parallel>"
                least = min(least, path(text + problem.closing))
    return least


@pytest.mark.parametrize("conclude", [False, True])
def test_best_flat_against_brute_force(conclude):
    pays = 0
    for p in problems(60, seed=4, most=4) + problems(8, seed=5, most=5)[4::5]:
        best = best_flat(p, char_length, conclude)
        assert best.best == brute_force(p, conclude) and best.sequential == path(render(Sequential().arrange(p)))
        assert best.pays == (best.speedup > 1) == (best.best < best.sequential)
        pays += best.pays
    assert 8 < pays < 55   # both kinds occur


def words(text): return len(re.findall(r"<[^<>]*>|\w+|[^\w\s]", text))


@pytest.mark.parametrize("length", [char_length, words], ids=["chars", "words"])
@pytest.mark.parametrize("how", ARRANGEMENTS[:4], ids=names)
def test_no_flat_arrangement_beats_it(how, length):
    for i, p in enumerate(problems(60, seed=6, most=9)):
        if how == BestFlat(): how = BestFlat(length)
        reached = token_counts(how.arrange(p, random.Random(i)), length)[0]
        assert reached >= best_flat(p, length).best and (how != BestFlat(length) or reached == best_flat(p, length).best)


def every_schedule(steps, length, done=frozenset()):
    "All subsets of what is ready, by recursion."
    ready = ready_steps(steps, done)
    able = [s for s in ready if s.outline]
    tried = [[s] for s in ready] + [[*S] for k in range(2, len(able) + 1) for S in combinations(able, k)]
    return min((stage_cost(S, length) + every_schedule(steps, length, done | {s.name for s in S}) for S in tried), default=0)


def test_best_flat_with_other_lengths():
    lengths = [char_length, lambda text: 3 * char_length(text), lambda text: text.count("<") + text.count(".") + text.count("a")]
    for length in lengths:
        for p in problems(40, seed=7, most=6):
            assert best_flat(p, length).best == every_schedule(p.steps, length) + length(p.opening) + length(p.closing) + 1


def test_the_stages_of_a_schedule_make_its_trajectory():
    for p in problems(40, seed=8):
        best = best_flat(p)
        assert latency(flat(p, best.stages)) == best.best and BestFlat().arrange(p) == flat(p, best.stages)
        assert sorted(s.name for S in best.stages for s in S) == [s.name for s in p.steps]
        if not best.pays: assert BestFlat().arrange(p) == Sequential().arrange(p)


def test_many_equal_steps_are_quick():
    wide = [Step(f"s{i}", (), f"{i}", "x" * (20 + i), ";") for i in range(40)]
    p = one(steps=[*wide, Step("sum", tuple(s.name for s in wide), "", "+", ";")])
    assert best_flat(p).best < latency(Sequential().arrange(p)) / 2


def test_the_running_example_saves_six():
    assert best_flat(RUNNING).sequential - best_flat(RUNNING).best == 6 and latency(example()) == best_flat(RUNNING).best == 92


# ---- grading

def test_grade_takes_the_last_box():
    p = replace(RUNNING, answer="56")
    assert grade(r"\boxed{1}\boxed{56}", p) and not grade(r"\boxed{56}\boxed{1}", p)
    assert not grade("56", p) and not grade("", p) and not grade(r"\boxed{7*8}", p)
    assert extract_answer(r"\boxed{5") is None and extract_answer(r"\boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert not grade(r"\boxed{56} no, \boxed{\frac{1}{2}}", p) and not grade(r"\boxed{56} wrong, \boxed{6", p)
    assert grade(r"\boxed{ 56 }", p) and grade(r"\boxed{1,200}", replace(p, answer=1200)) and grade(r"\boxed{1,200}", replace(p, answer="1,200"))


@pytest.mark.parametrize("said, answer, correct", [
    ("1,2", 12, False), ("1,20", 120, False), ("1,2000", 12000, False), ("1200,", 1200, False), (",200", 200, False), ("1,,200", 1200, False),
    ("1234,567", 1234567, False), ("12,345", 12345, True), ("1,234,567", 1234567, True), ("-1,200", -1200, True), ("1,234,56", 123456, False)])
def test_a_comma_parts_thousands_only(said, answer, correct):
    assert grade(f"\\boxed{{{said}}}", replace(RUNNING, answer=answer)) == correct


def test_a_user_registers_a_domain(monkeypatch):
    monkeypatch.setattr(domains, "DOMAINS", {})

    @domain
    def doubles(rng, n=3): return Problem(f"{n}?", 2 * n, "doubles")

    @domain(grader=lambda said, problem: said.lower() == problem.answer)
    def shouted(rng): return Problem("?", "yes", "shouted")
    assert get_domain("doubles") is doubles and get_domain("doubles")(None, n=4).answer == "8"
    assert grade(r"\boxed{YES}", shouted(None)) and not grade(r"\boxed{YES}", replace(shouted(None), domain="elsewhere"))
    assert not grade("YES", shouted(None)) and grade(r"\boxed{yes}", replace(shouted(None), domain="elsewhere"))
    with pytest.raises(ValueError, match="unknown domain 'x': choose one of programs, loops, schoolbook, words, gsm8k, doubles, sh"): get_domain("x")
    assert domain_names() == [*domains.SHIPPED, "doubles", "shouted"] and families_of("doubles") == ["doubles"]


# ---- shipped domains, families, splits

def test_shipped_domains_are_imported_when_they_are_asked_for():
    "In a fresh Python: naming them imports nothing, finding one imports its module, and no other."
    code = """
import sys
from threadweaver_ref.domains import *
from threadweaver_ref.domains import DOMAINS, SHIPPED
def there(): return [n for n, module in SHIPPED.items() if f"threadweaver_ref.{module}" in sys.modules]
assert domain_names() == ["programs", "loops", "schoolbook", "words", "gsm8k"] and not there() and not DOMAINS
assert grade(chr(92) + "boxed{1}", Problem("?", 1, "nobody's")) and not there()
assert families_of("programs")[0] == "wide" and there() == ["programs"]
assert find_domain("schoolbook").samplers.keys() == {"mixture", "decisions"} and there() == ["programs", "schoolbook"] == list(DOMAINS)
assert len(families_of("loops")) == 42 and len(families_of("words")) == 10 and there() == list(SHIPPED)[:4]
assert families_of("gsm8k") == ["gsm8k"] and there() == list(SHIPPED)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr


@pytest.fixture
def own(monkeypatch):
    "DOMAINS, emptied of nothing, and left as they were behind the test."
    monkeypatch.setattr(domains, "DOMAINS", {**domains.DOMAINS})


def test_what_is_registered_of_a_domain(own):
    def easy(rng, step): return Problem("1?", 1, "dice")
    @domain(families={"a": None}, samplers={"easy": easy}, split=lambda question: "dev")
    def dice(rng, family=None): return Problem(f"{family} {rng.randint(1, 9)}?", 1, "dice")
    found = find_domain("dice")
    assert (found.sampler, found.families, found.samplers, found.kept) == (dice, {"a": None}, {"easy": easy}, None)
    assert found.split("x") == "dev" and get_domain("dice") is dice and families_of("dice") == ["a"] and domain_names()[-1] == "dice"
    assert found.grader("1", Problem("?", 1, "dice"))
    with pytest.raises(ValueError, match="dice: 1000 questions in a row were of the dev and test splits"):
        training_problem(random.Random(0), name="dice")
    assert {p.question[:2] for p in draw_split("dice", "dev", 9)} == {"a "}
    with pytest.raises(ValueError, match="dice, a: only 9 different questions of the dev split were found, not 10"): draw_split("dice", "dev", 10)
    with pytest.raises(ValueError, match="only 0 different questions of the test split"): draw_split("dice", "test", 1)


@pytest.mark.parametrize("question, split", [
    ("a=7+3x4;b=2+5x3;c=a+b;c?", "train"), ("a=9-4x9;b=2+3x11;c=7-2x15;d=5-8x12;e=4+5x12;f=5-6x9;g=2+1x10;abcdefg?", "train"),
    ("a=2-9;b=a-1;c=b+9;d=c+8x7;d?", "dev"), ("a=9+1;b=a+1x7;c=b+b;d=9*3;e=5+1;f=d-9;g=1-7;h=e+6x5;i=6+a;j=4+6;k=e+7;l=2+6;m=7*b;cfghijklm?", "dev"),
    ("a=1+3x4;b=7-5x5;c=3-2x3;abc?", "test"), ("a=2+8x4;b=3*9;c=a+b;d=3*0;e=c-d;f=7+8;g=e+f;h=2+1;i=g-h;j=i+6x7;k=7*4;l=j+k;l?", "test")])
def test_the_split_of_a_question_never_changes(question, split): assert split_of(question) == split


def test_splits_by_the_digest():
    "14, 1 and 1 of 16."
    found = [split_of(f"{i}?") for i in range(4000)]
    assert [found.count(s) / 4000 for s in ("train", "dev", "test")] == pytest.approx([14 / 16, 1 / 16, 1 / 16], abs=.012)
    digits = {s: {hashlib.sha256(f"{i}?".encode()).hexdigest()[1] for i in range(4000) if found[i] == s} for s in ("test", "dev", "train")}
    assert digits == {"test": {"0"}, "dev": {"1"}, "train": set("23456789abcdef")}


def test_a_domain_without_families_is_drawn_and_split(own):
    @domain
    def coins(rng): return Problem(f"{rng.randint(0, 10 ** 6)}?", 1, "coins")
    found = {s: split_problems("coins", s, 12) for s in ("train", "dev", "test")}
    for s, problems in found.items():
        assert [*problems] == ["coins"] and len({p.question for p in problems["coins"]}) == 12
        assert all(split_of(p.question) == s for p in problems["coins"]) and split_problems("coins", s, 12) == problems
        assert draw_split("coins", s, 5) == problems["coins"][:5]   # more of them begin with the same ones
    assert {split_of(training_problem(random.Random(i), name="coins").question) for i in range(60)} == {"train"}


def test_training_problems_follow_families_and_options(own):
    @domain(families={"a": None, "b": None})
    def lots(rng, family=None, most=9): return Problem(f"{family}{rng.randint(0, most)}?", 1, "lots")
    def drawn(**options): return {training_problem(random.Random(i), name="lots", **options).question[:-1] for i in range(300)}
    kept = {f"{f}{i}" for f in "ab" for i in range(10) if split_of(f"{f}{i}?") == "train"}
    assert drawn() == kept and drawn(families=["b"]) == {q for q in kept if q[0] == "b"} and drawn(most=0) == kept & {"a0", "b0"}
    assert training_problem(random.Random(5)) == training_problem(random.Random(5), 77, "programs")


def test_schoolbook_keeps_its_development_problems():
    "Of a domain with kept problems nothing is drawn."
    from threadweaver_ref.schoolbook import heldout_problems
    assert split_problems("schoolbook", "dev", 2) == {f: heldout_problems(f, 2) for f in families_of("schoolbook")}
    split = find_domain("schoolbook").split
    assert split(heldout_problems("sums", 1)[0].question) == "dev" and split("1*2+3*4?") == "train"
    assert all(p.domain == "schoolbook" for p in [training_problem(random.Random(i), name="schoolbook") for i in range(5)])


def test_allowed_lists_a_dozen_at_most():
    assert allowed("abc") == "a, b, c" and allowed([]) == ""
    assert allowed(f"n{i}" for i in range(12)).count(",") == 11 and "more" not in allowed(f"n{i}" for i in range(12))
    assert allowed((f"n{i}" for i in range(40)), 3) == "n0, n1, 38 more"
    for most in range(2, 10): assert len(allowed("abcdefghij", most).split(", ")) <= most


# ---- files

def test_problems_come_back_from_a_file(tmp_path):
    ours = [RUNNING, *problems(20), Problem("Ⅰ, \u2028 and \"é\"?", "yes\nno", "mine", family="f")]
    write_jsonl(tmp_path / "made" / "p.jsonl", ours)
    assert read_jsonl(tmp_path / "made" / "p.jsonl") == ours
    first = json.loads((tmp_path / "made" / "p.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert "opening" not in first and "family" not in first and first["answer"] == "6"


@pytest.mark.parametrize("line, message", [
    ("{", "line 2: not JSON"), ("[1]", "problem 2: expected an object, not [1]"), ('{"question": "?", "answer": 1}', "problem 2: missing 1 required"),
    ('{"question": "?", "answer": 1, "domain": "d", "colour": 1}', "problem 2: got an unexpected keyword argument 'colour'"),
    ('{"question": "?", "answer": 1, "domain": "d", "steps": [{"name": "a"}]}', "problem 2: "),
    ('{"question": "?", "answer": [1], "domain": "d"}', "problem 2: answer must be a string"),
    ('{"question": "?", "answer": 1, "domain": "d", "steps": 5}', "problem 2: "),
])
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text('{"question": "?", "answer": 1, "domain": "d"}\n' + line + "\n")
    with pytest.raises(ValueError, match=re.escape(message)) as refused: read_jsonl(tmp_path / "p.jsonl")
    assert "\n" not in str(refused.value) and "p.jsonl" in str(refused.value)


def test_rows_and_blank_lines(tmp_path):
    write_rows(tmp_path / "r.jsonl", [{"a": 1}, [2]])
    assert (tmp_path / "r.jsonl").read_bytes() == b'{"a": 1}\n[2]\n'
    (tmp_path / "r.jsonl").write_text((tmp_path / "r.jsonl").read_text() + "\n\n")
    assert read_rows(tmp_path / "r.jsonl") == [{"a": 1}, [2]]
    with pytest.raises(FileNotFoundError): read_rows(tmp_path / "none.jsonl")


def test_a_file_that_cannot_be_written_again_stays_as_it_was(tmp_path, monkeypatch):
    write_rows(tmp_path / "r.jsonl", [{"a": 1}])
    write = Path.write_text
    def full(self, text, **options):
        write(self, text[:3], **options)
        raise OSError("no space left")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError): write_rows(tmp_path / "r.jsonl", [{"b": 2}])
    with pytest.raises(TypeError): write_rows(tmp_path / "r.jsonl", [{"b": 2}, object()])
    assert read_rows(tmp_path / "r.jsonl") == [{"a": 1}]
    write_rows(tmp_path / "r.jsonl", [{"b": 2}])
    assert [f.name for f in tmp_path.iterdir()] == ["r.jsonl"]


def test_the_data_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("THREADWEAVER_DATA", raising=False)
    package = tmp_path / "threadweaver_ref"
    package.mkdir()
    monkeypatch.setattr(domains.threadweaver_ref, "__file__", str(package / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="install the wheel, clone the repository, or set THREADWEAVER_DATA"): data_dir()
    (tmp_path / "data").mkdir()
    assert data_dir() == tmp_path / "data"          # a clone
    (package / "data").mkdir()
    assert data_dir() == package / "data"           # a wheel
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("THREADWEAVER_DATA", str(tmp_path / "mine"))
    assert data_dir() == tmp_path / "mine"
    monkeypatch.setenv("THREADWEAVER_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"): data_dir()
