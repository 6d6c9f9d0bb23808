"""Measuring: intervals, regret, seconds in both forms, and results that name a command and no machine's path."""
import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers import tiny

from threadweaver_ref import evaluate
from threadweaver_ref.decode import DecodeConfig
from threadweaver_ref.domains import Problem, Sequential, best_flat
from threadweaver_ref.evaluate import (BOTH_MODES, compare, development_problems, family_row, markdown, mixed_problems, provenance, public_path,
                                       schedule_latencies, table, text_length, wilson)
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.format import render
from threadweaver_ref.schoolbook import FAMILIES, heldout_problems
from threadweaver_ref.tokenizer import char_tokenizer, encode_text

char = char_tokenizer()
length = text_length(char)


def solved(problem, latency, correct=True, forks=0):
    "As much of a rollout as is measured."
    text = f"\\boxed{{{problem.answer if correct else 'no'}}}"
    return SimpleNamespace(text=text, token_latency=latency, decode_steps=latency, forks=forks, well_formed=True)


@pytest.mark.parametrize("correct, total", [(0, 1), (1, 1), (3, 7), (49, 50), (250, 500), (500, 500)])
def test_wilson_ends_where_the_share_lies_z_standard_errors_away(correct, total):
    "Found again by bisection from the definition."
    share = correct / total
    def far(p): return (share - p) ** 2 * total > 1.96 ** 2 * p * (1 - p)
    def end(inside, outside):
        for _ in range(80):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if far(middle) else (middle, outside)
        return inside
    assert wilson(correct, total) == pytest.approx((end(share, 0.0), end(share, 1.0)), abs=1e-9)


@pytest.mark.parametrize("family", [*FAMILIES])
def test_latencies_of_the_schedules(family):
    "Sequential: every character and the end of sequence. The best one is never longer than the others."
    for problem in heldout_problems(family, 5):
        found = schedule_latencies(problem, length)
        assert found["sequential"] == len(encode_text(char, render(Sequential().arrange(problem)))) + 1
        assert found["best_flat"] == best_flat(problem).best <= min(found.values())


def test_wrong_answers_do_not_count_as_fast():
    problems = heldout_problems("sums", 3)
    best = [schedule_latencies(p, length)["best_flat"] for p in problems]
    fine = [solved(p, b + i, forks=1) for i, (p, b) in enumerate(zip(problems, best))]
    short = [solved(problems[0], 5, correct=False), *fine[1:]]
    row = family_row(problems, {"sequential": fine, "parallel": short}, length)
    assert row["sequential"]["regret"] == 1 and row["parallel"]["regret"] == 1.5
    assert row["sequential"]["token_latency"] == pytest.approx(sum(best) / 3 + 1) and row["parallel"]["token_latency"] == sum(best[1:]) / 2 + 1.5
    assert row["parallel"]["correct"] == 2 and row["parallel"]["interval"] == wilson(2, 3) and row["parallel"]["fork_rate"] == pytest.approx(2 / 3)
    assert row["speedup_tokens"] == 1   # over the two that both answered


def test_nothing_correct_and_problems_without_steps():
    problems = [Problem("1?", "1", "schoolbook")] * 2
    row = family_row(problems, {m: [solved(p, 7, correct=False) for p in problems] for m in BOTH_MODES}, length)
    assert row["parallel"]["token_latency"] is row["parallel"]["regret"] is row["speedup_tokens"] is None and row["schedules"] == {}
    assert "-> -" in table({"a": {**row, "seconds": {"1": dict.fromkeys(BOTH_MODES, 1.0)}}})


def test_compare_measures_both_forms_and_weighs_families():
    families = {"sums": heldout_problems("sums", 3), "chain": heldout_problems("chain", 1)}
    short = DecodeConfig(batch=2, limits=Limits(max_tokens=5))
    rows, rollouts = compare(tiny("Qwen3", char), char, families, short, alone=1, progress=False)
    assert list(rows) == ["sums", "chain", "all"] and [len(r["parallel"]) for r in rollouts.values()] == [3, 1]
    for row in rows.values(): assert set(row["seconds"]) == {"1", "2"} and all(s > 0 for both in row["seconds"].values() for s in both.values())
    seconds = [rows[f]["seconds"]["2"]["parallel"] for f in rows]
    assert seconds[2] == pytest.approx((3 * seconds[0] + seconds[1]) / 4) and rows["all"]["problems"] == 4
    assert json.loads(json.dumps(rows))["all"]["problems"] == 4
    one_by_one, _ = compare(tiny("Qwen3", char), char, {"chain": families["chain"]}, replace(short, batch=1), progress=False)
    assert set(one_by_one["all"]["seconds"]) == {"1"}


def test_the_modes_take_turns(monkeypatch):
    "In portions of a batch: what slows the machine for a while slows both."
    asked = []
    monkeypatch.setattr(evaluate, "generate", lambda model, tokenizer, questions, config: asked.append((config.mode, questions)) or questions)
    problems = [Problem(str(i), "1", "schoolbook") for i in range(5)]
    rollouts, _ = evaluate.solve(None, None, problems, DecodeConfig(batch=2))
    assert [m for m, _ in asked] == [*BOTH_MODES] * 3 and [q for _, q in asked[::2]] == [["0", "1"], ["2", "3"], ["4"]]
    assert rollouts["parallel"] == ["0", "1", "2", "3", "4"]


def test_tables_have_a_line_a_family():
    problems = heldout_problems("nested", 2)
    row = family_row(problems, {m: [solved(p, 99) for p in problems] for m in BOTH_MODES}, length)
    row["seconds"] = {"1": dict.fromkeys(BOTH_MODES, .5)}
    rows = {"nested": row, "all": {**row, "seconds": {**row["seconds"], "64": {"sequential": .1, "parallel": .2}}}}
    assert len(table(rows).splitlines()) == 3 and "0.100 -> 0.200 (0.50x)" in table(rows) and "100.0% (34.2% to 100.0%)" in table(rows)
    lines = markdown(rows).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1


def test_a_third_of_the_mixed_problems_are_gsm8k():
    mixed = mixed_problems(64)
    assert sum(map(len, mixed.values())) == 64 and len(mixed["gsm8k"]) == 21
    assert all(p in heldout_problems(f, 30) for f, problems in mixed.items() for p in problems)


def test_problems_of_a_domain(monkeypatch):
    assert {f: len(p) for f, p in development_problems("schoolbook", 2).items()} == dict.fromkeys(FAMILIES, 2)
    from threadweaver_ref.domains import DOMAINS, domain
    monkeypatch.setitem(DOMAINS, "dice", None)
    @domain
    def dice(rng): return Problem(f"{rng.random()}?", "6", "dice")
    assert development_problems("dice", 3) == development_problems("dice", 3) and len(development_problems("dice", 3)["dice"]) == 3
    with pytest.raises(ValueError, match="unknown domain 'cards'"): development_problems("cards", 1)


def test_provenance_names_no_path_of_a_machine(monkeypatch, tmp_path):
    "And a machine without git, as a slim container is, still measures; the commit is unknown."
    assert [public_path(p) for p in ("/a/b/c", "../x", "data/policies/p", "Qwen/Qwen3-0.6B")] == ["c", "x", "data/policies/p", "Qwen/Qwen3-0.6B"]
    monkeypatch.setenv("PATH", str(tmp_path))
    found = provenance("threadweaver-ref evaluate", "data/results/a.json", 3)
    assert [found[k] for k in ("commit", "command", "result", "seed")] == ["", "threadweaver-ref evaluate", "data/results/a.json", 3]
    assert str(random.__file__) not in json.dumps(found)
