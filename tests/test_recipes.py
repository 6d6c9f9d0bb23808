"""Recipes: read and checked, run for two tiny steps, stages in order, and what the command line saves."""
import json
import random
import shutil
import sys
from types import SimpleNamespace
from dataclasses import fields, replace

import pytest
import torch
from helpers import spied
from training import adapters, flat
from transformers import AutoModelForCausalLM

from threadweaver_ref import cli, selftrain
from threadweaver_ref import recipes as room
from threadweaver_ref.checkpoint import describe
from threadweaver_ref.domains import DOMAINS, Problem, RandomForks, Sequential, WheneverReady, allowed, domain, find_domain, split_of
from threadweaver_ref.format import Text
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.hub import PACKAGED
from threadweaver_ref.model import SIZES, add_lora, load_policy, merge_lora, save_policy, shipped_policies, tiny_model
from threadweaver_ref.pgrpo import PGRPOConfig, Speedup, drawn_problems, reference_latencies
from threadweaver_ref.recipes import load_recipe, recipes, train_recipe
from threadweaver_ref.replay import replay
from threadweaver_ref.schoolbook import held_out, mixture
from threadweaver_ref.sft import SFTConfig
from threadweaver_ref.tokenizer import char_tokenizer, encode_prompt

TINY = dict(steps=2, batch=2, micro_tokens=512)


def written(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    return tmp_path / "mine.yaml"


# ---- reading

def test_the_shipped_ones():
    assert set(recipes()) >= {"schoolbook-base", "schoolbook-sft", "schoolbook-rl", "tiny-base", "tiny-sft"}
    base, sft, rl = (load_recipe(f"schoolbook-{n}") for n in ("base", "sft", "rl"))
    assert base.start == "tiny" and isinstance(base.config.arrangement, Sequential) and base.config.autoregressive == 0
    assert sft.start == "schoolbook-base" and sft.config.arrangement == WheneverReady() and isinstance(sft.config, SFTConfig)
    assert rl.start == "schoolbook-sft" and rl.lora == 16 and isinstance(rl.config, PGRPOConfig) and rl.reward.keywords == dict(rho=.5, clip=.2)


@pytest.mark.parametrize("name", recipes())
def test_every_shipped_recipe_is_short_says_what_it_does_and_starts_from_something(name):
    "Its starts lead to new weights, to a policy that ships or to a pretrained model at hand, and never round in a circle."
    said, *lines = recipes()[name].read_text().splitlines()
    assert said.startswith("# ") and len([line for line in lines if not line.startswith("#")]) <= 15
    seen, start = [name], load_recipe(name).start
    while start in recipes() and start not in shipped_policies():
        assert start not in seen
        seen.append(start)
        start = load_recipe(start).start
    assert start in SIZES or start in shipped_policies() or start in PACKAGED


@pytest.mark.parametrize("name", sorted({"tiny-always", "tiny-never", "tiny-imitation", "tiny-result", "tiny-kv"} & set(recipes())))
def test_controls_differ_in_arrangement_or_join_alone(name):
    "The same start, problems, steps and seed as `tiny-sft`."
    one, other = load_recipe("tiny-sft"), load_recipe(name)
    left = {f.name for f in fields(one.config) if getattr(one.config, f.name) != getattr(other.config, f.name)}
    assert left == {"join" if name in ("tiny-result", "tiny-kv") else "arrangement"}
    said = [{f.name: describe(getattr(r, f.name)) for f in fields(r) if f.name not in ("name", "config")} for r in (one, other)]
    assert said[0] == said[1]


@pytest.mark.parametrize("name", ["mini-base", "mini-sft", "small-base", "small-sft"])
def test_the_ladder_differs_in_size_alone(name):
    "`small` is trained in mixed precision as well."
    size, stage = name.split("-")
    one, other = load_recipe(f"tiny-{stage}"), load_recipe(name)
    assert other.config.mixed_precision == ("bf16" if size == "small" else None)
    other = replace(other, config=replace(other.config, mixed_precision=None))
    said = [{f.name: describe(getattr(r, f.name)) for f in fields(r) if f.name not in ("name", "start")} for r in (one, other)]
    assert said[0] == said[1] and (one.start, other.start) == (("tiny", size) if stage == "base" else ("tiny-base", f"{size}-base"))


@pytest.mark.parametrize("name", sorted({"tiny-rl-eq7", "tiny-rl-sequential"} & set(recipes())))
def test_twins_of_the_trained_policy_are_trained_as_long(name):
    one, other = load_recipe("tiny-rl"), load_recipe(name)
    left = {f.name for f in fields(one.config) if getattr(one.config, f.name) != getattr(other.config, f.name)}
    assert left <= {"mode", "sequential"} and (one.start, one.lora, one.problems.keywords) == (other.start, other.lora, other.problems.keywords)
    assert one.speedup and not other.speedup and other.reward.keywords == dict(rho=.5, clip=.2)


def test_everything_in_a_file_arrives(tmp_path):
    r = load_recipe(written(tmp_path, "kind: sft\nstart: small\ndomain: schoolbook\n"
                            "arrangement: {RandomForks: {p: 0.2}}\nsampler: {mixture: {steps: 7}}\nlr: 0.5\nlora: 3"))
    assert (r.name, r.start, r.lora, r.config) == ("mine", "small", 3, SFTConfig(lr=.5, arrangement=RandomForks(.2)))
    assert r.problems.func is mixture and r.problems.keywords == {"steps": 7}
    r = load_recipe(written(tmp_path, "kind: pgrpo\nreward: {rho: 2}\nlimits: {max_tokens: 9}\ngroup: 3"))
    assert r.config == PGRPOConfig(group=3, limits=Limits(max_tokens=9)) and r.reward.keywords == {"rho": 2} and r.speedup is None
    r = load_recipe(written(tmp_path, "kind: pgrpo\nreward: {speedup: {rho: 2}}"))
    assert r.speedup == {"rho": 2} and r.problems.keywords == {"name": "programs"}   # the domain, where none is named
    assert load_recipe(written(tmp_path, "kind: pgrpo\nreward: {speedup: }")).speedup == {}
    assert load_recipe(written(tmp_path, "sampler: {mixture: {small: 1}}")).problems.func is find_domain("programs").samplers["mixture"]


def test_a_domain_without_a_sampler_of_ours(tmp_path, monkeypatch):
    "Its registered one is asked, and what it holds out is drawn again."
    monkeypatch.setitem(DOMAINS, "constants", None)   # forgotten again behind the test
    @domain(split=lambda question: "train" if question == "1?" else "test")
    def constants(rng): return Problem(f"{rng.randint(1, 3)}?", "1", "constants")
    sampler = load_recipe(written(tmp_path, "domain: constants")).problems
    assert {sampler(random.Random(seed), 5).question for seed in range(20)} == {"1?"}
    with pytest.raises(ValueError, match="unknown sampler 'mixture': choose one of"):
        load_recipe(written(tmp_path, "domain: constants\nsampler: mixture"))


@pytest.mark.parametrize("text, said", [
    ("kind: dpo", "unknown kind 'dpo': choose one of sft, pgrpo"), ("speed: 9", "unknown key 'speed'"), ("lr: 5e-3", "lr='5e-3': must be a number"),
    ("kind: pgrpo\nautoregressive: 0.1", "unknown key 'autoregressive'"),
    ("arrangement: Forked", "unknown arrangement 'Forked': choose one of Sequential"),
    ("arrangement: {RandomForks: 7}", "probability"), ("arrangement: {RandomForks: {q: 7}}", "'q'"),
    ("sampler: easy", "unknown sampler 'easy': choose one of mixture"), ("domain: schoolbook\nsampler: easy", "choose one of mixture, decisions"),
    ("domain: chess", "unknown domain 'chess'"), ("kind: pgrpo\nreward: {bonus: 1}", "unknown reward option 'bonus': choose rho or clip"),
    ("kind: pgrpo\nreward: {speedup: {bonus: 1}}", "unknown reward option 'bonus': choose rho or clip or until"),
    ("kind: pgrpo\nreward: {until: 9}", "unknown reward option 'until': choose rho or clip"),
    ("kind: pgrpo\nreward: 5", "reward=5: give options of eq. 7 such as {rho: 0.5}, or {speedup: {rho: 0.5}}"),
    ("kind: pgrpo\nreward: speedup", "reward='speedup': give options"),
    ("kind: pgrpo\nreward: {speedup: {until: 0}}", "until=0: must be at least 1"),
    ("kind: pgrpo\nreward: {rho: 5e-1}", "rho='5e-1': must be a number"),
    ("kind: pgrpo\nreward: {speedup: {until: 2.5}}", "until=2.5: must be a whole number"), ("steps: 100.0", "steps=100.0: must be a whole number"),
    ("lora: '16'", "lora='16': must be a whole number"), ("kind: selftrain\nrollouts: {questions: 1e3}", "questions='1e3': must be a whole number"),
    ("kind: selftrain\nsteps: 3", "steps: a round of self-training has as many as its rollouts make"),
    ("steps: true", "steps=True: must be a whole number"),
    ("sampler: {mixture: 8}", "give options by name"),
    ("kind: pgrpo\nlimits: {tokens: 1}", "'tokens'"), ("steps: 0", "steps=0: must be at least 1"),
    ("- a\n- b", "expected lines"), ("a: [", "recipe mine.yaml"),
    ("!!python/object/apply:os.system ['true']", "could not determine a constructor")])
def test_what_is_wrong_is_said_in_one_line(tmp_path, text, said):
    with pytest.raises(ValueError) as error: load_recipe(written(tmp_path, text))
    assert said in str(error.value) and "\n" not in str(error.value) and str(error.value).startswith("recipe mine.yaml: ")


@pytest.mark.parametrize("name", ["nope", "nope.yaml", "schoolbook-sft.yml", ""])
def test_unknown_names(name):
    with pytest.raises(ValueError) as refused: load_recipe(name)
    assert str(refused.value) == f"unknown recipe {name!r}: choose one of {allowed(recipes())}, or a .yaml file"


@pytest.mark.parametrize("name", recipes())
def test_no_recipe_trains_on_held_out_problems(name):
    problems, rng = load_recipe(name).problems, random.Random(0)
    drawn = [problems(rng, step) for step in (0, 400, 2000) for _ in range(25)]
    assert {(find_domain(p.domain).split or split_of)(p.question) for p in drawn} == {"train"}
    assert not held_out() & {p.question for p in drawn}


# ---- running

@pytest.fixture
def two_stages(tmp_path, monkeypatch):
    "Recipes `first` and `second`, as if they were shipped."
    for name, start, steps in (("first", "tiny", 2), ("second", "first", 3)):
        (tmp_path / f"{name}.yaml").write_text(f"start: {start}\nsampler: {{mixture: {{small: 1}}}}\nsteps: {steps}\nbatch: 2\nlr: 0.001\n")
    monkeypatch.setattr(room, "recipes", lambda: {n: tmp_path / f"{n}.yaml" for n in ("first", "second")})
    return tmp_path / "runs"


def test_two_stages(two_stages):
    "The first stage is run first, and found again when it has been run; the second starts where it ended."
    second, _, log = train_recipe("second", two_stages)
    assert [r["step"] for r in log] == [1, 2, 3] and (two_stages / "second" / "step-000003").is_dir()
    before = (two_stages / "first" / "log.jsonl").read_text()
    first, _, log = train_recipe("first", two_stages)
    assert (two_stages / "first" / "log.jsonl").read_text() == before and 4.5 < log[0]["loss"] < 5.5   # random weights: ln 151 = 5.0
    moved = (flat(second.parameters()) - flat(first.parameters())).abs().max()
    assert 0 < moved < .02   # other random weights would be further off
    again, *_ = train_recipe("second", two_stages)
    assert torch.equal(flat(second.parameters()), flat(again.parameters()))


def test_changes_are_of_the_recipe_that_is_asked_for(two_stages, monkeypatch):
    "Steps and rate stay those of each; the seed, and what only says how, hold for both."
    trained = spied(monkeypatch, room, "train_sft")
    train_recipe("second", two_stages, steps=1, batch=1, lr=.5, seed=4, micro_tokens=99)
    assert [(a[3].steps, a[3].batch, a[3].lr, a[3].seed, a[3].micro_tokens) for a, _ in trained] == [(2, 2, .001, 4, 99), (1, 1, .5, 4, 99)]


def test_p_grpo_through_lora(tmp_path):
    model, _, log = train_recipe("schoolbook-rl", tmp_path, steps=2, batch=2, group=2, lr=.01)
    start, _ = load_policy("schoolbook-sft", device="cpu")
    base = [p for n, p in model.get_base_model().named_parameters() if "lora" not in n]
    assert torch.equal(flat(base), flat(start.parameters())) and len(log) == 2 and {r["step"] for r in log} == {1, 2}
    assert adapters(model).numel() < flat(start.parameters()).numel() and (tmp_path / "schoolbook-rl" / "log.jsonl").is_file()


def test_an_adapter_is_trained_on(tmp_path):
    "Where the start is an adapter, there is still one adapter behind, on the same base; its weights have moved, those of the base have not."
    text = "start: tiny-rl\nlora: {}\nsampler: {{mixture: {{small: 1}}}}\nsteps: 1\nbatch: 2\nlr: 0.01\n"
    with pytest.raises(ValueError, match="lora=3: tiny-rl is an adapter of rank 16, which goes on: give lora: 16"):
        train_recipe(written(tmp_path, text.format(3)), tmp_path)
    model, tokenizer, _ = train_recipe(written(tmp_path, text.format(16)), tmp_path)
    save_policy(model, tokenizer, tmp_path / "out")
    start, end = load_policy("tiny-rl", device="cpu")[0], load_policy(tmp_path / "out", device="cpu")[0]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "data/policies/tiny-sft"
    moved = {n: (a - b).abs().max() for (n, a), b in zip(start.named_parameters(), end.parameters(), strict=True)}
    assert all((d > 0) == ("lora" in n) for n, d in moved.items())


def test_without_lora_an_adapter_is_merged_and_all_is_trained(tmp_path):
    model, *_ = train_recipe(written(tmp_path, "start: tiny-rl\nsampler: {mixture: {small: 1}}\nsteps: 1\nbatch: 2\nlr: 0.00001\n"), tmp_path)
    merged, base = (flat(m.parameters()) for m in (merge_lora(load_policy("tiny-rl", device="cpu")[0]), load_policy("tiny-sft", device="cpu")[0]))
    moved = (flat(model.parameters()) - merged).abs()
    assert (moved > 0).float().mean() > .9 and moved.max() < (merged - base).abs().max() / 10


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
                   "domain: schoolbook\nsampler: decisions\nsteps: 1\nbatch: 1\ngroup: 2\nlimits: {max_tokens: 60}")
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
    assert err.count("\n") == 1 and "unknown recipe 'schoolbook-sff': choose one of mini-base" in err


# ---- the speed-up against the frozen start

PAID = "kind: pgrpo\nstart: {start}\nreward: {{speedup: {{rho: 1, clip: .3}}}}\nlora: 2\n"
PAID += "steps: 2\nbatch: 2\ngroup: 2\nlimits: {{max_tokens: 12}}\nlr: 0.01"


@pytest.fixture
def paid(tmp_path, monkeypatch):
    "A recipe paid by the speed-up of a random start; what `train_pgrpo` was given, and how often references were measured."
    torch.manual_seed(0)
    tokenizer = char_tokenizer()
    save_policy(tiny_model("tiny", tokenizer, hidden_size=32, num_hidden_layers=2), tokenizer, tmp_path / "start")
    path = written(tmp_path, PAID.format(start=tmp_path / "start"))
    return path, tmp_path / "runs", spied(monkeypatch, room, "train_pgrpo"), spied(monkeypatch, room, "reference_latencies")


def test_references_are_those_of_the_start(paid):
    "Measured once, before the adapter is there; kept beside the run, and found again when it goes on."
    path, runs, trained, measured = paid
    train_recipe(path, runs)
    _, tokenizer, problems, config, pay, _ = trained[0][0]
    start, _ = load_policy(path.parent / "start", device="cpu")
    wanted = reference_latencies(start, tokenizer, drawn_problems(problems, config), config)
    assert len(measured) == 1 and pay == Speedup(wanted, 1, .3) and len(wanted) == 4
    assert json.loads((runs / "mine-references.json").read_text())["latencies"] == wanted and (runs / "mine" / "step-000002").is_dir()
    again, _, log = train_recipe(path, runs)
    assert len(measured) == 1 and trained[1][0][4] == pay and [r["step"] for r in log] == [1, 2]


def test_references_of_other_problems_or_another_start_are_not_taken(paid):
    path, runs, trained, measured = paid
    train_recipe(path, runs)
    (runs / "mine-references.json").write_text(json.dumps({"of": ["another start", "other problems"], "latencies": {}}))
    train_recipe(path, runs)
    assert len(measured) == 2 and trained[1][0][4] == trained[0][0][4]


@pytest.mark.parametrize("other", [{"limits": Limits(max_tokens=9)}, {"chat": False}])
def test_references_under_other_limits_are_not_taken(paid, other):
    path, runs, trained, measured = paid
    train_recipe(path, runs)
    shutil.rmtree(runs / "mine")
    train_recipe(path, runs, **other)
    assert len(measured) == 2 and max(trained[1][0][4].references.values()) <= other.get("limits", Limits(12)).max_tokens


def test_a_round_of_self_training_is_sampled_as_it_is_trained(monkeypatch, tmp_path):
    "With or without the chat template; and each step is told of."
    sampled, tree = [], replay([Text("1")], [0], char_tokenizer())
    monkeypatch.setattr(selftrain, "sample_kept", lambda *args: sampled.append(args) or [SimpleNamespace(tree=tree)])
    kept = spied(monkeypatch, room, "train_on_kept")
    path, told = written(tmp_path, "kind: selftrain\nchat: false\nseed: 3\njoin: kv\nrollouts: {questions: 2, group: 5}"), []
    train_recipe(path, tmp_path, lambda *said: told.append(said))
    (_, _, problems, decoding, group, _), = sampled
    assert (decoding.chat, decoding.seed, decoding.join, decoding.temperature, len(problems), group) == (False, 3, "kv", 1, 2, 5)
    assert kept[0][0][2] == [tree] and len(told) == 1
    shutil.rmtree(tmp_path / "mine")   # as if it had been killed before its first checkpoint: nothing is sampled again
    train_recipe(path, tmp_path)
    assert len(sampled) == 1 and [t.ids for t in kept[1][0][2]] == [tree.ids]
    with pytest.raises(ValueError, match="mine: a round of self-training has as many steps"): train_recipe(path, tmp_path, steps=2)


def test_a_policy_is_saved_in_the_folder_that_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    tokenizer = char_tokenizer()
    room.save_trained(add_lora(tiny_model("tiny", tokenizer, hidden_size=32, num_hidden_layers=2), 2), tokenizer, ".")
    assert (tmp_path / "mine" / "adapter_config.json").is_file() and (tmp_path / "mine-merged" / "config.json").is_file()


def test_without_a_folder_nothing_is_kept(paid):
    path, runs, trained, measured = paid
    train_recipe(path, runs, folder=None, steps=1)
    assert len(measured) == 1 and len(trained[0][0][4].references) == 2 and not runs.exists()


def test_a_run_that_grows_knows_its_new_problems(paid):
    "More steps and another seed, behind a run whose folder was removed: every problem that is asked for has its own reference."
    path, runs, trained, _ = paid
    train_recipe(path, runs, steps=1)
    shutil.rmtree(runs / "mine")
    train_recipe(path, runs, steps=2, seed=1)
    _, _, problems, config, pay, _ = trained[-1][0]
    assert {p.question for p in drawn_problems(problems, config)} <= set(pay.references)


@pytest.mark.parametrize("kind", ["pgrpo", "selftrain"])
def test_a_start_moves_to_the_device_before_it_decodes(kind, monkeypatch, tmp_path):
    class Elsewhere: device = torch.device("meta")
    class Seen(Exception): pass
    def look(model, *_): raise Seen(next(model.parameters()).device.type)
    monkeypatch.setattr(room, "Accelerator", Elsewhere)
    for owner, name in ((room, "kept_references"), (selftrain, "digest")): monkeypatch.setattr(owner, name, look)
    path = written(tmp_path, f"kind: {kind}\n" + "reward: {speedup: {rho: 1}}\n" * (kind == "pgrpo"))
    with pytest.raises(Seen, match="meta"): train_recipe(path, tmp_path)


def test_an_adapter_on_a_start_that_was_trained_here_can_be_loaded(two_stages):
    "Its base is saved beside it, and named."
    (two_stages.parent / "second.yaml").write_text("start: first\nlora: 2\nsampler: {mixture: {small: 1}}\nsteps: 1\nbatch: 2")
    model, tokenizer, _ = train_recipe("second", two_stages)
    trained = flat(model.parameters())
    room.save_trained(model, tokenizer, two_stages / "second" / "policy")
    again, _ = load_policy(two_stages / "second" / "policy", device="cpu")
    base = json.loads((two_stages / "second" / "policy" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str((two_stages / "first" / "policy").resolve()) and torch.equal(flat(again.parameters()), trained)


def test_another_rank_is_refused_before_anything_is_decoded(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "kept_references", lambda *_: pytest.fail("it decoded"))
    path = written(tmp_path, "kind: pgrpo\nstart: tiny-rl\nlora: 3\nreward: {speedup: {rho: 1}}")
    with pytest.raises(ValueError, match="tiny-rl is an adapter of rank 16"): train_recipe(path, tmp_path)


def test_no_precision_in_yaml_is_no(tmp_path):
    assert load_recipe(written(tmp_path, "kind: pgrpo\nmixed_precision: no")).config.mixed_precision == "no"
    assert load_recipe(written(tmp_path, "kind: sft\nmixed_precision: bf16")).config.mixed_precision == "bf16"


@pytest.mark.parametrize("text, said", [
    ("mixed_precision: bf17", "unknown mixed_precision 'bf17': choose no, bf16 or fp16"), ("mixed_precision: yes", "unknown mixed_precision True"),
    ("limits: {max_tokens: many}", "max_tokens='many': must be a whole number"),
    ("limits: {most: 3}", "limits={'most': 3}: give some of max_threads, "),
    ("limits: 30", "limits=30: give some of"), ("knows: {says: x}", "knows={'says': 'x'}: give a pattern, and what it says"),
    ("knows: [1]", "give a pattern"), ("knows: {pattern: '(', says: x}", "missing \\), unterminated"),
    ("reward: {speedup: {clip: 1.5}}", "clip=1.5: must be at least 0 and below 1")])
def test_values_that_would_fail_late(tmp_path, text, said):
    with pytest.raises(ValueError, match=f"recipe mine.yaml: .*{said}"): load_recipe(written(tmp_path, f"kind: pgrpo\n{text}"))


def test_fine_tuning_is_not_paid(tmp_path):
    "A reward belongs to P-GRPO; a fine-tuning recipe with one is refused in one line, or trains without it."
    path = written(tmp_path, "reward: {speedup: {rho: 1}}\nsteps: 1\nbatch: 1")
    try: _, _, log = train_recipe(path, tmp_path / "runs")
    except ValueError as refused: assert "recipe mine.yaml" in str(refused)
    else: assert len(log) == 1
