"""Every exercise: its answer is correct, its stub is "not yet", a constant fails, and the check stands word for word in both notebooks."""
import ast
import copy
import json
import re
from pathlib import Path

import matplotlib
import pytest

from threadweaver_ref import course

NBS = Path(__file__).resolve().parent.parent / "nbs"
SOLUTIONS = sorted((NBS / "solutions").glob("[!_]*.ipynb"))
matplotlib.use("Agg")


def code_cells(path) -> list:
    "The code of a notebook, a text for each cell, without IPython's magics."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    return [re.sub(r"^(\s*)[!%].*$", r"\1pass", text, flags=re.MULTILINE) for text in code]


def check_statement(code):
    "The `check(attempt, reference, cases)` with which a cell ends, or None."
    body = ast.parse(code).body
    call = body[-1].value if body and isinstance(body[-1], ast.Expr) else None
    if isinstance(call, ast.Call) and ast.unparse(call.func) == "check" and len(call.args) == 3: return ast.get_source_segment(code, body[-1])


def exercises(path) -> list:
    "[(code of the cell, its check statement)] of a notebook."
    return [(code, said) for code in code_cells(path) if (said := check_statement(code))]


WITH_EXERCISES = [path for path in sorted(NBS.glob("[0-9]*.ipynb")) if exercises(path)]
ROOMS = [path for path in WITH_EXERCISES if (NBS / "solutions" / path.name).exists()]
rooms = pytest.mark.parametrize("room", ROOMS, ids=lambda p: p.stem)


@pytest.fixture
def checks(monkeypatch):
    "Every call of `check`: (attempt, reference, cases, what it returned). It is made all the same."
    calls, real = [], course.check
    def spy(attempt, reference, cases):
        calls.append((attempt, reference, cases, real(attempt, reference, cases)))
        return calls[-1][3]
    spy.__wrapped__ = real
    monkeypatch.setattr(course, "check", spy)
    monkeypatch.chdir(NBS)
    return calls


def run(code, names): exec(compile(code, "<cell>", "exec"), names)


def constant(value):
    "A function that always returns `value`."
    def constant(*args, **named): return copy.deepcopy(value)
    return constant


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
def test_answers_are_correct_and_no_constant_is(path, checks):
    names = {"__name__": "__main__"}
    for code in code_cells(path): run(code, names)
    assert checks and len(checks) == len(exercises(path))
    for attempt, reference, cases, correct in list(checks):
        assert correct is True, attempt.__name__
        assert len(cases) >= 3, f"{attempt.__name__}: too few cases"
        first = reference(*copy.deepcopy(cases[0]))
        assert not course.check.__wrapped__(constant(first), reference, cases), f"{attempt.__name__}: a constant passes"


@rooms
def test_the_check_of_an_exercise_is_that_of_its_answer(room):
    assert [said for _, said in exercises(room)] == [said for _, said in exercises(NBS / "solutions" / room.name)]


@rooms
def test_a_stub_is_not_yet(room, checks, capsys):
    names = {"__name__": "__main__"}
    run(code_cells(NBS / "solutions" / room.name)[0], names)   # the imports; a stub needs no more
    for code, _ in exercises(room):
        run(code, names)
        assert checks[-1][3] is None and capsys.readouterr().out.endswith("not yet\n")


def test_every_exercise_has_an_answer_and_the_other_way_round():
    asked, answered = {p.name for p in WITH_EXERCISES}, {p.name for p in SOLUTIONS}
    assert asked == answered


@pytest.mark.parametrize("code, said", [("check(f, g, [1])", "check(f, g, [1])"), ("x = 1\ncheck(f,\n      g, h)", "check(f,\n      g, h)"),
                                        ("check(f, g)", None), ("check(f, g, [1])\nx", None), ("assert not check(f, g, [1])", None), ("", None)])
def test_what_counts_as_an_exercise(code, said): assert check_statement(code) == said
