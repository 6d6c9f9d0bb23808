"""The command line: what it prints, what it writes, and one clear line for every mistake."""
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from helpers import tiny

from threadweaver_ref import bench, cli
from threadweaver_ref.bench import mixed_problems, packing, table
from threadweaver_ref.tasks import answer_text, oracle
from threadweaver_ref.tasks import bench as get_bench
from threadweaver_ref.tokens import char_tokenizer


@pytest.fixture
def run(monkeypatch, capsys):
    "Run `threadweaver-ref ARGS`: (exit code, what it printed, what it complained of)."
    def call(*args, stdin=""):
        monkeypatch.setattr(sys, "argv", ["threadweaver-ref", *args])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as stop: cli.main()
        printed = capsys.readouterr()
        return stop.value.code or 0, printed.out, printed.err
    return call


def test_solve_shows_trajectory_and_numbers(run):
    code, out, _ = run("solve", "12*3+4*5?")
    assert code == 0 and out.startswith("12*3+4*5?\n") and "\\boxed{" in out
    for word in ("token latency", "decode steps", "tokens", " s,"): assert word in out


@pytest.mark.parametrize("mode", ["parallel", "sequential", "autoregressive"])
def test_solve_json(run, mode):
    code, out, _ = run("solve", "--json", "--mode", mode, stdin="12*3+4*5?\n\n7*8+2*3?\n")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r["question"] for r in rows] == ["12*3+4*5?", "7*8+2*3?"]
    for r in rows:
        assert r["token_latency"] <= r["total_tokens"] and r["timeline"] and r["finish_reason"] == "stop"
        assert (r["forks"] == 0) or mode == "parallel"


def test_solve_reads_a_file(run, tmp_path):
    (tmp_path / "q.txt").write_text("12*3+4*5?\n")
    code, out, _ = run("solve", "--json", "--file", str(tmp_path / "q.txt"))
    assert code == 0 and json.loads(out)["question"] == "12*3+4*5?"


@pytest.mark.parametrize("args, names", [
    (["solve", "1*2+3*4?", "--mode", "quick"], ["quick", "parallel", "sequential", "autoregressive"]),
    (["solve", "1*2+3*4?", "--policy", "nobody"], ["nobody", "tiny-sft"]),
    (["solve"], ["no question"]),
    (["solve", "--file", "/no/such/file"], ["/no/such/file"]),
    (["train", "giant"], ["giant", "tiny-base", "tiny-sft"]),
    (["train", "giant", "--processes", "2"], ["giant", "tiny-base", "tiny-sft"]),
    (["policies", "--runs", "/no/such/runs"], ["/no/such/runs", "tiny-rl", "train"]),
    (["policies", "--speed", "--seconds"], ["--speed", "--seconds", "one"]),
    (["policies", "--processes", "2"], ["--processes 2", "--speed"]),
    (["merges", "--part", "flat"], ["flat", "joins", "flat_and_nested"]),
])
def test_mistakes_get_one_clear_line(run, args, names):
    code, out, err = run(*args)
    assert code == 2 and not out and len(err.strip().splitlines()) == 1 and "Traceback" not in err
    for name in names: assert name in err


def test_families(run):
    code, out, _ = run("families")
    assert code == 0
    for name in ("gsm8k", "sums", "chain", "product", "nested"): assert f"{name}:" in out


def test_demo_writes_picture_and_numbers(run, tmp_path):
    code, out, _ = run("demo", "--problems", "8", "--out", str(tmp_path))
    result = json.loads((tmp_path / "demo.json").read_text())
    assert code == 0 and (tmp_path / "timeline.png").stat().st_size > 1000
    assert set(result["families"]) == {"gsm8k", "sums", "chain", "product", "nested", "all"} and result["command"]
    assert result["families"]["all"]["problems"] == 8 and "join" in out


def test_demo_problems_are_a_third_gsm8k_and_held_out():
    mixed = mixed_problems(64)
    assert sum(map(len, mixed.values())) == 64 and len(mixed["gsm8k"]) == 21


def test_packing_saves_half_of_the_tokens():
    found = packing(char_tokenizer(), 30)
    ratios = [stage["ratio"] for stage in found["stages"].values()]
    assert list(found["stages"])[::7] == ["tiny-sft-eighth", "tiny-sft-first"] and 1.5 < min(ratios) < found["ratio"] < max(ratios)


def test_a_step_has_as_many_live_branches_as_asked(monkeypatch):
    "What is timed is a turn of the decoder with exactly so many live branches."
    live, turn = [], bench.Decoder.turn
    monkeypatch.setattr(bench.Decoder, "turn", lambda self: (turn(self), live.append(len(self.rows[0].live)))[0])
    for n in (1, 2, 5):
        live.clear()
        assert bench.step_cost(tiny("Qwen3", char_tokenizer()), char_tokenizer(), n, slots=200, repeats=3) > 0
        assert live[-8:] == [n] * 8


def test_wrong_answers_do_not_count_as_fast():
    problems = get_bench("sums", 3)
    answers = [SimpleNamespace(text=answer_text(p.answer), token_latency=oracle(p).best, decode_steps=1, forks=1, well_formed=True) for p in problems]
    right = bench._row(problems, answers, answers, (1, 1))
    assert right["share_of_oracle"] == pytest.approx(1)
    short = [SimpleNamespace(**{**vars(a), "text": "", "token_latency": 5}) for a in answers[:2]] + answers[2:]
    assert bench._row(problems, answers, short, (1, 1))["share_of_oracle"] == pytest.approx(1)


def test_table_has_a_line_a_family():
    row = dict.fromkeys(["accuracy_sequential", "accuracy_parallel", "token_latency_sequential", "token_latency_parallel", "decode_steps_sequential",
                         "decode_steps_parallel", "seconds_sequential", "seconds_parallel", "speedup_tokens", "speedup_oracle", "speedup_seconds",
                         "fork_rate"], 0.5) | {"problems": 3}
    assert len(table({"a": row, "b": row}).splitlines()) == 3


@pytest.mark.slow
def test_train_in_two_processes(tmp_path):
    "One log and one policy come out, and both processes had a part in it."
    command = [sys.executable, "-m", "threadweaver_ref.cli", "train", "tiny-base", "--steps", "2", "--processes", "2"]
    command += ["--runs", str(tmp_path), "--out", str(tmp_path / "policy")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.count("saved") == 1 and (tmp_path / "policy" / "model.safetensors").is_file()
    assert [json.loads(line)["step"] for line in (tmp_path / "tiny-base" / "log.jsonl").read_text().splitlines()] == [1, 2]
    assert len(list((tmp_path / "tiny-base").glob("step-*/random_states_*"))) == 2


def test_a_measurement_without_git(monkeypatch, tmp_path):
    "A machine without git, as a slim container is, still measures; the commit is unknown."
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench.provenance()["commit"] == ""
