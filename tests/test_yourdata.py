"Rows of one's own: every broken rule has its line, and good rows are not lost."
import graphlib
import json
import random
from dataclasses import replace

import pytest

from threadweaver_ref.course import random_problem
from threadweaver_ref.domains import Problem, Sequential, Step, WheneverReady, draw_split, split_of
from threadweaver_ref.format import render
from threadweaver_ref.yourdata import LONGEST_LINE, Row, _circle, problem_of, read_yours, row_faults, write_yours

STEPS = [{"name": "A", "needs": [], "outline": "A", "work": "A: 1l 2a; ", "result": "A is al. "}, {"name": "B", "needs": ["A"], "work": "B is AL. "}]
ROW = {"question": "A: la backwards. B: A in capitals. Say B.", "answer": "AL", "steps": STEPS}
FORKED = "<Parallel><Outlines><Outline>1:a</Outline><Outline>2:b</Outline></Outlines><Thread>1:x</Thread><Thread>2:y</Thread></Parallel>\\boxed{AL}"


def step(name, *needs, **more): return {"name": name, "needs": list(needs), "work": ".", **more}


def steps(*some): return {**ROW, "steps": list(some)}


def line(data): return json.dumps(data).encode()


BAD = {   # a line of a file -> what is said of it
    b'{"question": "?"}': "no answer",
    b'{"answer": "b"}': "no question",
    line({**ROW, "answer": ""}): "answer is empty",
    line({**ROW, "question": " \t"}): "question is empty",
    line({**ROW, "answer": 1.5}): "answer must be a string or an integer, not 1.5",
    line({**ROW, "answer": True}): "answer must be a string or an integer, not True",
    line({**ROW, "question": ["?"]}): "question must be a string, not ['?']",
    line({**ROW, "steps": "A"}): "steps must be a list, not 'A'",
    line({**ROW, "anwser": "b"}): "unknown key 'anwser': choose one of question, answer, steps, opening, closing, text, family, domain",
    line(steps({**STEPS[0], "need": ["B"]})): "step 1: unknown key 'need': choose one of name, needs, outline, work, result",
    line(steps({"name": "A"})): "step 1: no work",
    line(steps(7)): "step 1 must be an object, not 7",
    line(steps(step("A"), step("B", 7))): "step 2: needs must be names of steps, not 7",
    line(steps({**step("A"), "needs": "B"})): "step 1: needs must be a list, not 'B'",
    line(steps(step("A"), step("B", "C"))): "step 'B' needs 'C', which is no step",
    line(steps(step("A", "B"), step("B", "A"))): "steps need each other in a circle: A needs B needs A",
    line(steps(step("A", "A"))): "steps need each other in a circle: A needs A",
    line(steps(step("A", "B"), step("B"))): "step 'A' needs 'B', which comes later: write 'B' first",
    line(steps(step("A"), step("A"))): "2 steps are called 'A'",
    line(steps({**step("A"), "work": ""})): "step 'A' has neither work nor result",
    line({**ROW, "steps": []}): "steps is empty: leave it out",
    line({**ROW, "text": "\\boxed{AL}"}): "steps and text: give one of them",
    line({"question": "?", "answer": "AL", "opening": "Well. "}): "opening without steps",
    line({**ROW, "question": "Say <Thread>."}): "question holds the control token <Thread>: only text may",
    line({**ROW, "answer": "<Parallel>"}): "answer holds the control token <Parallel>: only text may",
    line(steps({**step("A"), "work": "</Outline>"})): "work of step 'A' holds the control token </Outline>: only text may",
    line({**ROW, "closing": "</Conclusion>\\boxed{AL}"}): "closing holds the control token </Conclusion>: only text may",
    line({**ROW, "question": "Say \ud800."}): "question holds half a surrogate pair, which is no text",
    line({**ROW, "closing": "So AL."}): "closing has no \\boxed{answer}",
    line({**ROW, "closing": "\\boxed{al}"}): "closing boxes 'al', but the answer is 'AL'",
    line({"question": "?", "answer": "AL", "text": "So AL."}): "text has no \\boxed{answer}",
    line({"question": "?", "answer": "AL", "text": FORKED.replace("<Thread>2:y</Thread>", "")}): "text: thread_count at character",
    line({**ROW, "answer": " AL"}): "answer ' AL' cannot stand in a box: no white space around it, braces in pairs",
    line({**ROW, "answer": "A}L"}): "answer 'A}L' cannot stand in a box",
    b"[1, 2]": "a row must be an object, not [1, 2]",
    b'"text"': "a row must be an object, not 'text'",
    b"{'question': 1}": "not JSON: Expecting property name enclosed in double quotes (character 2)",
    b'{"question": "?", "answer": "b"': "not JSON: Expecting ',' delimiter",
    b'{"question": "?", "answer": "b"} {}': "not JSON: Extra data",
    b'{"question": "?", "answer": "b", "answer": "c"}': "the key 'answer' stands 2 times",
    '{"question": "Schön?", "answer": "b"}'.encode("latin-1"): "these bytes are not UTF-8",
    b"[" * 100_000: "not JSON: nested too deep",
    b'{"question": "?", "answer": "' + b"x" * 10_000_000 + b'"}': "longer than 1,000,000 bytes",
    b'{"question": "?", "answer": ' + b"9" * 5000 + b"}": "",   # an integer that Python will not read
}


@pytest.mark.parametrize("bad", BAD, ids=lambda b: str(b[:60]))
def test_a_bad_row_gets_one_clear_line_and_costs_no_good_one(bad, tmp_path):
    path = tmp_path / "yours.jsonl"
    path.write_bytes(line(ROW) + b"\n" + bad + b"\n" + line({"question": "Say b.", "answer": "b"}) + b"\n")
    found = read_yours(path)
    assert [r.line for r in found.rows] == [1, 3] and [f.line for f in found.faults] == [2] and not found.notes
    said = str(found.faults[0])
    assert said.startswith("line 2: " + BAD[bad]) and len(said.splitlines()) == 1 and len(said) < 200


def test_every_broken_rule_of_a_row_is_said():
    bad = {"question": "<Thread>", "answer": "b", "steps": [step("A", "X"), step("A", "A")]}
    assert len(row_faults(bad)) == 4 and row_faults(ROW) == []
    assert row_faults({"qestion": "?"}) == ["unknown key 'qestion': choose one of question, answer, steps, opening, closing, text, family, domain",
                                           "no question", "no answer"]


def test_lines_of_windows_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path):
    path = tmp_path / "yours.jsonl"
    b, c = line({"question": "Say b.", "answer": "b"}), line({"question": "c", "answer": 3})
    path.write_bytes(b"\xef\xbb\xbf" + line(ROW) + b"\n\n" + b + b"\r\n \r\n" + c)
    found = read_yours(path)
    assert [r.line for r in found.rows] == [1, 3, 5] and not found.faults and [r.problem.answer for r in found.rows] == ["AL", "b", "3"]
    assert found.notes == ["Windows line ends, which do no harm, from line 3 on"]


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_said_once(codec, tmp_path):
    mark = "" if codec == "utf-16" else "\ufeff"
    (tmp_path / "yours.jsonl").write_bytes((mark + '{"question": "?", "answer": "b"}\r\n' * 3).encode(codec))
    with pytest.raises(ValueError, match="yours.jsonl is UTF-16: save it as UTF-8$"): read_yours(tmp_path / "yours.jsonl")


def test_a_domain_that_nobody_registered_is_noted_once(tmp_path):
    names = ["", "yours", "words", "porgrams", "porgrams", "x"]
    rows = [{"question": f"{i}?", "answer": "b", **({"domain": d} if d else {})} for i, d in enumerate(names)]
    (tmp_path / "yours.jsonl").write_bytes(b"\n".join(map(line, rows)))
    found = read_yours(tmp_path / "yours.jsonl")
    assert len(found.rows) == 6 and found.notes == ["domain 'porgrams' is not registered, so answers are compared as text, from line 4 on",
                                                    "domain 'x' is not registered, so answers are compared as text, from line 6 on"]


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_an_empty_file(content, tmp_path):
    (tmp_path / "yours.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="is empty: a row is one JSON object a line"): read_yours(tmp_path / "yours.jsonl")
    with pytest.raises(OSError): read_yours(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize("extra, good", [(0, 2), (1, 1), (2, 1), (3, 1)])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_the_longest_line(extra, good, end, tmp_path):
    row = b'{"question": "?", "answer": "' + b"x" * (LONGEST_LINE - 31 + extra) + b'"}'
    assert len(row) == LONGEST_LINE + extra
    for tail in (end, b""):
        (tmp_path / "yours.jsonl").write_bytes(line(ROW) + end + row + tail)
        assert len(read_yours(tmp_path / "yours.jsonl").rows) == good


def test_a_question_may_come_twice_but_not_with_two_answers(tmp_path):
    rows = [ROW, ROW, {**ROW, "answer": "al"}, {"question": ROW["question"], "answer": "AL", "text": FORKED}]
    (tmp_path / "yours.jsonl").write_bytes(b"\n".join(map(line, rows)))
    found = read_yours(tmp_path / "yours.jsonl")
    assert [(r.line, r.kind) for r in found.rows] == [(1, "steps"), (4, "text")]
    assert [*map(str, found.faults)] == ["line 2: the same row as line 1", "line 3: the question of line 1 with another answer"]


def test_what_is_made_of_a_row():
    p = problem_of(ROW)
    assert p == Problem(ROW["question"], "AL", "yours", [Step("A", (), "A", "A: 1l 2a; ", "A is al. "), Step("B", ("A",), "", "B is AL. ")],
                        closing=" \\boxed{AL}")
    assert render(Sequential().arrange(p)) == "A: 1l 2a; A is al. B is AL.  \\boxed{AL}"
    assert problem_of({**ROW, "opening": "Well. ", "closing": "So \\boxed{AL}", "family": "f", "domain": "programs"}).opening == "Well. "
    assert row_faults({**ROW, "domain": "programs", "closing": "\\boxed{al}"})   # the domain's grader is asked, and says no
    assert not row_faults({"question": "?", "answer": 1200, "text": "\\boxed{1,200}"})


def test_a_row_belongs_to_the_split_of_its_domain():
    "Or a policy would be trained on what `evaluate --domain gsm8k --split test` asks."
    asked, held = draw_split("gsm8k", "test", 40), draw_split("words", "test", 5, "new wide")
    assert {Row(1, p).split for p in asked + held} == {"test"}
    assert len({Row(1, replace(p, domain=d)).split for p in asked for d in ("yours", "nobody's")}) > 1
    assert Row(1, Problem("Told nowhere?", "1", "words")).split == split_of("Told nowhere?")   # words cannot say


def test_written_rows_are_read_again(tmp_path):
    drawn = [random_problem(random.Random(seed)) for seed in range(30)]
    problems = [Problem(f"? {i}", "0", "yours", p.steps, p.opening, p.closing, "f" * (i % 2)) for i, p in enumerate(drawn)]
    write_yours(tmp_path / "yours.jsonl", problems)
    found = read_yours(tmp_path / "yours.jsonl")
    assert [r.problem for r in found.rows] == problems and not found.faults and b"\r" not in (tmp_path / "yours.jsonl").read_bytes()
    rows = [{"question": "é?", "answer": "AL", "text": FORKED, "family": "f", "domain": "d"}, ROW]
    write_yours(tmp_path / "rows.jsonl", rows)
    again = read_yours(tmp_path / "rows.jsonl").rows
    assert again[0].data == rows[0] and problem_of(again[1].data) == problem_of(ROW) and {r.split for r in again} <= {"train", "dev", "test"}
    with pytest.raises(ValueError, match="^row 2: no answer$"): write_yours(tmp_path / "rows.jsonl", [ROW, {"question": "?"}])
    assert render(WheneverReady().arrange(problems[0])) == render(WheneverReady().arrange(found.rows[0].problem))


def test_circles_as_the_standard_library_finds_them():
    rng, seen = random.Random(0), {True: 0, False: 0}
    for _ in range(500):
        names = [*"abcdef"[:rng.randint(1, 6)]]
        needs = {n: rng.sample(names, rng.choice([0, 0, 1, 1, 2]) % (len(names) + 1)) for n in names}
        try: graphlib.TopologicalSorter(needs).prepare()
        except graphlib.CycleError: circular = True
        else: circular = False
        seen[circular] += 1
        found = _circle(needs)
        assert bool(found) == circular
        if found: assert found[0] == found[-1] and len({*found}) == len(found) - 1 and all(b in needs[a] for a, b in zip(found, found[1:]))
    assert min(seen.values()) > 50
