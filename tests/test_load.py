"""A closed loop: how many problems are in the works, what is timed, and a run that goes on where it stopped."""
import json

import pytest
from helpers import spied, tiny

from threadweaver_ref import load as room
from threadweaver_ref.decode import DecodeConfig
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.load import LANES, WAYS, closed_loop, latency, load_table, portion, throughput, under_load
from threadweaver_ref.programs import parse
from threadweaver_ref.tokenizer import char_tokenizer

CHAR = char_tokenizer()
MODEL = tiny("Qwen3", CHAR)
PROBLEMS = [parse(f"a={i}+3x4;b=2+5x3;c=a+b;c?", "loops") for i in range(7)]
SHORT = {way: lambda n, way=way: DecodeConfig("sequential", batch=n, limits=Limits(max_tokens=4 + len(way))) for way in ("one", "other")}


def test_places_are_taken_again_and_a_user_waits_less_than_all(monkeypatch):
    "Seven problems, two in the works: in most steps two; the whole takes longer than any of them."
    from threadweaver_ref.reader import Reader
    rows = []
    monkeypatch.setattr(Reader, "step", lambda self, of, step=Reader.step: rows.append(len(of)) or step(self, of))
    found = closed_loop(MODEL, CHAR, PROBLEMS, SHORT["one"](2))
    assert max(rows) == 2 and rows.count(2) > rows.count(1)
    assert [r["question"] for r in found] == [p.question for p in PROBLEMS] and len({r["seconds"] for r in found}) == 1
    assert sum(r["latency"] for r in found) > 7 * found[0]["seconds"] > max(r["latency"] for r in found) > 0


def test_ways_and_portions():
    assert [WAYS[w](3).mode for w in WAYS] == ["sequential", "parallel", "parallel"] and [WAYS[w](3).batch for w in WAYS] == [3] * 3
    assert WAYS["parallel"](3).max_lanes is None and [WAYS["regulated"](n).max_lanes for n in (1, LANES, 64)] == [LANES, 2 * LANES, 128]
    many = list(range(100))
    assert portion(many, 1, 0) == many[:20] and portion(many, 1, 1) == many[20:40] and portion(many, 8, 3) == [*many[96:], *many[:28]]
    assert portion(many, 64, 1) == many


def test_a_stopped_run_measures_only_what_is_missing(monkeypatch, tmp_path):
    calls = spied(monkeypatch, room, "closed_loop")
    def asked(): return [(config.batch, config.limits.max_tokens) for (*_, config), _ in calls]
    out = tmp_path / "load.jsonl"
    rows = under_load(MODEL, CHAR, PROBLEMS, (1, 2), 2, out, {"seed": 0}, SHORT, progress=False)
    assert asked() == [(1, 7), (1, 9), (1, 9), (1, 7), (2, 7), (2, 9), (2, 9), (2, 7)]   # the other is first in the second turn
    head, *kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert head["seed"] == 0 and kept == rows and len(rows) == 8 * 7
    whole = out.read_text()
    out.write_text(whole[:len(whole) * 2 // 3])
    calls.clear()
    again = under_load(MODEL, CHAR, PROBLEMS, (1, 2), 2, out, {"seed": 0}, SHORT, progress=False)
    assert 0 < len(calls) < 8 and again[:7 * (8 - len(calls))] == rows[:7 * (8 - len(calls))] and len(again) == len(rows)
    with pytest.raises(ValueError, match="load.jsonl is of other problems: choose"): under_load(MODEL, CHAR, PROBLEMS[1:], (1,), 1, out)
    with pytest.raises(ValueError, match="load.jsonl is of other policy"): under_load(tiny("Llama", CHAR), CHAR, PROBLEMS, (1,), 1, out)


def made(way, turn, seconds, *pairs):
    return [{"size": 4, "turn": turn, "way": way, "seconds": seconds, "latency": x, "forks": f, "correct": True} for x, f in pairs]


def test_ratios_by_hand():
    rows = [*made("sequential", 0, 2, (4, 0), (6, 0)), *made("parallel", 0, 4, (3, 1), (9, 0)),
            *made("sequential", 1, 3, (8, 0), (1, 0)), *made("parallel", 1, 2, (3, 2), (5, 0))]
    assert throughput(rows, 4, "parallel") == (1.0, .5, 1.5)
    ratio, low, high = latency(rows, 4, "parallel")
    assert ratio == pytest.approx(6 / 12) and low == pytest.approx(3 / 8) and high == pytest.approx(3 / 4)   # of those that fork: 3 and 3 for 4 and 8
    assert latency(rows, 4, "parallel", forks_in="sequential") == (None, None, None)
    assert load_table(rows)[1:] == [["4", "parallel", "1.00 (0.50 to 1.50)", "0.50 (0.38 to 0.75)", "100.0%"]]
