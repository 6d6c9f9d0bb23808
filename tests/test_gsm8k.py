"GSM8K's solutions as graphs: what they lead to, what is left out and why."
import json
import operator
import random

import pytest

from threadweaver_ref.domains import data_dir, grade, levels, read_rows
from threadweaver_ref.domains import Grouped, Sequential, WheneverReady
from threadweaver_ref.format import render
from threadweaver_ref.gsm8k import LeftOut, gsm8k_steps, write_gsm8k
from threadweaver_ref.operations import gsm8k_graphs
from threadweaver_ref.schoolbook import program

PYTHON = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@pytest.mark.parametrize("split", ["train", "test"])
def test_graphs_reach_gsm8ks_answers(split):
    rows = read_rows(data_dir() / "gsm8k_graphs" / f"{split}.jsonl")
    for row, graph in zip(rows, gsm8k_graphs(split), strict=True):
        known = {}
        for name, op, args in row["steps"]:
            a, b = (known.get(o, o) for o in args)
            assert op != "/" or a % b == 0 and b <= 10
            known[name] = PYTHON[op](a, b)
        assert known[row["steps"][-1][0]] == row["answer"] and str(row["answer"]) == program(graph).answer and row["wording"]
    counts = json.loads((data_dir() / "gsm8k_graphs" / "counts.json").read_text())[split]
    assert counts["of"] == {"train": 7473, "test": 1319}[split] == len(rows) + sum(counts["left_out"].values())
    assert len(rows) == counts["kept"] >= .75 * counts["of"]


def test_graphs_can_be_arranged():
    for graph in random.Random(0).sample(gsm8k_graphs("train"), 60):
        p = program(graph)
        assert len(levels(p.steps)) <= len(p.steps) and all(grade(render(how.arrange(p)), p) for how in (Sequential(), WheneverReady(), Grouped()))


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
    assert read_rows(tmp_path / "gsm8k_graphs" / "train.jsonl") == [{"steps": [["a", "/", [48, 2]]], "answer": 24, "wording": "q"}]
