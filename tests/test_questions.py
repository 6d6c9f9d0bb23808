"GSM8K's own questions: steps against the annotations read in another way, splits, answers as people write them."
import gzip
import json
import random
import re
from pathlib import Path

import pytest

from threadweaver_ref.domains import (Problem, RandomForks, Sequential, WheneverReady, domain_names, draw_split, find_domain, get_domain, grade,
                                      training_problem)
from threadweaver_ref.format import check_format, render
from threadweaver_ref.questions import gsm8k_problems, gsm8k_split, line_groups, same_number, solution_steps

FOLDER = Path(__file__).parent.parent / "data/gsm8k"
RAW = {s: [json.loads(line) for line in gzip.open(FOLDER / f"{s}.jsonl.gz", "rt", encoding="utf-8")] for s in ("train", "test")}


def numbers(text): return [float(n.replace(",", "")) for n in re.findall(r"[0-9][0-9,]*\.?[0-9]*|\.[0-9]+", text)]


def test_all_of_gsm8k_is_there():
    assert {s: len(rows) for s, rows in RAW.items()} == {"train": 7473, "test": 1319}
    for s, rows in RAW.items():
        found = gsm8k_problems(s)
        assert [*found] == [row["question"] for row in rows]
        assert all(re.fullmatch(r"-?[0-9]+", p.answer) and p.answer in row["answer"].replace(",", "") for p, row in zip(found.values(), rows))


def test_steps_by_hand():
    a, b, c, d = solution_steps("Ann has 3*4 = <<3*4=12>>12 pens\nNow Bob.\nHe has\t<<5*7=35>>35.\nShe gives  12/2=<<12/2=6>>6 away.\n"
                                "They have 35+6 = $<<35+6=41>>41!\nSo 41.\n#### 41")
    assert (a.text, a.needs, a.outline) == (" Ann has 3*4 = 12 pens.", (), "Ann has 3*4") and (b.text, b.needs) == (" Now Bob. He has 35.", ())
    assert (c.needs, d.needs) == (("s1",), ("s2", "s3")) and d.text == " They have 35+6 = $41! So 41." and c.outline == "She gives 12/2"
    assert solution_steps("It is 1,200 = <<3*400=1200>>1,200.\nHalf: <<1200/2=600>>600.\n#### 600")[1].needs == ("s1",)
    first, second, third = solution_steps("<<2+2=4>>4.\n<<1+3=4>>4.\n<<4*5=20>>20.\n#### 20")
    assert third.needs == ("s2",)   # the last that made it
    assert line_groups("So.\n#### 3") == ["So."] and line_groups("#### 3") == []


@pytest.mark.parametrize("split", RAW)
def test_every_number_that_was_calculated_can_be_seen(split):
    "Of every annotation: what it calculates with was not made before, or by a step that this one needs (or its own)."
    for row in RAW[split]:
        steps, made = solution_steps(row["answer"]), {}
        if "<<" not in row["answer"]: continue
        for step, said in zip(steps, line_groups(row["answer"]), strict=True):
            own = set()
            for expression, result in re.findall(r"<<([^<>=]*)=([^<>]*)>>", said):
                for n in numbers(expression): assert n in own or n not in made or f"s{made[n]}" in step.needs, (said, step)
                own |= {*numbers(result)}
            made |= {n: int(step.name[1:]) for n in own}
            assert all(int(n[1:]) < int(step.name[1:]) for n in step.needs)


def test_without_annotations_the_steps_are_the_solution():
    for row in RAW["train"]:
        lines = [" ".join(re.sub(r"<<.*?>>", "", line).split()) for line in row["answer"].split("\n")[:-1] if line.strip()]
        found = "".join(s.text for s in solution_steps(row["answer"])).strip()
        assert re.sub(r"[\s.]", "", found) == re.sub(r"[\s.]", "", "".join(lines))


def test_outlines_do_not_give_the_result_away():
    "No outline holds a number that only the step's own calculation makes."
    for p, row in zip(gsm8k_problems("train").values(), RAW["train"]):
        for step, said in zip(p.steps, line_groups(row["answer"])):
            before = {*numbers(said.split("<<")[0])}
            assert {*numbers(step.outline)} <= before and len(step.outline) <= 40


def test_splits():
    found = {split: {p.question for p in draw_split("gsm8k", split, n)} for split, n in (("train", 7000), ("dev", 440), ("test", 1319))}
    assert not found["train"] & found["dev"] and not (found["train"] | found["dev"]) & found["test"] and found["test"] == {*gsm8k_problems("test")}
    assert all(gsm8k_split(q) == split for split, questions in found.items() for q in questions)
    drawn = [training_problem(random.Random(i), name="gsm8k") for i in range(200)] + [get_domain("gsm8k")(random.Random(i)) for i in range(200)]
    assert {gsm8k_split(p.question) for p in drawn} == {"train"} and all(p.steps for p in drawn) and len({p.question for p in drawn}) > 150
    with pytest.raises(ValueError, match="gsm8k has 1,319 questions in its test split, not 1,320"): draw_split("gsm8k", "test", 1320)
    assert "gsm8k" in domain_names() and find_domain("gsm8k").grader is same_number


def test_every_arrangement_is_well_formed_and_right():
    for i, p in enumerate(draw_split("gsm8k", "dev", 150)):
        for how in (Sequential(), WheneverReady(), RandomForks(.7, whole=.5, longest=.3)) if p.steps else ():
            text = render(how.arrange(p, random.Random(i)))
            assert check_format(text) == [] and grade(text, p) and text.endswith(p.closing)


@pytest.mark.parametrize("said, right", [("1200", True), ("1,200", True), ("$1,200.00", True), ("1200.", True), ("1201", False),
                                         ("12 00 or so", False), ("", False), ("1,2,0,0", False), ("12 00", False), ("12$00", False),
                                         ("1_200", False), ("$ 1,200", True), ("1200%", True), ("-1200", False), ("1,2000", False), (".", False)])
def test_answers_as_people_write_them(said, right):
    assert same_number(said, Problem("?", "1200", "gsm8k")) == right == grade(f"It is \\boxed{{{said}}}", Problem("?", "1200", "gsm8k"))
