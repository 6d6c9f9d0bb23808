"""The command line: what it prints, what it writes, and one clear line for every mistake."""
import io
import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import DATA
from safetensors import SafetensorError

from threadweaver_ref import cli
from threadweaver_ref.domains import DOMAINS, domain
from threadweaver_ref.schoolbook import chain, sums


@pytest.fixture
def run(monkeypatch, capsys):
    "Run `threadweaver-ref ARGS`: (exit code, what it printed, what it complained of)."
    def call(*args, stdin=""):
        monkeypatch.setattr(sys, "argv", ["threadweaver-ref", *args])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin if isinstance(stdin, bytes) else stdin.encode())))
        with pytest.raises(SystemExit) as stop: cli.main()
        printed = capsys.readouterr()
        return stop.value.code or 0, printed.out, printed.err
    return call


def test_solve_shows_trajectory_and_numbers(run):
    code, out, _ = run("solve", "a=7+3x4;b=2+5x3;c=a+b;c?")
    assert code == 0 and out.startswith("a=7+3x4;b=2+5x3;c=a+b;c?\n") and "\\boxed{" in out
    for word in ("token latency", "decode steps", "tokens", " s,"): assert word in out


@pytest.mark.parametrize("mode", ["parallel", "sequential", "autoregressive"])
def test_solve_json(run, mode):
    code, out, _ = run("solve", "--json", "--mode", mode, stdin="a=7+3x4;b=2+5x3;c=a+b;c?\n\na=1+2;b=3+4;c=a+b;c?\n")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r["question"] for r in rows] == ["a=7+3x4;b=2+5x3;c=a+b;c?", "a=1+2;b=3+4;c=a+b;c?"]
    assert rows[0]["answer"] == "6"
    for r in rows:
        assert r["token_latency"] <= r["total_tokens"] and r["timeline"] and r["finish_reason"] == "stop"
        assert (r["forks"] == 0) or mode == "parallel"


def test_solve_reads_a_file(run, tmp_path):
    (tmp_path / "q.txt").write_text("a=7+3x4;b=2+5x3;c=a+b;c?\n")
    code, out, _ = run("solve", "--json", "--file", str(tmp_path / "q.txt"))
    assert code == 0 and json.loads(out)["question"] == "a=7+3x4;b=2+5x3;c=a+b;c?"


@pytest.mark.parametrize("args, names", [
    (["solve", "a=1+2;b=3+4;c=a+b;c?", "--mode", "quick"], ["quick", "parallel", "sequential", "autoregressive"]),
    (["solve", "a=1+2;b=3+4;c=a+b;c?", "--policy", "nobody"], ["nobody", "schoolbook-sft"]),
    (["solve"], ["no question"]),
    (["solve", "--file", "/no/such/file"], ["/no/such/file"]),
    (["solve", "a=1+2;b=3+4;c=a+b;c?", "--file", "questions.txt"], ["--file", "not both"]),
    (["solve", "-", "--file", "questions.txt"], ["--file", "not both"]),
    (["solve", "7*8\udcff?"], ["the question is not UTF-8", "udcff"]),
    (["train", "giant"], ["giant", "schoolbook-base", "schoolbook-sft"]),
    (["train", "schoolbook-base", "--out", __file__ + "/x"], [__file__]),
    (["evaluate", "--out", __file__ + "/x.json"], [__file__]),
    (["evaluate", "--domain", "cards"], ["cards", "programs, loops, schoolbook, words, gsm8k"]),
    (["evaluate", "--domain", "schoolbook", "--split", "test"], ["schoolbook keeps no test problems: choose dev"]),
    (["evaluate", "--split", "held"], ["unknown split 'held': choose train, dev or test"]),
    (["load", "--out", __file__ + "/x"], [__file__]),
    (["evaluate", "--family", "narrow"], ["unknown family 'narrow': choose one of wide, quick"]),
    (["evaluate", "--dtype", "int8"], ["unknown dtype 'int8': choose float32 or bfloat16"]),
    (["evaluate", "--mode", "quick"], ["quick", "parallel, sequential, autoregressive"]),
    (["demo", "--domain", "cards", "--out", "OUT"], ["cards", "programs, loops, schoolbook, words, gsm8k"]),
    (["gpu", "--out", __file__], [__file__]),
    (["gpu", "--out", "OUT", "--part", "bench"], ["bench", "cuda, steps, packing, pgrpo"]),
    (["demo", "--out", __file__], [__file__]),
    (["train", "giant", "--processes", "2"], ["giant", "schoolbook-base", "schoolbook-sft"]),
])
def test_mistakes_get_one_clear_line(run, tmp_path, args, names):
    code, out, err = run(*[str(tmp_path) if a == "OUT" else a for a in args])
    assert code == 2 and not out and len(err.strip().splitlines()) == 1 and "Traceback" not in err
    for name in names: assert name in err


def test_a_wrong_recipe_gets_a_dozen_names_at_most(run):
    _, _, err = run("train", "giant")
    assert len(err.split("choose one of ")[1].removesuffix(", or a .yaml file\n").split(", ")) <= 12


def test_questions_are_lines_as_an_editor_counts_them(run, tmp_path, monkeypatch):
    "A byte order mark is none of the question; form feeds and U+2028 do not end a line; a bad byte is found in its line."
    seen = []
    monkeypatch.setattr("threadweaver_ref.decode.generate", lambda model, tokenizer, questions, config: seen.append(questions) or [])
    text, lines = b"\xef\xbb\xbf1*2+3?\r\n\r4*5+6?\x0c+7?\n 8*9\xe2\x80\xa8\xc2\x85+1? ", ["1*2+3?", "4*5+6?\x0c+7?", "8*9\u2028\x85+1?"]
    (tmp_path / "q.txt").write_bytes(text)
    assert run("solve", "--file", str(tmp_path / "q.txt"))[0] == run("solve", stdin=text)[0] == run("solve", "-", stdin=text)[0] == 0
    assert seen == [lines] * 3
    bad = text + b"\r1*\xff?"
    (tmp_path / "bad.txt").write_bytes(bad)
    for args, name in [(["--file", str(tmp_path / "bad.txt")], f"{tmp_path}/bad.txt"), ([], "standard input")]:
        code, out, err = run("solve", *args, stdin=bad)
        assert (code, out, err) == (2, "", f"threadweaver-ref: {name}, line 5: these bytes are not UTF-8\n")


def test_warnings_are_shown_once(run, monkeypatch):
    "A rollout's warnings go to standard error and into the JSON; Python's own of the same words is not shown again, another one is."
    def warn(model, tokenizer, questions, config):
        warnings.warn("'abc?' is no sum", stacklevel=1); warnings.warn("the window is small", stacklevel=1)
        rollouts = generate(model, tokenizer, questions, config)
        for r in rollouts: r.warnings = ["'abc?' is no sum"]
        return rollouts
    from threadweaver_ref.decode import generate
    monkeypatch.setattr("threadweaver_ref.decode.generate", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, out, err = run("solve", "--json", stdin="a=7+3x4;b=2+5x3;c=a+b;c?\na=1+2;b=3+4;c=a+b;c?\n")
    assert code == 0 and err == "warning: 'abc?' is no sum\nwarning: the window is small\n"
    assert [json.loads(line)["warnings"] for line in out.splitlines()] == [["'abc?' is no sum"]] * 2


@pytest.mark.parametrize("error, line", [
    (ValueError(), "ValueError"), (MemoryError(), "MemoryError"), (ValueError("\n\n  at last\nmore"), "at last"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device"),
    (OSError(28, "No space left on device"), "No space left on device"),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), "is the disk full?"),
    (RuntimeError("CUDA out of memory. Tried"), "out of memory")])
def test_a_training_that_cannot_be_saved(run, monkeypatch, tmp_path, error, line):
    def fail(*args): raise error
    monkeypatch.setattr("threadweaver_ref.recipes.train_recipe", lambda *args, **options: (None, None, []))
    monkeypatch.setattr("threadweaver_ref.recipes.save_policy", fail)
    code, out, err = run("train", "schoolbook-base", "--runs", str(tmp_path))
    assert code == 2 and not out and line in err and len(err.splitlines()) == 1


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def fail(*args): raise RuntimeError("shapes do not match")
    monkeypatch.setattr(cli, "_questions", fail)
    monkeypatch.setattr(sys, "argv", ["threadweaver-ref", "solve"])
    with pytest.raises(RuntimeError, match="shapes do not match"): cli.main()


def test_a_stopped_training_says_where_it_goes_on(run, monkeypatch, tmp_path):
    def stop(*args, **options): raise KeyboardInterrupt
    monkeypatch.setattr("threadweaver_ref.recipes.train_recipe", stop)
    code, out, err = run("train", "schoolbook-base", "--runs", str(tmp_path), "--seed", "3")
    assert code == 130 and not out and err == f"stopped: the same command continues from the last checkpoint under {tmp_path}/seed-3\n"


def program(*args, stdin=b"", **env):
    "The command line in a process of its own: (exit code, output, errors), in bytes."
    command = [sys.executable, "-m", "threadweaver_ref.cli", *args]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=120, env={**os.environ, **env})
    return done.returncode, done.stdout, done.stderr


def test_bytes_that_are_no_text_in_a_real_process():
    "In the C locale Python reads such a byte as half a surrogate pair: found in an argument and on standard input alike."
    for args, stdin, words in [([], b"1*2+3?\n1*\xff?\n", b"standard input, line 2"), ([b"1*\xff?"], b"", b"the question is not UTF-8")]:
        code, out, err = program("solve", *args, stdin=stdin, LC_ALL="C")
        assert code == 2 and not out and words in err and err.count(b"\n") == 1


def test_a_terminal_that_knows_ascii_alone():
    code, out, err = program("solve", "--json", "--", "-é?".encode(), PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert code == 0 and json.loads(out.decode("ascii"))["question"] == "-é?" and b"Traceback" not in err


def test_domains(run):
    code, out, _ = run("domains")
    assert code == 0
    for name in ("gsm8k", "sums", "chain", "product", "nested"): assert f"schoolbook, {name}: " in out
    for name in ("wide", "quick", "chain", "mixed", "nested"): assert f"programs, {name}: " in out
    for name in ("wide", "quick", "chain", "mixed", "nested", "new wide"): assert f"\nwords, {name}: " in out
    assert out.count("in the best flat schedule") == 23 and out.count("\nloops, ") == 6 and "loops: 36 families more\n" in out
    assert "\nwords: 4 families more\ngsm8k, gsm8k: " in out


@pytest.fixture
def little(monkeypatch):
    "A domain of short schoolbook questions, forgotten again behind the test."
    monkeypatch.setitem(DOMAINS, "little", None)
    made = {"sums": lambda rng: sums(rng, 2, 1), "chain": lambda rng: chain(rng, 1, 99)}
    @domain(families=made)
    def little(rng, family): return made[family](rng)


def test_demo_writes_picture_and_numbers(run, tmp_path, little):
    code, out, _ = run("demo", "--problems", "5", "--domain", "little", "--policy", "schoolbook-sft", "--out", str(tmp_path))
    result = json.loads((tmp_path / "demo.json").read_text())
    assert code == 0 and (tmp_path / "timeline.png").stat().st_size > 1000 and [*result["reports"]] == ["sequential", "parallel"]
    for rows in result["reports"].values():
        assert [r["family"] for r in rows] == ["sums", "chain", "sums", "chain", "sums"] and len({r["question"] for r in rows}) == 5
    before, after = result["race"].values()
    assert before["question"] == after["question"] in {r["question"] for r in rows if r["family"] == "sums"}
    assert result["command"].endswith("--domain little")
    assert [*result["race"]] == ["without forks", "with forks"] and before["forks"] == 0 < after["forks"] and before["seconds"] > 0
    for words in ("with forks     fork: 1:", "with forks: answer: ", "token latency", "speedup over sequential", "schoolbook-sft, parallel mode, by"):
        assert words in out
    assert "warning" not in out.lower() and str(tmp_path) not in json.dumps(result)


@pytest.fixture
def evaluated(run, tmp_path, little):
    "`evaluate` over two problems of each little family, with further options, into one folder: what it said, and the lines of every file."
    def call(*options):
        code, out, err = run("evaluate", "--domain", "little", "--problems", "2", "--batch", "3", *options, "--out", str(tmp_path / "out"))
        return code, out, err, {f.name: [json.loads(line) for line in f.read_text().splitlines()] for f in sorted((tmp_path / "out").glob("*"))}
    return call


def test_evaluate_keeps_a_row_a_problem_and_names_its_command(evaluated, tmp_path):
    code, out, _, files = evaluated("--policy", "schoolbook-sft", "--timed", "1")
    assert code == 0 and [*files] == ["schoolbook-sft-parallel.jsonl", "schoolbook-sft-sequential.jsonl", "seconds-1.jsonl", "seconds-3.jsonl"]
    for mode in ("parallel", "sequential"):
        about, *rows = files[f"schoolbook-sft-{mode}.jsonl"]
        assert about["settings"]["mode"] == mode and about["run"] == f"schoolbook-sft-{mode}" and str(tmp_path) not in json.dumps(about)
        assert about["command"] == ("threadweaver-ref evaluate --domain little --split dev --problems 2 --policy schoolbook-sft --mode sequential "
                                    "--mode parallel --join concat --batch 3 --timed 1 --longest 4096 --out out")
        assert [r["family"] for r in rows] == ["sums"] * 2 + ["chain"] * 2 and all(r["correct"] for r in rows)
        assert all((r["forks"] > 0) == (mode == "parallel" and r["family"] == "sums") for r in rows)
    for batch in (1, 3):
        about, *rows = files[f"seconds-{batch}.jsonl"]
        assert about["batch"] == batch and [r["family"] for r in rows] == ["sums", "chain"] and all(r["schoolbook-sft-parallel"] > 0 for r in rows)
        assert f"{batch} at a time, schoolbook-sft-parallel: " in out
    assert "speedup over schoolbook-sft-sequential (95%)" in out and "times as fast as schoolbook-sft-sequential" in out
    for name in ("schoolbook-sft-sequential", "schoolbook-sft-parallel"): assert f"\n{name}:\n\n" in out


def test_a_stopped_evaluate_goes_on_and_another_one_is_refused(evaluated, tmp_path):
    evaluated("--mode", "sequential", "--policy", "schoolbook-sft")
    path = tmp_path / "out" / "schoolbook-sft-sequential.jsonl"
    whole = path.read_text()
    path.write_text(whole[:len(whole) * 2 // 3])
    code, *_ = evaluated("--mode", "sequential", "--policy", "schoolbook-sft")
    plain = lambda text: [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]
    assert code == 0 and plain(path.read_text()) == plain(whole) and len(plain(whole)) == 5
    code, out, err, _ = evaluated("--mode", "sequential", "--policy", "schoolbook-sft", "--join", "kv")
    assert code == 2 and not out and err.count("holds another report, its join differs: choose another file, or remove it") == 1


def test_evaluate_of_some_families(evaluated):
    _, _, _, files = evaluated("--policy", "schoolbook-sft", "--mode", "parallel", "--family", "chain")
    about, *rows = files["schoolbook-sft-parallel.jsonl"]
    assert [r["family"] for r in rows] == ["chain"] * 2 and "--problems 2 --family 'chain' --policy" in about["command"]


def test_evaluate_in_half_precision_says_so_and_decodes_so(evaluated, monkeypatch):
    from threadweaver_ref import decode
    seen, real = set(), decode.Reader
    monkeypatch.setattr(decode, "Reader", lambda model, *more: seen.update(p.dtype for p in model.parameters()) or real(model, *more))
    _, _, _, files = evaluated("--policy", "schoolbook-sft", "--mode", "parallel", "--dtype", "bfloat16")
    (about, *rows), = files.values()
    assert " --dtype bfloat16 --out " in about["command"] and len(rows) > 0 and seen == {torch.bfloat16}


def test_every_policy_may_have_its_own_join(evaluated):
    policies = ("--policy", "schoolbook-sft", "--policy", "tiny-result", "--mode", "parallel")
    _, _, _, files = evaluated(*policies, "--join", "concat", "--join", "result")
    heads = {name: rows[0] for name, rows in files.items()}
    assert {n: h["settings"]["join"] for n, h in heads.items()} == {"schoolbook-sft-parallel.jsonl": "concat", "tiny-result-parallel.jsonl": "result"}
    assert all("--join concat --join result --batch" in h["command"] for h in heads.values())
    code, _, err, _ = evaluated(*policies, *["--join", "kv"] * 3)
    assert code == 2 and "3 joins for 2 policies: give one for all, or one for each" in err
    code, _, err, _ = evaluated(*["--policy", "schoolbook-sft"] * 2, "--join", "concat", "--join", "kv")   # one would take the other's place
    assert code == 2 and "several policies are called 'schoolbook-sft': measure one at a time" in err


def test_load_keeps_its_rows_and_shows_ratios(run, tmp_path, little):
    code, out, _ = run("load", "--policy", "schoolbook-sft", "--domain", "little", "--problems", "1", "--size", "2", "--turns", "1", "--out",
                       str(tmp_path / "out"))
    about, *rows = (json.loads(line) for line in (tmp_path / "out" / "load.jsonl").read_text().splitlines())
    assert code == 0 and about["command"] == ("threadweaver-ref load --policy schoolbook-sft --domain little --split dev --problems 1 --size 2 "
                                              "--turns 1 --out out")
    assert [(r["way"], r["family"]) for r in rows] == [(w, f) for w in ("sequential", "parallel", "regulated") for f in ("sums", "chain")]
    assert "throughput / sequential" in out and out.count("100.0%") == 2


def test_policies_of_the_same_name_are_told_apart(evaluated, tmp_path):
    "`train` writes every policy to a folder called `policy`."
    for name in "ab": shutil.copytree(DATA / "policies" / "schoolbook-sft", tmp_path / name / "policy")
    code, *_, files = evaluated("--mode", "parallel", "--policy", str(tmp_path / "a" / "policy"), "--policy", str(tmp_path / "b" / "policy"))
    assert code == 2 or len(files) == 2


def test_gpu_says_what_it_did(run, tmp_path):
    code, out, _ = run("gpu", "--out", str(tmp_path), "--part", "cuda")
    assert code == 0 and (out.startswith("cuda: there is no CUDA GPU; 0 rows") or "rows" in out) and (tmp_path / "cuda.json").is_file()


@pytest.mark.slow
def test_train_in_two_processes(tmp_path):
    "One log and one policy come out, and both processes had a part in it."
    command = [sys.executable, "-m", "threadweaver_ref.cli", "train", "schoolbook-base", "--steps", "2", "--processes", "2"]
    command += ["--runs", str(tmp_path), "--out", str(tmp_path / "policy")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.count("saved") == 1 and (tmp_path / "policy" / "model.safetensors").is_file()
    assert [json.loads(line)["step"] for line in (tmp_path / "schoolbook-base" / "log.jsonl").read_text().splitlines()] == [1, 2]
    assert len(list((tmp_path / "schoolbook-base").glob("step-*/random_states_*"))) == 2
