"""Recipes: read and checked, run for two tiny steps, stages in order, and what the command line saves."""
import json
import random
import sys

import pytest
import torch
from training import adapters, flat
from transformers import AutoModelForCausalLM

from threadweaver_ref import cli
from threadweaver_ref.domains import DOMAINS, Problem, RandomForks, Sequential, WheneverReady, domain
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.model import load_policy
from threadweaver_ref.pgrpo import PGRPOConfig
from threadweaver_ref.recipes import load_recipe, recipes, train_recipe
from threadweaver_ref.schoolbook import held_out, mixture
from threadweaver_ref.sft import SFTConfig
from threadweaver_ref.tokenizer import encode_prompt

TINY = dict(steps=2, batch=2, micro_tokens=512)


def written(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    return tmp_path / "mine.yaml"


# ---- reading

def test_the_shipped_ones():
    assert set(recipes()) == {"schoolbook-base", "schoolbook-sft", "schoolbook-rl"}
    for path in recipes().values(): assert len([line for line in path.read_text().splitlines() if not line.startswith("#")]) <= 15
    base, sft, rl = (load_recipe(f"schoolbook-{n}") for n in ("base", "sft", "rl"))
    assert base.start == "tiny" and isinstance(base.config.arrangement, Sequential) and base.config.autoregressive == 0
    assert sft.start == "schoolbook-base" and sft.config.arrangement == WheneverReady() and isinstance(sft.config, SFTConfig)
    assert rl.start == "schoolbook-sft" and rl.lora == 16 and isinstance(rl.config, PGRPOConfig) and rl.reward.keywords == dict(rho=.5, clip=.2)


def test_everything_in_a_file_arrives(tmp_path):
    r = load_recipe(written(tmp_path, "kind: sft\nstart: small\n"
                            "arrangement: {RandomForks: {p: 0.2}}\nsampler: {mixture: {steps: 7}}\nlr: 0.5\nlora: 3"))
    assert (r.name, r.start, r.lora, r.config) == ("mine", "small", 3, SFTConfig(lr=.5, arrangement=RandomForks(.2)))
    assert r.problems.func is mixture and r.problems.keywords == {"steps": 7}
    r = load_recipe(written(tmp_path, "kind: pgrpo\nreward: {rho: 2}\nlimits: {max_tokens: 9}\ngroup: 3"))
    assert r.config == PGRPOConfig(group=3, limits=Limits(max_tokens=9)) and r.reward.keywords == {"rho": 2}


def test_a_domain_without_a_sampler_of_ours(tmp_path, monkeypatch):
    "Its registered one is asked."
    monkeypatch.setitem(DOMAINS, "constants", None)   # forgotten again behind the test
    @domain
    def constants(rng): return Problem("1?", "1", "constants")
    assert load_recipe(written(tmp_path, "domain: constants")).problems(random.Random(0), 5).question == "1?"


@pytest.mark.parametrize("text, said", [
    ("kind: dpo", "unknown kind 'dpo': choose sft or pgrpo"), ("speed: 9", "unknown key 'speed'"), ("lr: 5e-3", "lr='5e-3': must be a number"),
    ("kind: pgrpo\nsequential: 0.1", "unknown key 'sequential'"),
    ("arrangement: Forked", "unknown arrangement 'Forked': choose one of Sequential"),
    ("arrangement: {RandomForks: 7}", "probability"), ("arrangement: {RandomForks: {q: 7}}", "'q'"),
    ("sampler: easy", "choose one of mixture, decisions"),
    ("domain: chess", "unknown domain 'chess'"), ("reward: {bonus: 1}", "unknown reward option 'bonus': choose rho or clip"),
    ("kind: pgrpo\nlimits: {tokens: 1}", "'tokens'"), ("steps: 0", "steps=0: must be at least 1"),
    ("- a\n- b", "expected lines"), ("a: [", "recipe mine.yaml"),
    ("!!python/object/apply:os.system ['true']", "could not determine a constructor")])
def test_what_is_wrong_is_said_in_one_line(tmp_path, text, said):
    with pytest.raises(ValueError) as error: load_recipe(written(tmp_path, text))
    assert said in str(error.value) and "\n" not in str(error.value) and str(error.value).startswith("recipe mine.yaml: ")


@pytest.mark.parametrize("name", ["nope", "nope.yaml", "schoolbook-sft.yml", ""])
def test_unknown_names(name):
    listed = "unknown recipe .* choose one of schoolbook-base, schoolbook-rl, schoolbook-sft, or a .yaml file"
    with pytest.raises(ValueError, match=listed): load_recipe(name)


@pytest.mark.parametrize("name", ["schoolbook-base", "schoolbook-sft", "schoolbook-rl"])
def test_no_recipe_trains_on_held_out_problems(name):
    problems, rng = load_recipe(name).problems, random.Random(0)
    assert not held_out() & {problems(rng, step).question for step in (0, 400, 2000) for _ in range(25)}


# ---- running

def test_two_stages_of_two_steps(tmp_path):
    "The first stage is run first, and found again when it has been run; the second starts where it ended."
    second, _, log = train_recipe("schoolbook-sft", tmp_path, **TINY, lr=1e-3)
    assert [r["step"] for r in log] == [1, 2] and (tmp_path / "schoolbook-sft" / "step-000002").is_dir()
    before = (tmp_path / "schoolbook-base" / "log.jsonl").read_text()
    first, _, log = train_recipe("schoolbook-base", tmp_path, **TINY, lr=1e-3)
    assert (tmp_path / "schoolbook-base" / "log.jsonl").read_text() == before and 4.5 < log[0]["loss"] < 5.5   # random weights: ln 151 = 5.0
    moved = (flat(second.parameters()) - flat(first.parameters())).abs().max()
    assert 0 < moved < .02   # other random weights would be further off
    again, *_ = train_recipe("schoolbook-sft", tmp_path, **TINY, lr=1e-3)
    assert torch.equal(flat(second.parameters()), flat(again.parameters()))


def test_p_grpo_through_lora(tmp_path):
    model, _, log = train_recipe("schoolbook-rl", tmp_path, steps=2, batch=2, group=2, lr=.01)
    start, _ = load_policy("schoolbook-sft", device="cpu")
    base = [p for n, p in model.get_base_model().named_parameters() if "lora" not in n]
    assert torch.equal(flat(base), flat(start.parameters())) and len(log) == 2 and {r["step"] for r in log} == {1, 2}
    assert adapters(model).numel() < flat(start.parameters()).numel() and (tmp_path / "schoolbook-rl" / "log.jsonl").is_file()


def test_the_seed_is_of_new_weights_too(tmp_path):
    ends = [flat(train_recipe("schoolbook-base", tmp_path / str(s), **{**TINY, "steps": 1}, seed=s)[0].parameters()) for s in (0, 1)]
    assert (ends[0] - ends[1]).abs().max() > .01


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["threadweaver-ref", "train", *map(str, args)])
    with pytest.raises(SystemExit) as stop: cli.main()
    return stop.value.code


def test_train_command_saves_adapter_and_merged(tmp_path, monkeypatch):
    "Two folders, with the same logits; the merged one needs no peft. Other seeds than 0 keep their runs apart."
    path = written(tmp_path, "kind: pgrpo\nstart: schoolbook-sft\nlora: 2\n"
                   "sampler: decisions\nsteps: 1\nbatch: 1\ngroup: 2\nlimits: {max_tokens: 60}")
    assert not command(monkeypatch, path, "--seed", 3, "--out", tmp_path / "rl", "--runs", tmp_path / "runs")
    assert (tmp_path / "rl" / "adapter_config.json").is_file() and not (tmp_path / "rl" / "config.json").exists()
    run = tmp_path / "runs" / "seed-3" / "mine"
    assert json.loads(next(run.glob("step-*/step.json")).read_text())["settings"]["seed"] == 3
    adapted, tokenizer = load_policy("schoolbook-sft", adapter=tmp_path / "rl", device="cpu")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "rl-merged")
    ids = torch.tensor([encode_prompt(tokenizer, "2*3+4*5?")])
    with torch.no_grad(): assert (adapted(ids).logits - merged(ids).logits).abs().max() < 1e-4


def test_train_command_saves_a_plain_policy(tmp_path, monkeypatch):
    assert not command(monkeypatch, written(tmp_path, "start: tiny\nsteps: 1\nbatch: 1"), "--runs", tmp_path / "runs", "--steps", 2)
    model, _ = load_policy(tmp_path / "runs" / "mine" / "policy", device="cpu")
    assert len((tmp_path / "runs" / "mine" / "log.jsonl").read_text().splitlines()) == 2 and model.config.hidden_size == 128


def test_a_wrong_name_is_one_line(capsys, monkeypatch):
    assert command(monkeypatch, "schoolbook-sff", "--processes", 2) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "unknown recipe 'schoolbook-sff': choose one of schoolbook-base" in err
