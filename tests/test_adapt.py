"A model adapted to a file: what each stage is told, that a killed run goes on to the same weights, what is evaluated and exported."
import io
import json
import random
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers import TOKENIZERS, chat_tokenizer, tiny
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from threadweaver_ref import adapt as adapting
from threadweaver_ref import cli, selftrain
from threadweaver_ref.adapt import (Plan, adapt, answer_limits, evaluation_problems, export_policy, fine_tune, forget, measure, pgrpo_config,
                                    sft_config, start, trained_join, usable)
from threadweaver_ref.domains import Problem, RandomForks, Sequential, Step, training_problem, write_rows
from threadweaver_ref.format import render
from threadweaver_ref.forkjoin import ForkJoin, Limits
from threadweaver_ref.model import load_policy, save_policy, tiny_model
from threadweaver_ref.replay import play
from threadweaver_ref.tokenizer import char_tokenizer
from threadweaver_ref.yourdata import Row, Rows, read_yours, row_data

LITTLE = dict(sft_steps=2, rl_steps=2, batch=2, rl_batch=2, save_every=1)


@pytest.fixture(scope="module")
def rows():
    "Quick programs, which `mini-sft` can do, so that rollouts are short and some are correct."
    drawn = [training_problem(random.Random(seed), families=["quick"]) for seed in range(12)]
    return Rows([Row(i, p) for i, p in enumerate(sorted(drawn, key=lambda p: len(p.question)), 1)])


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("wrong, said", [(dict(sft_steps=-1), "sft_steps=-1: must not be negative"), (dict(join="sum"), "sum"),
                                         (dict(lora=-2), "lora=-2"), (dict(base="mini", lora=4), "lora=4: new weights"),
                                         (dict(sft_steps=0, rl_steps=0), "nothing to do"),
                                         (dict(batch=0), "batch=0: must be at least 1"),
                                         (dict(rl_batch=0), "rl_batch=0"), (dict(save_every=0), "save_every=0"),
                                         (dict(lr=0.0), "lr=0.0: must be above 0"),
                                         (dict(lr=-1.0), "lr=-1.0"), (dict(rl_lr=0.0), "rl_lr=0.0"), (dict(rl_lr=float("nan")), "rl_lr=nan"),
                                         (dict(lr=float("inf")), "lr=inf: must be above 0 and finite")])
def test_mistakes_in_a_plan(wrong, said):
    with pytest.raises(ValueError, match=said): Plan(**{"base": "mini-sft", **wrong})


def test_a_tiny_base_is_trained_in_all_its_weights_and_another_one_through_lora(monkeypatch):
    model, _ = start(Plan("mini-sft"))
    assert not isinstance(model, PeftModel) and not hasattr(model.config, "knows")
    assert hasattr(load_policy("mini-sft", device="cpu")[0].config, "knows")
    assert sft_config(Plan("mini-sft"), model).optimizer == "muon"
    adapted, _ = start(Plan("mini-sft", lora=4))
    config = adapted.peft_config["default"]
    assert isinstance(adapted, PeftModel) and config.r == 4 and config.base_model_name_or_path == "mini-sft"
    monkeypatch.setattr(adapting, "TINY", 1000)
    assert isinstance(start(Plan("mini-sft"))[0], PeftModel) and not isinstance(start(Plan("mini-sft", lora=0))[0], PeftModel)
    assert sft_config(Plan("mini-sft"), adapted).optimizer == "adamw" and same(adapted, start(Plan("mini-sft", lora=4))[0])


def test_an_adapter_as_a_base_is_merged_or_refused(rows, tmp_path):
    adapt(rows, tmp_path, Plan("mini-sft", **{**LITTLE, "rl_steps": 0}, lora=4, lr=.01))
    merged, _ = start(Plan(str(tmp_path / "policy")))
    assert not isinstance(merged, PeftModel) and not same(merged, load_policy("mini-sft", device="cpu")[0])
    assert all(p.requires_grad for p in merged.parameters())   # it was loaded for decoding
    with pytest.raises(ValueError, match="is an adapter, on which no other can be put: export it"): start(Plan(str(tmp_path / "policy"), lora=4))


def test_new_weights_by_seed():
    assert same(start(Plan("mini"))[0], start(Plan("mini"))[0]) and not same(start(Plan("mini"))[0], start(Plan("mini", seed=1))[0])


def test_what_the_twin_is_told(rows):
    model, tokenizer = start(Plan("mini"))
    own, twin = Plan("mini"), Plan("mini", twin=True)
    assert isinstance(sft_config(own, model).arrangement, RandomForks) and sft_config(own, model).sequential > 0
    told = sft_config(twin, model)
    assert told.arrangement == Sequential() and told.autoregressive == 0
    limits = answer_limits(rows.rows, tokenizer)
    assert pgrpo_config(own, limits).mode == "parallel" and pgrpo_config(twin, limits).mode == "sequential"


def test_limits_of_an_answer():
    steps = [Step("a", (), "a", "x" * 50), Step("b", (), "b", "y" * 40)]
    needed = (2 + 2 * 5 + 1) + 3 * (50 + 1)   # the outlines; then equal shares for both threads and the line behind them
    row, tokenizer = Row(1, Problem("?", "1", "yours", steps, closing="\\boxed{1}")), char_tokenizer()
    assert answer_limits([row], tokenizer).max_tokens == answer_limits([row], tokenizer).max_thread_tokens == 32 + 3 * needed // 2
    forked = Row(1, Problem("?", "1", "yours"), render(RandomForks(1, whole=1).arrange(row.problem)))
    assert answer_limits([forked], tokenizer) == answer_limits([row], tokenizer)
    assert answer_limits([Row(1, Problem("?", "1", "yours"), "z" * 200)], tokenizer).max_tokens == 32 + 3 * 201 // 2
    assert answer_limits([Row(1, Problem("?", "1", "yours"))], tokenizer).max_tokens == 2048
    usual, many = answer_limits([row], tokenizer), [Step(str(i), (), "o", "x") for i in range(40)]
    wide = answer_limits([row, Row(1, Problem("?", "1", "yours", many, closing="\\boxed{1}"))], tokenizer)
    assert (usual.max_threads, usual.max_forks, usual.max_depth) == (32, 16, 3) and (wide.max_threads, wide.max_forks, wide.max_depth) == (40, 16, 3)


def test_a_fork_of_unequal_threads_fits_into_the_limits():
    "The model writes what the row says; no thread is cut."
    steps = [Step("a", (), "a", "x" * 400), Step("b", (), "b", "y" * 20)]
    p, tokenizer = Problem("?", "1", "yours", steps, closing="\\boxed{1}"), char_tokenizer()
    trajectory = RandomForks(1, whole=1).arrange(p)
    machine = ForkJoin([5], tokenizer, limits=answer_limits([Row(1, p)], tokenizer))
    for _, branch, ids in play(trajectory, [5], tokenizer): machine.feed(next(b for b in machine.ready if b.path == branch.path), ids)
    assert machine.text == render(trajectory) and not machine.errors


def test_rows_that_a_join_cannot_use(rows, tmp_path):
    p = rows.rows[0].problem
    bare = Row(99, Problem(p.question, "1", "yours", [Step("a", (), "a", "x"), Step("b", (), "b", "y", "z")], closing="\\boxed{1}"))
    assert usable([bare], char_tokenizer())[0] == usable([bare])[0] == [bare]
    good, faults = usable([bare], join="result")
    assert not good and [str(f) for f in faults] == ["line 99: step 'a' has no result, which join 'result' hands back"]
    said = []
    with pytest.raises(ValueError, match="no row of the training split is left"):
        adapt(Rows([bare]), tmp_path, Plan("mini", join="result", sft_steps=1, rl_steps=0), on_faults=said.extend)
    assert said == faults


def test_both_stages_recompute_on_request():
    model, _ = start(Plan("mini"))
    for on in (False, True):
        plan = Plan("mini", gradient_checkpointing=on)
        assert sft_config(plan, model).gradient_checkpointing is pgrpo_config(plan, Limits()).gradient_checkpointing is on


def test_a_start_moves_to_the_device_before_it_decodes(rows, monkeypatch):
    "What the references and the rollouts are decoded on: where the training will be."
    class Elsewhere: device = torch.device("meta")
    class Seen(Exception): pass
    def look(model, *_, **__): raise Seen(next(model.parameters()).device.type)
    monkeypatch.setattr(adapting, "Accelerator", Elsewhere)
    for owner, name, stage in ((adapting, "kept_references", adapting.reinforce), (selftrain, "digest", adapting.train_itself)):
        monkeypatch.setattr(owner, name, look)
        with pytest.raises(Seen, match="meta"): stage(*start(Plan("mini")), rows.rows, Plan("mini", selftrain=1), "unused")


def test_a_killed_self_training_goes_on_with_its_trees(rows, tmp_path, monkeypatch):
    "Nothing is sampled again, so that the same rollouts are learned wherever it goes on."
    plan = Plan("mini-sft", **{**LITTLE, "sft_steps": 1, "rl_steps": 0}, selftrain=4)
    whole, _, logs = adapt(rows, tmp_path, plan)
    shutil.rmtree(tmp_path / "runs" / "selftrain")   # as if it had been killed before its first checkpoint
    def refuse(*args, **options): raise AssertionError("sampled again")
    monkeypatch.setattr(selftrain, "sample_kept", refuse)
    again, _, more = adapt(rows, tmp_path, plan)
    assert same(whole, again) and more["selftrain"][0]["loss"] == logs["selftrain"][0]["loss"]
    with pytest.raises(AssertionError): adapt(rows, tmp_path, replace(plan, selftrain=5))


def test_rows_that_a_model_cannot_take(rows):
    bad = Row(99, Problem("Schön?", "1", "yours"))
    good, faults = usable([*rows.rows, bad], char_tokenizer(), 4096)
    assert good == rows.rows and [str(f) for f in faults] == ["line 99: the tokenizer does not know 'ö'"]
    said, bad = [], next(r for r in (Row(99, Problem(f"Schön {i}?", "1", "yours")) for i in range(99)) if r.split == "train")
    with pytest.raises(ValueError, match="no row of the training split is left"): adapt(Rows([bad]), "unused", Plan("mini"), on_faults=said.extend)
    assert said == faults


def test_nothing_to_fine_tune_on():
    model, tokenizer = start(Plan("mini"))
    with pytest.raises(ValueError, match="sft_steps=0 goes straight to P-GRPO"):
        fine_tune(model, tokenizer, [Row(1, Problem("?", "1", "yours"))], Plan("mini"), None)


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_killed_training_goes_on_to_the_same_weights(rows, tmp_path, stage):
    plan = Plan("mini-sft", **LITTLE)
    def kill(step, row):
        if step == 1 and ("reward" in row) == (stage == "rl"): raise KeyboardInterrupt
    whole, _, logs = adapt(rows, tmp_path / "whole", plan)
    with pytest.raises(KeyboardInterrupt): adapt(rows, tmp_path / "killed", plan, kill)
    assert not (tmp_path / "killed" / "policy").exists()
    again, _, _ = adapt(rows, tmp_path / "killed", plan)
    assert same(whole, again) and [*logs] == ["sft", "rl"] and not isinstance(whole, PeftModel)
    assert not same(whole, load_policy("mini-sft", device="cpu")[0]) and same(whole, load_policy(tmp_path / "killed" / "policy", device="cpu")[0])
    with pytest.raises(ValueError, match="holds a run with another"): adapt(rows, tmp_path / "killed", replace(plan, lr=1e-4))


def test_what_each_stage_is_handed(rows, tmp_path, monkeypatch):
    "Settings that no result of a few steps would show: what is kept, how far rates fall, what a right answer is paid."
    handed = {}
    def take(name, result): return lambda *args, **options: handed.update({name: args}) or result
    monkeypatch.setattr(adapting, "train_sft", take("sft", [{}]))
    monkeypatch.setattr(selftrain, "sample_kept", take("sampled", []))
    monkeypatch.setattr(selftrain, "kept_trees", lambda path, of, sample: sample())
    monkeypatch.setattr(adapting, "train_on_kept", take("kept", [{}]))
    monkeypatch.setattr(adapting, "train_pgrpo", take("rl", [{}]))
    monkeypatch.setattr(adapting, "kept_references", lambda model, tokenizer, problems, config: {p.question: 100 for p in problems})
    steps = [Step("a", (), "a", "A"), Step("b", (), "b", "B")]
    forked = render(RandomForks(1, whole=1).arrange(Problem("?", "1", "yours", steps, closing="\\boxed{1}")))
    texts = [Row(i, Problem(q, "1", "yours"), forked) for i, q in enumerate(f"{i}?" for i in range(90))]
    texts = Rows([r for r in texts if r.split == "train"])
    for twin in (False, True):
        adapt(texts, tmp_path / str(twin), Plan("mini-sft", selftrain=3, twin=twin, lr=.02))
        trees, rl = handed["sft"][2], handed["rl"][3]
        assert any(len(t) > 2 for t in trees) is not twin                           # a twin sees no fork, of texts either
        _, _, problems, decoding, group, better = handed["sampled"]
        assert len(problems) == 3 and group == 4 and (decoding.mode, decoding.temperature) == ("sequential" if twin else "parallel", 1.0)
        slow, fast = (type("R", (), {"token_latency": n})() for n in (90, 50))
        assert better(fast, None) > better(slow, None)
        assert handed["kept"][3].lr == .002 and (rl.temperature, rl.sequential) == (.7, 0 if twin else .2)
        assert (handed["rl"][4].rho, handed["rl"][4].clip) == (1, .8) and set(handed["rl"][4].references.values()) == {100}


def test_a_policy_of_another_kind_is_replaced(rows, tmp_path):
    "An adapter, then a whole model, into one folder: no file of the first stays beside the second."
    adapt(rows, tmp_path, Plan("mini-sft", **{**LITTLE, "rl_steps": 0}, lora=4))
    shutil.rmtree(tmp_path / "runs")
    whole, *_ = adapt(rows, tmp_path, Plan("mini-sft", **{**LITTLE, "rl_steps": 0}))
    assert not (tmp_path / "policy" / "adapter_config.json").exists() and same(whole, load_policy(tmp_path / "policy", device="cpu")[0])
    assert {f.name for f in tmp_path.iterdir()} == {"runs", "policy", "plan.json"}


def test_a_policy_never_takes_the_place_of_its_base_or_of_something_else(rows, tmp_path):
    adapt(rows, tmp_path / "one", Plan("mini-sft", **{**LITTLE, "rl_steps": 0}))
    place = tmp_path / "one" / "policy"
    before = {f.name: f.read_bytes() for f in place.iterdir()}
    with pytest.raises(ValueError, match="one/policy is the base itself: choose another folder"):
        adapt(rows, tmp_path / "one", Plan(str(place), **{**LITTLE, "sft_steps": 0}, lora=4))
    (tmp_path / "two" / "policy").mkdir(parents=True)
    (tmp_path / "two" / "policy" / "insurance.pdf").write_text("mine")
    with pytest.raises(ValueError, match="two/policy is no policy folder"): adapt(rows, tmp_path / "two", Plan("mini-sft", **LITTLE))
    assert before == {f.name: f.read_bytes() for f in place.iterdir()} and (tmp_path / "two" / "policy" / "insurance.pdf").exists()
    assert not (tmp_path / "one" / "runs" / "rl").exists() and not (tmp_path / "two" / "runs").exists()


def test_two_processes_adapt_as_one_does(data, tmp_path):
    "All three stages, by the command: one policy comes out, and what is said is said once."
    command = [sys.executable, "-m", "threadweaver_ref.cli", "adapt", "train", "--base", "mini-sft", "--data", str(data), "--sft-steps", "1",
               "--selftrain", "2", "--rl-steps", "1", "--batch", "2", "--rl-batch", "2"]
    def train(out, *more): return subprocess.run([*command, "--out", str(out), *more], check=True, capture_output=True, text=True, timeout=300)
    train(tmp_path / "one")
    done = train(tmp_path / "two", "--processes", "2")
    assert done.stdout.count("saved") == 1 and done.stderr.count("line 14: no answer") == 1
    one, two = (load_policy(tmp_path / n / "policy", device="cpu")[0].state_dict() for n in ("one", "two"))
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)
    assert len(list((tmp_path / "two" / "runs" / "sft").glob("step-*/random_states_*"))) == 2   # both had a part in it


def test_self_training_and_a_twin_that_never_forks(rows, tmp_path):
    plan = Plan("mini-sft", **{**LITTLE, "sft_steps": 1, "rl_steps": 1}, selftrain=2, twin=True)
    model, tokenizer, logs = adapt(rows, tmp_path, plan)
    assert [*logs] == ["sft", "selftrain", "rl"] and logs["rl"][0]["fork_rate"] == 0 and (tmp_path / "twin" / "policy" / "config.json").is_file()
    assert json.loads((tmp_path / "twin" / "plan.json").read_text())["twin"] is True and not (tmp_path / "policy").exists()


def test_an_adapter_is_saved_and_exported_merged(rows, tmp_path):
    adapt(rows, tmp_path, Plan("mini-sft", **{**LITTLE, "rl_steps": 0}, lora=4, lr=.01))
    assert (tmp_path / "policy" / "adapter_config.json").is_file() and not (tmp_path / "policy" / "model.safetensors").exists()
    probe = rows.rows[0].problem.question
    assert export_policy(tmp_path / "policy", tmp_path / "out", probe=probe) < 1e-4
    assert export_policy(tmp_path / "policy", tmp_path / "half", "bfloat16", probe) > 1e-4
    plain, reader = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    adapted, tokenizer = load_policy(tmp_path / "policy", device="cpu")
    ids = torch.tensor([reader.encode(probe)])
    assert ids[0].tolist() == tokenizer.encode(probe) and not hasattr(plain.config, "knows")
    with torch.no_grad(): assert torch.allclose(plain(ids).logits, adapted(ids).logits, atol=1e-4)
    assert not torch.allclose(plain(ids).logits, load_policy("mini-sft", device="cpu")[0](ids).logits, atol=1e-2)
    with pytest.raises(ValueError, match="unknown dtype 'float8': choose float32 or bfloat16"): export_policy("mini-sft", tmp_path / "x", "float8")


def test_what_is_evaluated():
    wide = Problem("w?", "1", "yours", [Step(f"{i}", (), "o", ".") for i in range(13)], closing="\\boxed{1}")
    questions = [f"{i}?" for i in range(60)]
    rows = Rows([Row(i, Problem(q, "1", "yours")) for i, q in enumerate(questions * 2)])
    dev = [q for q in questions if Row(1, Problem(q, "1", "yours")).split == "dev"]
    assert [p.question for p in evaluation_problems(rows, "dev")] == dev and len(evaluation_problems(rows, "dev", 2)) == 2
    rows = Rows([Row(1, replace(wide, question=dev[0]))])
    assert evaluation_problems(rows)[0].steps == () and evaluation_problems(rows)[0].answer == "1"
    with pytest.raises(ValueError, match="no row belongs to the test split"): evaluation_problems(rows, "test")
    steps, text = Row(1, Problem(dev[0], "1", "yours", wide.steps[:2], closing="\\boxed{1}")), Row(2, Problem(dev[0], "1", "yours"), "\\boxed{1}")
    assert evaluation_problems(Rows([steps, text])) == evaluation_problems(Rows([text, steps])) == [steps.problem]


def test_the_twin_is_what_the_others_are_compared_with(rows):
    problems = [r.problem for r in rows.rows[:3]]
    limits = Limits(max_tokens=300, max_thread_tokens=300)
    assert [*measure("mini-sft", problems, limits=limits)] == ["sequential", "parallel"]
    reports = measure("mini-sft", problems, "mini-sft", limits=limits)
    assert [*reports] == ["twin", "sequential", "parallel"] and all(len(r.rows) == 3 for r in reports.values())
    assert all(r["forks"] == 0 for name in ("twin", "sequential") for r in reports[name].rows)


def test_limits_of_an_evaluation(rows):
    problems = [r.problem for r in rows.rows[:1]]
    given = Limits(40, 50, 60, 70, 70)
    found = [measure("mini-sft", problems, limits=limits)["parallel"].about["settings"]["limits"] for limits in (None, given)]
    assert found == [str(answer_limits(rows.rows[:1], char_tokenizer())), str(given)]


def test_the_join_that_a_policy_was_trained_with(tmp_path):
    assert trained_join("Qwen/Qwen3-0.6B") == trained_join(tmp_path) == "concat"
    (tmp_path / "policy").mkdir()
    (tmp_path / "plan.json").write_text(json.dumps({"join": "kv"}))
    assert trained_join(tmp_path) == trained_join(str(tmp_path / "policy")) == "kv" and trained_join(tmp_path / "other") == "concat"


def test_an_export_never_replaces_the_policy(rows, tmp_path):
    plain, lora = tmp_path / "policy", tmp_path / "lora"
    save_policy(*load_policy("mini-sft", device="cpu"), plain)
    weights = (plain / "model.safetensors").read_bytes()
    save_policy(adapting.add_adapters(load_policy(plain, device="cpu")[0], Plan(str(plain))), char_tokenizer(), lora)
    for policy, folder in ((plain, lora / ".." / "policy"), (lora, lora), (lora, plain)):   # the last one is the base
        with pytest.raises(ValueError, match="the policy itself lies there"): export_policy(policy, folder, "bfloat16")
    assert (plain / "model.safetensors").read_bytes() == weights and not (lora / "config.json").exists()


def test_forgetting_twice_does_no_harm():
    model, _ = load_policy("mini-sft", device="cpu")
    forget(model), forget(model)
    assert not hasattr(model.config, "knows")


# ---- the command line

@pytest.fixture
def run(monkeypatch, capsys):
    "Run `threadweaver-ref adapt ARGS`: (exit code, what it printed, what it complained of)."
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["threadweaver-ref", "adapt", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        with pytest.raises(SystemExit) as stop: cli.main()
        printed = capsys.readouterr()
        return stop.value.code or 0, printed.out, printed.err
    return call


@pytest.fixture
def data(rows, tmp_path):
    "A file of 12 rows for training, 2 of the dev split and 1 that is spoiled."
    dev = [{"question": q, "answer": "3"} for q in (f"a=1+{i};a?" for i in range(99)) if Row(1, Problem(q, "3", "yours")).split == "dev"]
    write_rows(tmp_path / "yours.jsonl", [*(row_data(r.problem) for r in rows.rows), dev[0], {"question": "?"}])
    return tmp_path / "yours.jsonl"


def test_check(run, data):
    code, out, err = run("check", data)
    assert code == 1 and not err and out.startswith(f"{data}, line 14: no answer\n")
    assert "\nrows: 13 good, 1 left out; 12 with steps, 0 with a text (0 fork), 1 a question alone\n" in out
    assert "in characters: best flat speedup 1.0" in out and "split, by a hash of the question: 12 train, 1 dev, 0 test" in out
    data.write_bytes(b"\n".join(data.read_bytes().split(b"\n")[:12]).replace(b"\n", b"\r\n"))
    code, out, _ = run("check", data, "--base", "mini-sft")
    assert code == 0 and "in tokens of mini-sft" in out and f"{data}: Windows line ends, which do no harm, from line 1 on" in out
    with data.open("a", encoding="utf-8") as f: f.write('\n{"question": "Schön?", "answer": "1"}')
    code, out, _ = run("check", data, "--base", "mini-sft")
    assert code == 1 and f"{data}, line 13: the tokenizer does not know 'ö'" in out and "12 good, 1 left out" in out
    data.write_text(json.dumps({"question": "?", "answer": "1", "steps": [{"name": n, "work": "x", "outline": n} for n in "ab"]}))
    code, out, _ = run("check", data, "--join", "result")
    assert code == 1 and f"{data}, line 1: step 'b' has no result" in out and run("check", data)[0] == 0


def test_check_says_where_blanks_stand_badly(run, tmp_path):
    tokenizer, data = TOKENIZERS["bpe"](), tmp_path / "yours.jsonl"
    save_policy(tiny_model("mini", tokenizer), tokenizer, tmp_path / "base")
    def row(*texts): return {"question": "".join(texts), "answer": "1", "steps": [{"name": t, "work": t, "outline": "o"} for t in texts]}
    data.write_text("\n".join(map(json.dumps, [row("one. ", "two. "), row(" one.", " two."), row("two. ", "three. ")])))
    said = "2 rows have a blank where a fork could be, a token of its own there: write it in front of the next step's text\n"
    assert run("check", data, "--base", tmp_path / "base")[1].endswith(said) and "blank" not in run("check", data, "--base", "mini-sft")[1]


def test_rewrite(run, tmp_path):
    text = "3*4=12 for Ann. 5*7=35 for Bob. 12+35=47. \\boxed{47}"
    said = {"question": "Ann buys 3 pens for 4, Bob 5 for 7. Together?", "answer": "47", "text": text}
    write_rows(tmp_path / "a.jsonl", [said, {"question": "?", "answer": "b", "text": "Well. \\boxed{b}"}, {"question": "b"}])
    before = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    for same_file in (tmp_path / "a.jsonl", tmp_path / "link.jsonl"):
        code, out, err = run("rewrite", tmp_path / "a.jsonl", "--out", same_file)
        assert code == 2 and not out and "is the file itself" in err and (tmp_path / "a.jsonl").read_bytes() == before
    code, out, err = run("rewrite", tmp_path / "a.jsonl", "--out", tmp_path / "new" / "b.jsonl")
    assert code == 0 and "2 rows, 1 of them rewritten" in out and "line 2: stays as it is: no piece" in err and "line 3: no answer" in err
    assert [r.kind for r in read_yours(tmp_path / "new" / "b.jsonl").rows] == ["steps", "text"]


@pytest.fixture
def scripted():
    "A server that gives replies in turn, each (status, text of the model): (address, replies to be filled, requests)."
    replies, asked = [], []
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            status, said = replies.pop(0)
            body = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", replies, asked
    server.shutdown()
    server.server_close()


def test_rewrite_by_a_model_behind_a_server(run, scripted, tmp_path):
    "It answers the first row with nonsense, then well; the second not at all, four times; the third well, at the second attempt. No row is lost."
    url, replies, asked = scripted
    texts = ["Ann: 3*4=12. Bob: 5*7=35. \\boxed{47}", "3+4=7. 7+5=12. \\boxed{12}", "1+1=2. 2+2=4. \\boxed{4}"]
    write_rows(tmp_path / "a.jsonl", [{"question": f"{i}?", "answer": a, "text": t} for i, (a, t) in enumerate(zip(("47", "12", "4"), texts))])
    good = '[{"pieces": [1], "needs": [], "outline": "pens"}, {"pieces": [2], "needs": [], "outline": "books"}]'
    replies += [(200, "No."), (200, f"<think>[1] and [2]?</think> {good} as [asked]."), *[(500, "broken")] * 4, (503, "busy"), (200, good)]
    code, out, err = run("rewrite", tmp_path / "a.jsonl", "--out", tmp_path / "b.jsonl", "--url", f"{url}/v1", "--model", "m")
    assert code == 0 and "3 rows, 2 of them rewritten" in out and not replies
    assert err.strip().startswith(f"{tmp_path / 'a.jsonl'}, line 2: stays as it is: ") and "status 500" in err and len(err.strip().splitlines()) == 1
    found = read_yours(tmp_path / "b.jsonl").rows
    assert [r.kind for r in found] == ["steps", "text", "steps"] and [s.outline for s in found[0].problem.steps] == ["pens", "books"]
    path, body = asked[1]
    assert path == "/v1/chat/completions" and body["model"] == "m" and body["temperature"] == 0
    assert "could not be used: it holds no JSON list" in body["messages"][0]["content"] and body["messages"][0]["role"] == "user"
    code, out, err = run("rewrite", tmp_path / "a.jsonl", "--out", tmp_path / "c.jsonl", "--url", url)
    assert code == 2 and "--url and --model go together" in err


def test_a_stopped_rewriting_is_kept_and_said_by_the_exit_code(run, monkeypatch, tmp_path):
    def ask(prompt): raise KeyboardInterrupt
    monkeypatch.setattr("threadweaver_ref.cli_adapt._asking", lambda url, model: ask)
    write_rows(tmp_path / "a.jsonl", [{"question": "1?", "answer": "47", "text": "Ann: 3*4=12. Bob: 5*7=35. \\boxed{47}"}])
    code, out, err = run("rewrite", tmp_path / "a.jsonl", "--out", tmp_path / "b.jsonl", "--url", "http://x", "--model", "m")
    assert code == 130 and "stopped here" in err and len(read_yours(tmp_path / "b.jsonl").rows) == 1


def test_what_a_killed_rewriting_has_done_is_kept(run, monkeypatch, tmp_path):
    "By a kill that no handler sees: the rows so far are in a file beside."
    class Killed(BaseException): pass
    def ask(prompt):
        if "second" in prompt: raise Killed
        return '[{"pieces": [1], "needs": [], "outline": "pens"}, {"pieces": [2], "needs": [], "outline": "books"}]'
    monkeypatch.setattr("threadweaver_ref.cli_adapt._asking", lambda url, model: ask)
    text = "Ann: 3*4=12. Bob: 5*7=35. \\boxed{47}"
    write_rows(tmp_path / "a.jsonl", [{"question": q, "answer": "47", "text": text} for q in ("first?", "second?")])
    with pytest.raises(Killed): run("rewrite", tmp_path / "a.jsonl", "--out", tmp_path / "b.jsonl", "--url", "http://x", "--model", "m")
    assert [r.kind for r in read_yours(tmp_path / "b.jsonl.part").rows] == ["steps"]
    (tmp_path / "taken").mkdir()
    code, _, err = run("rewrite", tmp_path / "a.jsonl", "--out", tmp_path / "taken", "--url", "http://x", "--model", "m")   # before anything is asked
    assert code == 2 and "taken" in err and err.count("\n") == 1


def test_mistakes_are_said_once_not_by_every_process(run, data, monkeypatch, tmp_path):
    monkeypatch.setattr("threadweaver_ref.cli_adapt.in_processes", lambda n: pytest.fail("it began"))
    for base, file, said in (("mini-sft", tmp_path / "missing.jsonl", "missing.jsonl"), ("mini-sfff", data, "no policy 'mini-sfff'")):
        code, _, err = run("train", "--base", base, "--data", file, "--out", tmp_path / "out", "--processes", "2")
        assert code == 2 and said in err


def test_a_pretrained_kind_of_model_goes_the_whole_way(run, tmp_path):
    "Pieces of words, a chat template, an end of turn, LoRA: from a file to a merged folder that Transformers loads and that forks."
    tokenizer = chat_tokenizer()
    save_policy(tiny("Llama", tokenizer, max_position_embeddings=1024), tokenizer, tmp_path / "base")
    def step(n): return {"name": f"{n}", "needs": [], "outline": f"look at {n}", "work": f" {n} is there and it is {n}."}
    def row(i): return {"question": f"What are {i} and {i + 1}?", "answer": f"{2 * i + 1}", "steps": [step(i), step(i + 1)],
                        "closing": f" So \\boxed{{{2 * i + 1}}}"}
    write_rows(tmp_path / "a.jsonl", map(row, range(90)))
    code, out, err = run("check", tmp_path / "a.jsonl", "--base", tmp_path / "base")
    assert code == 0 and "90 good" in out
    code, out, err = run("train", "--base", tmp_path / "base", "--data", tmp_path / "a.jsonl", "--out", tmp_path / "run", "--lora", 4,
                         "--sft-steps", 2, "--rl-steps", 1, "--batch", 2, "--rl-batch", 1)
    assert code == 0 and "rl: 1 steps" in out and (tmp_path / "run" / "policy" / "adapter_config.json").is_file()
    code, out, err = run("eval", "--policy", tmp_path / "run", "--data", tmp_path / "a.jsonl", "--problems", 2, "--longest", 40)
    assert code == 0 and "sequential" in out and "parallel" in out
    code, out, err = run("export", "--policy", tmp_path / "run", "--out", tmp_path / "merged")
    assert code == 0 and (tmp_path / "merged" / "custom_generate" / "generate.py").is_file()
    alone, reader = (auto.from_pretrained(tmp_path / "merged") for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert reader.chat_template == tokenizer.chat_template and len(reader) == len(load_policy(tmp_path / "run" / "policy", device="cpu")[1])
    ids = reader("What?", return_tensors="pt").input_ids
    found = alone.generate(ids, custom_generate=str(tmp_path / "merged"), trust_remote_code=True, max_new_tokens=8, tokenizer=reader)
    assert found.shape[1] > ids.shape[1]


def test_train_eval_export(run, data, tmp_path):
    short = ("--sft-steps", 1, "--rl-steps", 1, "--batch", 2, "--rl-batch", 1)
    common = ("train", "--base", "mini-sft", "--data", data, "--out", tmp_path / "run", *short)
    code, out, err = run(*common)
    assert code == 0 and "line 14: no answer" in err and "sft: 1 steps; the last one: loss" in out
    assert f"saved {tmp_path / 'run' / 'policy'} after" in out
    (tmp_path / "run" / "plan.json").write_text(json.dumps({"join": "kv"}))   # as if it had been trained so
    code, out, err = run("eval", "--policy", tmp_path / "run", "--data", data, "--problems", 1, "--out", tmp_path / "other")
    assert code == 0 and "no twin to compare with: train one with `adapt train --twin --out run`" in err
    about = json.loads((tmp_path / "other" / "parallel.jsonl").read_text().splitlines()[0])
    longest = answer_limits(read_yours(data).rows, char_tokenizer()).max_tokens
    assert about["settings"]["join"] == "kv" and about["command"].endswith(f"--join kv --longest {longest}")
    code, out, err = run("eval", "--policy", tmp_path / "run", "--data", data, "--longest", 200, "--join", "concat", "--out", tmp_path / "results")
    assert code == 0 and "no twin to compare with" in err and "speedup over sequential" in out
    code, out, _ = run(*common, "--twin")
    assert code == 0 and f"saved {tmp_path / 'run' / 'twin' / 'policy'} after" in out
    code, out, err = run("eval", "--policy", tmp_path / "run", "--data", data, "--longest", 200, "--join", "concat", "--out", tmp_path / "results")
    assert code == 0 and "speedup over twin" in out and "no twin" not in err
    about = json.loads((tmp_path / "results" / "twin.jsonl").read_text().splitlines()[0])
    assert about["command"] == "threadweaver-ref adapt eval --policy run --data yours.jsonl --split dev --batch 64 --join concat --longest 200"
    assert str(tmp_path) not in json.dumps(about)
    code, out, err = run("eval", "--policy", "mini-sft", "--data", data, "--longest", 50, "--problems", 1, "--twin", tmp_path / "run" / "twin")
    assert code == 0 and "speedup over twin" in out
    code, out, _ = run("export", "--policy", tmp_path / "run", "--out", tmp_path / "exported")
    assert code == 0 and (tmp_path / "exported" / "model.safetensors").is_file() and "log-probabilities differ by at most" in out


def test_what_a_policy_cannot_take_is_not_counted_as_wrong(run, data):
    dev = [q for q in (f"Schön {i}?" for i in range(99)) if Row(1, Problem(q, "3", "yours")).split == "dev"]
    with data.open("a", encoding="utf-8") as f: f.write(json.dumps({"question": dev[0], "answer": "1"}) + "\n")
    code, out, err = run("eval", "--policy", "mini-sft", "--data", data, "--longest", 100)
    assert code == 0 and f"{data}, line 15: the tokenizer does not know 'ö'" in err and "no twin to compare with: give one with --twin" in err
    assert "speedup over sequential" in out


@pytest.mark.parametrize("args, said", [
    (("check", "nothing.jsonl"), "nothing.jsonl"), (("check", "DATA", "--base", "nobody"), "nobody"),
    (("train", "--base", "mini-sft", "--data", "nothing.jsonl", "--out", "OUT"), "nothing.jsonl"),
    (("train", "--base", "mini-sft", "--data", "DATA", "--out", "OUT", "--sft-steps", "0", "--rl-steps", "0"), "nothing to do"),
    (("train", "--base", "mini-sft", "--data", "DATA", "--out", "OUT", "--join", "sum"), "sum"),
    (("eval", "--policy", "mini-sft", "--data", "DATA", "--split", "train"), "unknown split 'train': choose dev or test"),
    (("eval", "--policy", "nobody", "--data", "DATA"), "nobody"),
    (("eval", "--policy", "mini-sft", "--data", "DATA", "--split", "test"), "no row belongs to the test split"),
    (("export", "--policy", "nobody", "--out", "OUT"), "nobody"), (("export", "--policy", "mini-sft", "--out", "OUT", "--dtype", "int8"), "int8")])
def test_mistakes_get_one_clear_line(run, data, tmp_path, args, said):
    data.write_bytes(b"\n".join(data.read_bytes().split(b"\n")[:13]))   # without the spoiled row
    code, out, err = run(*[{"DATA": data, "OUT": tmp_path / "out"}.get(a, a) for a in args])
    assert code == 2 and not out and len(err.strip().splitlines()) == 1 and said in err


def test_the_settings_of_train_reach_the_plan(run, data, monkeypatch, tmp_path):
    plans = []
    monkeypatch.setattr("threadweaver_ref.adapt.adapt", lambda rows, out, plan, **options: plans.append(plan) or (None, None, {}))
    base = ("train", "--base", "m", "--data", data, "--out", tmp_path / "out")
    assert run(*base)[0] == run(*base, "--gradient-checkpointing", "--join", "kv", "--lr", .1, "--twin", "--seed", 3)[0] == 0
    assert plans == [Plan("m"), Plan("m", gradient_checkpointing=True, join="kv", lr=.1, twin=True, seed=3)]
    code, out, err = run(*base, "--lr", 0)
    assert code == 2 and not out and "lr=0.0: must be above 0" in err


def test_a_stopped_training_says_where_it_goes_on(run, data, monkeypatch, tmp_path):
    def stop(*args, **options): raise KeyboardInterrupt
    monkeypatch.setattr("threadweaver_ref.adapt.adapt", stop)
    code, out, err = run("train", "--base", "mini-sft", "--data", data, "--out", tmp_path / "out")
    assert code == 130 and not out and err.endswith(f"stopped: the same command continues from the last checkpoint under {tmp_path / 'out'}\n")
