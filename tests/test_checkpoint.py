"""A folder for one run: what it is known by, checkpoints that are whole, logs with torn lines, refusals."""
import functools
import json
from dataclasses import dataclass, replace

import pytest
import torch
from training import MIXED, SHORT, TOKENIZER, adapters, flat, forked, fresh, prompt, same, stop_at

from threadweaver_ref.checkpoint import RunFolder, describe, settings_of, tensorboard, training_set
from threadweaver_ref.domains import RandomForks, Sequential, WheneverReady
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.model import add_lora
from threadweaver_ref.pgrpo import PGRPOConfig
from threadweaver_ref.replay import replay
from threadweaver_ref.schoolbook import mixture
from threadweaver_ref.sft import SFTConfig, train_sft


def test_functions_are_known_by_name_options_and_owner():
    assert describe(functools.partial(mixture, mixture, steps=SHORT)) == f"mixture(mixture, steps={SHORT})"
    assert " at 0x" not in describe(functools.partial(mixture, object())) and describe(mixture) == "mixture"
    assert describe([].append).endswith("of []") and describe(print) != describe(len)

    @dataclass
    class Reward:
        rho: float = 1
        def __call__(self, rollout, problem): return self.rho

    assert describe(Reward()) != describe(Reward(2))


def test_settings_know_an_arrangement_by_its_class():
    "Two arrangements with the same fields are two runs; where and how often it saves is not part of a run."
    known = [settings_of(SFTConfig(arrangement=a)) for a in (Sequential(), WheneverReady(), WheneverReady(True), RandomForks(.3))]
    assert all(a != b for i, a in enumerate(known) for b in known[:i]) and json.loads(json.dumps(known)) == known
    assert settings_of(replace(SHORT, folder="x", save_every=9)) == settings_of(SHORT) != settings_of(SHORT, reward="r")
    assert settings_of(PGRPOConfig(limits=Limits(9))) != settings_of(PGRPOConfig(limits=Limits(8)))


def test_training_sets_differ_by_content():
    trees = [replay(forked(p), prompt(p), TOKENIZER) for p in MIXED]
    sets = [MIXED, MIXED[:3], MIXED[::-1], trees, mixture]
    assert len({training_set(s) for s in sets}) == len(sets) and training_set(MIXED) == training_set(list(MIXED))


def refused(folder, match, model, problems=MIXED, **changes):
    "Another run in a used folder: one line, and neither the model nor the folder is touched."
    weights, files = flat(model.parameters()), {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=match) as error: train_sft(model, TOKENIZER, problems, replace(SHORT, folder=str(folder), **changes))
    assert "\n" not in str(error.value) and torch.equal(flat(model.parameters()), weights) and not model.training
    assert files == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("stopped", [1, 3, None])
def test_a_used_folder_is_for_the_same_run_only(tmp_path, stopped):
    first = fresh()
    try: train_sft(first, TOKENIZER, MIXED, replace(SHORT, folder=str(tmp_path)), stopped and stop_at(stopped))
    except KeyboardInterrupt: pass
    refused(tmp_path, "started from other weights", fresh(seed=1))
    refused(tmp_path, "started from other weights", fresh(hidden_size=64))
    refused(tmp_path, "started from other weights", add_lora(fresh(), r=2))
    refused(tmp_path, "another training set", fresh(), MIXED[:3])
    refused(tmp_path, "another training set", fresh(), [replay(forked(p), prompt(p), TOKENIZER) for p in MIXED])
    refused(tmp_path, "another training set", fresh(), mixture)
    refused(tmp_path, "holds a run of 6 steps, over which its lr falls: ask for 6,", fresh(), steps=12)
    refused(tmp_path, "holds a run of 6 steps", first, steps=3)
    refused(tmp_path, "another arrangement", fresh(), arrangement=Sequential())
    with torch.no_grad(): first.model.norm.weight[0] += 1e-3   # neither the start, nor what the run left behind
    refused(tmp_path, "started from other weights", first)
    (tmp_path / "left.txt").unlink()   # of a killed process there is none
    refused(tmp_path, "started from other weights", first)
    if stopped: assert len(train_sft(fresh(), TOKENIZER, MIXED, replace(SHORT, folder=str(tmp_path)))) == 6


def test_a_finished_run_is_loaded_not_repeated(tmp_path):
    config = replace(SHORT, folder=str(tmp_path))
    first, again = fresh(), fresh()
    log = train_sft(first, TOKENIZER, MIXED, config)
    done = flat(first.parameters())
    assert train_sft(again, TOKENIZER, MIXED, config, stop_at(1)) == log and same(first, again)
    assert train_sft(first, TOKENIZER, MIXED, config, stop_at(1)) == log and torch.equal(flat(first.parameters()), done)   # the cell, run again
    for other in (dict(seed=1), dict(lr=.5), dict(arrangement=Sequential())):
        with pytest.raises(ValueError, match=f"holds a run with another {next(iter(other))}: choose"):
            train_sft(again, TOKENIZER, MIXED, replace(config, **other))
    assert torch.equal(flat(again.parameters()), done) and not again.training


def test_a_sampler_is_known_by_its_name_and_options(tmp_path):
    config, late = replace(SHORT, steps=1, batch=1, folder=str(tmp_path / "new" / "too")), functools.partial(mixture, steps=10)
    train_sft(fresh(), TOKENIZER, late, config)
    refused(tmp_path / "new" / "too", "another training set", fresh(), functools.partial(mixture, steps=20), steps=1, batch=1)
    assert len(train_sft(fresh(), TOKENIZER, functools.partial(mixture, steps=10), config)) == 1


def test_a_torn_line_of_the_log(tmp_path):
    "It ends in `}`, and stands in the middle."
    config = replace(SHORT, folder=str(tmp_path))
    with pytest.raises(KeyboardInterrupt): train_sft(fresh(), TOKENIZER, MIXED, config, stop_at(5))
    first, second, *rest = (tmp_path / "log.jsonl").read_text().splitlines()
    (tmp_path / "log.jsonl").write_text("\n".join([first, '{"step": 9, "eval": {"all": {"right": 1.0}', second, *rest]) + "\n")
    log = train_sft(fresh(), TOKENIZER, MIXED, config)
    assert [r["step"] for r in log] == list(range(1, 7)) == [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()]


def test_the_newest_of_many_checkpoints(tmp_path):
    "By number: a million comes after 999,999."
    run = RunFolder(tmp_path, {}, "")
    for name in ("step-999998", "step-1000000", "step-999999", "step-old", "step-000002"): (tmp_path / name).mkdir()
    assert [p.name for p in run.checkpoints()] == ["step-000002", "step-999998", "step-999999", "step-1000000"]


def test_checkpoints_hold_no_schedule_of_their_own(tmp_path):
    "What accelerate would unpickle without a look at it (custom_checkpoint_*.pkl) is not written."
    train_sft(fresh(), TOKENIZER, MIXED, replace(SHORT, steps=1, folder=str(tmp_path)))
    assert not list(tmp_path.glob("step-*/custom_checkpoint_*"))


def test_lora_trains_and_resumes(tmp_path):
    def adapted(): return add_lora(fresh(), r=2, train_tokens=[5])
    through, first, second = adapted(), adapted(), adapted()
    before = flat(p for n, p in through.named_parameters() if not p.requires_grad)
    train_sft(through, TOKENIZER, MIXED, SHORT)
    assert torch.equal(before, flat(p for n, p in through.named_parameters() if not p.requires_grad))
    config = replace(SHORT, folder=str(tmp_path))
    with pytest.raises(KeyboardInterrupt): train_sft(first, TOKENIZER, MIXED, config, stop_at(5))
    train_sft(second, TOKENIZER, MIXED, config)
    assert same(through, second) and adapters(second).abs().max() > 0


def test_tensorboard(tmp_path):
    "Losses of every step can be read back from its files; what a stopped run wrote beyond its checkpoint is dropped."
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = replace(SHORT, folder=str(tmp_path / "run"))
    write = tensorboard(tmp_path / "board")
    def until_3(step, row): write(step, row); stop_at(3)(step, row)
    with pytest.raises(KeyboardInterrupt): train_sft(fresh(), TOKENIZER, MIXED, config, until_3)
    log = train_sft(fresh(), TOKENIZER, MIXED, config, tensorboard(tmp_path / "board"))
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload().Scalars("loss")
    assert [e.step for e in events] == [1, 2, 3, 4, 5, 6] and [e.value for e in events] == pytest.approx([r["loss"] for r in log])
