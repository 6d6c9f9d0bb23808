"""Measuring: rows of rollouts, runs that go on where they stopped, seconds taken in turn, results that name no machine's path."""
import json
import random
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from helpers import TOKENIZERS, spied, tiny
from peft import PeftModel

from threadweaver_ref import evaluate as room
from threadweaver_ref.checkpoint import digest
from threadweaver_ref.decode import DecodeConfig, generate
from threadweaver_ref.domains import Grouped, Problem, WheneverReady, split_problems
from threadweaver_ref.evaluate import (evaluate, evaluate_all, in_turn, problem_row, provenance, public_path, rollout_data, self_consistency,
                                       time_all)
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.model import add_lora
from threadweaver_ref.programs import parse
from threadweaver_ref.replay import replay
from threadweaver_ref.report import read_lines, read_report, schedule_latencies, text_length, times_faster
from threadweaver_ref.tokenizer import char_tokenizer, control_ids, encode_prompt

CHAR = char_tokenizer()
MODEL = tiny("Qwen3", CHAR)
SHORT = DecodeConfig(batch=2, limits=Limits(max_tokens=5))
PROBLEMS = [parse(f"a={i}+3x4;b=2+5x3;c=a+b;c?", "loops" if i < 4 else "more") for i in range(5)]


def plain(rows): return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
def run(out=None, problems=PROBLEMS, config=SHORT, model=MODEL, **more): return evaluate(model, CHAR, problems, config, out, progress=False, **more)


# ---- the row of a rollout

def written(trajectory, problem, text, join="concat", **more):
    "As much of a rollout as is measured."
    tree = replay(trajectory, encode_prompt(CHAR, problem.question), CHAR, join)
    return SimpleNamespace(text=text, trajectory=trajectory, tree=tree, **{**dict(answer="6", finish_reason="stop", token_latency=11, total_tokens=22,
                           decode_steps=33, peak_context=44, well_formed=True), **more})


def test_a_row_by_hand():
    problem = replace(PROBLEMS[0], question="a=7+3x4;b=2+5x3;c=a+b;c?")
    nodes = WheneverReady().arrange(problem)
    row = problem_row(written(nodes, problem, problem.closing), problem, {"best_flat": 9}, 1.234567, control_ids(CHAR))
    thread = 2 + len("2:") + len(problem.steps[1].text)   # with its tags it is prefilled again, behind the first one
    assert row == dict(question=problem.question, family="loops", correct=True, answer="6", finish_reason="stop", token_latency=11, total_tokens=22,
                       decode_steps=33, peak_context=44, forks=1, width=2, reprefilled=thread, well_formed=True, seconds=1.23457, best_flat=9)
    assert json.loads(json.dumps(row)) == row
    wrong = problem_row(written(nodes, problem, "no", "kv", well_formed=False), replace(problem, family=""), {}, 1, control_ids(CHAR))
    assert (wrong["correct"], wrong["family"], wrong["reprefilled"], wrong["well_formed"]) == (False, "programs", 0, False)


def test_inner_forks_count():
    problem = parse("a=1+2x3;b=1+3x3;c=a+b;d=1+4x3;e=2+5x3;f=d+e;cf?")
    row = problem_row(written(Grouped().arrange(problem), problem, ""), problem, {}, 0, control_ids(CHAR))
    assert (row["forks"], row["width"]) == (3, 2)
    alone = problem_row(written([], problem, ""), problem, {}, 0, control_ids(CHAR))
    assert (alone["forks"], alone["width"], alone["reprefilled"]) == (0, 1, 0)


# ---- evaluate

def test_rows_are_those_of_the_rollouts(monkeypatch):
    "In the order of the problems, `batch` at a time, each with the schedules of its problem."
    asked, report = spied(monkeypatch, room, "generate"), run()
    assert [c[0][2] for c in asked] == [[p.question for p in PROBLEMS[i:i + 2]] for i in (0, 2, 4)] and {c[0][3] for c in asked} == {SHORT}
    alone = generate(MODEL, CHAR, [p.question for p in PROBLEMS], SHORT)
    length = text_length(CHAR)
    for row, rollout, problem in zip(report.rows, alone, PROBLEMS, strict=True):
        assert row["question"] == problem.question and row["family"] == problem.family and row["finish_reason"] == rollout.finish_reason
        assert (row["token_latency"], row["total_tokens"], row["answer"]) == (rollout.token_latency, rollout.total_tokens, rollout.answer)
        assert row.items() >= schedule_latencies(problem, length).items() and row["seconds"] > 0
    assert report.rows[0]["seconds"] == report.rows[1]["seconds"] and report.families == ["loops", "more"]
    assert report.about["settings"]["mode"] == "parallel" and report.about["settings"]["policy"] == digest(MODEL)[:16]


def test_seconds_are_those_of_the_batch_over_its_problems(monkeypatch):
    ticks = iter([0, 4, 10, 16, 20, 25])
    monkeypatch.setattr(room.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(room, "generate", lambda model, tokenizer, questions, config, seeds: rollouts[:len(questions)])
    rollouts = [written([], PROBLEMS[0], "")] * 2
    assert [r["seconds"] for r in run().rows] == [2, 2, 3, 3, 5]


def test_seeds_belong_to_the_questions(monkeypatch):
    "Sampled answers are the same whatever stands beside them."
    hot = replace(SHORT, temperature=1.0, seed=3)
    assert plain(run(config=hot).rows)[3:] == plain(run(config=replace(hot, batch=1), problems=PROBLEMS[3:]).rows)
    assert plain(run(config=hot).rows) != plain(run(config=replace(hot, seed=4)).rows)


def test_what_it_is_of_stands_in_the_first_line(tmp_path):
    report = run(tmp_path / "new" / "a.jsonl", about={"command": "mine", "commit": None})
    head, *rows = read_lines(tmp_path / "new" / "a.jsonl")
    assert head == report.about and rows == report.rows and head["command"] == "mine" and head["settings"]["limits"]
    again = read_report(str(tmp_path / "new" / "a.jsonl"))
    assert (again.rows, again.about) == (report.rows, report.about) and len(rows) == 5


def test_problems_without_steps_and_none_at_all(tmp_path):
    report = run(problems=[Problem("1+2?", "3", "mine")])
    assert "best_flat" not in report.rows[0] and report.rows[0]["family"] == "mine" and report.summary()["ratio"] == (None, None, None)
    assert run(tmp_path / "none", problems=[]).rows == [] and len(read_lines(tmp_path / "none")) == 1


# ---- going on

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The text of a report, and its rows without their seconds."
    path = tmp_path_factory.mktemp("whole") / "a.jsonl"
    return plain(run(path, about={"command": "é"}).rows), path.read_text(encoding="utf-8")


def cuts(text):
    "Where a file may have been cut: behind its head and every row, one character before that, in the middle of a row."
    ends, at = [], 0
    for line in text.splitlines(keepends=True):
        if at: ends += [at + 1, at + len(line) // 2]
        at += len(line)
        ends += [at - 1, at]
    return sorted(set(ends))


@pytest.mark.parametrize("place", range(22))
def test_stopped_anywhere_and_resumed_is_uninterrupted(tmp_path, monkeypatch, whole, place):
    rows, text = whole
    assert len(cuts(text)) == 22
    cut = cuts(text)[place]
    (tmp_path / "a").write_text(text[:cut], encoding="utf-8")
    there, asked = max(0, len(read_lines(tmp_path / "a")) - 1), spied(monkeypatch, room, "generate")
    resumed = run(tmp_path / "a", about={"command": "é"})
    assert plain(resumed.rows) == rows and [q for c in asked for q in c[0][2]] == [p.question for p in PROBLEMS[there:]]   # nothing is answered twice
    kept = read_report(tmp_path / "a")
    assert (kept.rows, kept.about) == (resumed.rows, json.loads(text.splitlines()[0]))
    assert (tmp_path / "a").read_text(encoding="utf-8").endswith("}\n")


def test_a_file_without_a_whole_first_line(tmp_path, whole):
    "An empty one is written to; of a part nobody can tell what it was: it is refused."
    (tmp_path / "a").write_text("")
    assert plain(run(tmp_path / "a").rows) == whole[0]
    for size in (1, 20):
        (tmp_path / "b").write_text(whole[1][:size], encoding="utf-8")
        with pytest.raises(ValueError, match="b is no report of `evaluate`: its first line has no settings"): run(tmp_path / "b")


def test_a_run_that_is_killed_keeps_its_batches(tmp_path, monkeypatch, whole):
    real, calls = room.generate, []
    def stopping(*args):
        calls.append(args)
        if len(calls) == 3: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(room, "generate", stopping)
    with pytest.raises(KeyboardInterrupt): run(tmp_path / "a")
    assert plain(read_report(tmp_path / "a").rows) == whole[0][:4]
    monkeypatch.setattr(room, "generate", real)
    assert plain(run(tmp_path / "a").rows) == whole[0]


@pytest.mark.parametrize("question", ["a\u2028?", "\x85?"])
def test_a_question_with_a_line_of_its_own_is_kept_when_a_run_goes_on(tmp_path, question):
    problems = [Problem(q, "1", "mine") for q in (question, "2?", "3?")]
    rows = plain(run(tmp_path / "a", problems).rows)
    for _ in range(2): assert plain(run(tmp_path / "a", problems).rows) == rows == plain(read_report(tmp_path / "a").rows)


@pytest.mark.parametrize("other, said", [
    (dict(config=replace(SHORT, mode="sequential")), "mode"), (dict(config=replace(SHORT, join="kv")), "join"),
    (dict(config=replace(SHORT, limits=Limits(max_tokens=6))), "limits"), (dict(config=replace(SHORT, seed=1)), "seed"),
    (dict(problems=PROBLEMS[:4]), "problems"), (dict(problems=[*PROBLEMS[:4], parse("a=1+2;a?")]), "problems"),
    (dict(problems=PROBLEMS[::-1]), "problems"), (dict(problems=[replace(PROBLEMS[0], answer="?"), *PROBLEMS[1:]]), "problems"),   # graded anew
    (dict(model=tiny("Qwen3", CHAR, seed=1)), "policy"), (dict(model=tiny("Qwen2", CHAR)), "policy")], ids=lambda x: x if isinstance(x, str) else "")
def test_a_file_of_another_run_is_refused_and_left_alone(tmp_path, whole, other, said):
    (tmp_path / "a").write_text(whole[1], encoding="utf-8")
    with pytest.raises(ValueError) as refused: run(tmp_path / "a", **other)
    assert str(refused.value) == f"{tmp_path}/a holds another report, its {said} differs: choose another file, or remove it"
    assert (tmp_path / "a").read_text(encoding="utf-8") == whole[1]


def test_a_file_that_is_no_report_is_left_alone(tmp_path):
    (tmp_path / "a").write_text('{"question": 1}\n')
    with pytest.raises(ValueError, match="is no report of `evaluate`"): run(tmp_path / "a")
    assert (tmp_path / "a").read_text() == '{"question": 1}\n'


# ---- several runs

def test_all_runs_on_the_same_problems(tmp_path):
    runs = {"never": (MODEL, CHAR, replace(SHORT, mode="sequential")), "free": (MODEL, CHAR, SHORT)}
    reports = evaluate_all(runs, PROBLEMS[:2], tmp_path, {"command": "mine"})
    assert [*reports] == ["never", "free"] == [r.about["run"] for r in reports.values()] and reports["free"].about["command"] == "mine"
    assert sorted(f.name for f in tmp_path.glob("*")) == ["free.jsonl", "never.jsonl"]
    assert read_report(tmp_path / "never.jsonl").about["settings"]["mode"] == "sequential" == reports["never"].about["settings"]["mode"]
    assert plain(evaluate_all(runs, PROBLEMS[:2])["free"].rows) == plain(reports["free"].rows) == plain(run(problems=PROBLEMS[:2]).rows)


def clock(monkeypatch, cost):
    "A clock that only decoding moves on: `cost(name of the run, questions)` seconds. Returns the calls."
    now, asked = [0.0], []
    def spy(model, tokenizer, questions, config):
        asked.append((model, questions))
        now[0] += cost(model, questions)
        return questions
    monkeypatch.setattr(room, "generate", spy)
    monkeypatch.setattr(room, "_settings", lambda model, problems, config, answer: {"of": model, "how": config})
    monkeypatch.setattr(room.time, "perf_counter", lambda: now[0])
    return asked


def test_runs_take_turns_and_each_is_first_as_often(monkeypatch):
    "What slows the machine for a while slows all of them."
    asked = clock(monkeypatch, lambda name, questions: {"a": 1, "b": 2, "c": 4}[name] * len(questions))
    runs, problems = {n: (n, None, n) for n in "abc"}, [Problem(str(i), "1", "mine", family="f" * (i % 2)) for i in range(8)]
    rows = in_turn(runs, problems, batch=2, progress=False)
    assert "".join(n for n, _ in asked) == "abc" "bca" "cab" "abc"
    assert [q for n, q in asked if n == "b"] == [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"]]
    assert rows == [{"question": str(i), "family": "f" if i % 2 else "mine", "turn": i // 2, "a": 1, "b": 2, "c": 4} for i in range(8)]
    assert times_faster(rows, "a", "c") == (4, 4, 4)


def test_a_last_portion_may_be_smaller(monkeypatch):
    clock(monkeypatch, lambda name, questions: 6)
    rows = in_turn({"a": ("a", None, 0)}, [Problem(str(i), "1", "mine") for i in range(5)], batch=3, progress=False)
    assert [r["a"] for r in rows] == [2, 2, 2, 3, 3]


def test_seconds_of_every_size_of_batch_are_kept_and_compared(monkeypatch, tmp_path):
    clock(monkeypatch, lambda name, questions: {"a": 1, "b": len(questions)}[name])
    runs, problems = {n: (n, None, n) for n in "ba"}, [Problem(str(i), "1", "mine") for i in range(4)]
    lines = time_all(runs, problems, (1, 2), tmp_path, {"command": "mine"})
    assert lines == [f"{batch} at a time, {n}: {x} ({x} to {x}) times as fast as b"
                     for batch, x, n in [(1, "1.00", "b"), (1, "1.00", "a"), (2, "1.00", "b"), (2, "2.00", "a")]]
    head, *rows = read_lines(tmp_path / "seconds-2.jsonl")
    settings = {n: {"of": n, "how": n} for n in "ab"}
    assert head == {"command": "mine", "batch": 2, "runs": ["b", "a"], "settings": settings} and [r["a"] for r in rows] == [.5] * 4
    assert (tmp_path / "seconds-1.jsonl").is_file()
    assert time_all(runs, problems, (2,)) == lines[2:]


def test_a_timing_that_was_stopped_goes_on(monkeypatch, tmp_path):
    "Killed in the third of four portions, with a line cut off: whole portions are kept, nothing is timed twice."
    asked = clock(monkeypatch, lambda name, questions: len(questions))
    runs, problems = {n: (n, None, n) for n in "ab"}, [Problem(str(i), "1", "mine") for i in range(7)]
    lines, file = time_all(runs, problems, (2,), tmp_path, {"command": "mine"}), tmp_path / "seconds-2.jsonl"
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:6]) + '{"question": "5", "fam')
    asked.clear()
    assert time_all(runs, problems, (2,), tmp_path, {"command": "again"}) == lines and file.read_text() == whole
    assert [(n, q) for n, q in asked] == [("a", ["4", "5"]), ("b", ["4", "5"]), ("b", ["6"]), ("a", ["6"])]
    asked.clear()
    assert time_all(runs, problems, (2,), tmp_path) == lines and not asked
    changed = [({"a": runs["a"]}, problems), (runs, problems[::-1]), *(({**runs, "b": b}, problems) for b in (("b", None, "wide"), ("c", None, "b")))]
    for others in changed:
        with pytest.raises(ValueError, match="seconds-2.jsonl is of other runs, settings or problems"): time_all(*others, (2,), tmp_path)
    file.write_text("")   # killed before its first line
    assert time_all(runs, problems, (2,), tmp_path, {"command": "mine"}) == lines and file.read_text() == whole


def test_the_settings_of_a_timing_are_those_of_a_report(tmp_path):
    "The real ones: of another model or other limits no seconds are taken over."
    runs = {"a": (MODEL, CHAR, SHORT)}
    time_all(runs, PROBLEMS[:2], (1,), tmp_path)
    run(tmp_path / "a.jsonl", PROBLEMS[:2])
    assert read_lines(tmp_path / "seconds-1.jsonl")[0]["settings"] == {"a": read_report(tmp_path / "a.jsonl").about["settings"]}
    for other in ((tiny("Llama", CHAR), CHAR, SHORT), (MODEL, CHAR, replace(SHORT, limits=Limits(max_tokens=6)))):
        with pytest.raises(ValueError, match="is of other runs, settings"): time_all({"a": other}, PROBLEMS[:2], (1,), tmp_path)


@pytest.mark.parametrize("twice", [1, 3])
def test_rows_of_two_runs_at_once_are_refused(tmp_path, twice):
    "A command that was started twice: the rows are no progress."
    out = tmp_path / "a.jsonl"
    run(out, PROBLEMS[:4])
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join([*lines[:1 + twice], *lines[twice:twice + 1]]))
    before = out.read_text()
    with pytest.raises(ValueError, match="a.jsonl has rows twice or out of order: choose another file, or remove it"): run(out, PROBLEMS[:4])
    assert out.read_text() == before


def test_real_seconds():
    rows = in_turn({m: (MODEL, CHAR, replace(SHORT, mode=m)) for m in ("sequential", "parallel")}, PROBLEMS[:2], progress=False)
    assert all(r["sequential"] > 0 and r["parallel"] > 0 for r in rows) and [r["family"] for r in rows] == ["loops"] * 2


def test_adapters_are_merged_once_for_all_batches_and_turns(monkeypatch):
    "And the report is of the policy with its adapters: the digest is theirs."
    lora = add_lora(tiny("Qwen3", CHAR), r=2)
    asked = spied(monkeypatch, room, "generate")
    report = evaluate(lora, CHAR, PROBLEMS, SHORT, progress=False)
    assert report.about["settings"]["policy"] == digest(lora)[:16]
    assert plain(report.rows) == plain(run(model=lora, config=replace(SHORT, batch=1)).rows)
    assert len({id(args[0]) for args, _ in asked[:3]}) == 1 and not any(isinstance(args[0], PeftModel) for args, _ in asked)
    asked.clear()
    in_turn({"a": (lora, CHAR, SHORT)}, PROBLEMS[:3], progress=False)
    assert len(asked) == 3 and len({id(args[0]) for args, _ in asked}) == 1 and not isinstance(asked[0][0][0], PeftModel)


def test_a_baseline_is_measured_and_timed_like_a_mode(monkeypatch):
    asked = []
    def answer(model, tokenizer, questions, config):
        asked.append(len(questions))
        return generate(model, tokenizer, questions, config)
    monkeypatch.setattr(room, "generate", None)   # plain decoding is not asked
    runs = {"mine": (MODEL, CHAR, SHORT, answer)}
    assert len(evaluate_all(runs, PROBLEMS)["mine"].rows) == 5 and [*in_turn(runs, PROBLEMS, 3, False)[0]][-1] == "mine"
    assert asked == [2, 2, 1, 3, 2]


# ---- where a number comes from

def test_a_rollout_as_plain_data():
    rollout, = generate(MODEL, CHAR, [PROBLEMS[0].question], SHORT)
    found = json.loads(json.dumps(rollout_data(rollout)))
    assert found["question"] == PROBLEMS[0].question and found["text"] == rollout.text and len(found["timeline"]) == len(rollout.timeline)
    assert found["logprob"] == pytest.approx(rollout.logprobs.sum().item(), abs=1e-5)


def test_provenance_names_no_path_of_a_machine(monkeypatch, tmp_path):
    "And a machine without git, as a slim container is, still measures; the commit is unknown."
    assert [public_path(p) for p in ("/a/b/c", "../x", "data/policies/p", "Qwen/Qwen3-0.6B")] == ["c", "x", "data/policies/p", "Qwen/Qwen3-0.6B"]
    monkeypatch.setenv("PATH", str(tmp_path))
    found = provenance("threadweaver-ref evaluate", "data/results/a.json", 3)
    assert [found[k] for k in ("commit", "command", "result", "seed")] == ["", "threadweaver-ref evaluate", "data/results/a.json", 3]
    assert str(random.__file__) not in json.dumps(found)


def test_any_tokenizer_measures():
    "Latencies of the schedules are counted in the policy's own tokens."
    bpe = TOKENIZERS["bpe"]()
    problems = [p for ps in split_problems("programs", "dev", 1).values() for p in ps]
    report = evaluate(tiny("Qwen3", bpe), bpe, problems, replace(SHORT, batch=8), progress=False)
    for row, problem in zip(report.rows, problems, strict=True):
        assert row.items() >= schedule_latencies(problem, text_length(bpe)).items()
        assert row["never"] != schedule_latencies(problem, text_length(CHAR))["never"]


def test_a_baseline_is_measured_like_a_policy_and_told_apart(tmp_path):
    "Its config says how it samples; a file of plain decoding is not continued by a baseline."
    config, out = DecodeConfig("sequential", temperature=1.0, batch=2, limits=Limits(max_tokens=5)), tmp_path / "a.jsonl"
    report = run(out, config=config, answer=partial(self_consistency, n=3))
    assert report.about["settings"]["answer"] == "self_consistency(n=3)"
    alone = [self_consistency(MODEL, CHAR, [p.question], config, n=3)[0] for p in PROBLEMS]
    assert [r["total_tokens"] for r in report.rows] == [r.total_tokens for r in alone] and report.rows[0]["total_tokens"] > 5
    for other in (None, partial(self_consistency, n=4)):
        with pytest.raises(ValueError, match="another report"): run(out, config=config, answer=other)


def test_the_folder_that_one_is_in_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "mine" / "policy").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    assert room.policy_name(".") == "mine"
    monkeypatch.chdir(tmp_path / "mine" / "policy")
    assert room.policy_name(".") == "mine" == room.policy_name(tmp_path / "mine" / "policy")
