"""P-GRPO whose rollouts come from a server: the adapter that samples is the one that is trained, and what fails is not learned."""
import copy
import math
from dataclasses import replace

import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from training import adapters

from threadweaver_ref.decode import DecodeConfig, generate
from threadweaver_ref.engine_rl import EngineRollouts, ratio_row, ratios
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.model import add_lora, load_policy
from threadweaver_ref.pgrpo import PGRPOConfig, train_pgrpo
from threadweaver_ref.programs import mixture
from threadweaver_ref.remote import Completion, EngineError, Request
from threadweaver_ref.serve import CompletionsClient
from threadweaver_ref.standin import StandIn, sampling_writer

CONFIG = PGRPOConfig(steps=2, batch=2, group=4, sequential=.5, lr=3e-3, warmup=0, save_every=1, limits=Limits(max_tokens=300, max_thread_tokens=100))


@pytest.fixture(scope="module")
def start(): return load_policy("tiny-sft", device="cpu")


def small_ones(rng, step): return mixture(rng, step, small=1)


def learner(start):
    torch.manual_seed(0)
    return add_lora(copy.deepcopy(start[0]), r=4)


def run(start, tmp_path, load=True, fault=None, **changes):
    "(policy, log, server) of a training through a stand-in; `load`: does it read the adapters that it is sent?"
    served, policy = add_lora(copy.deepcopy(start[0]), r=4).eval(), learner(start)
    def read(folder): set_peft_model_state_dict(served, load_file(f"{folder}/adapter_model.safetensors"))
    with StandIn(sampling_writer(served), model="tiny-sft", load=read if load else None, fault=fault) as server:
        client = CompletionsClient(server.url, "tiny-sft", retries=1, backoff=.01)
        write = EngineRollouts(client, tmp_path / "adapter")
        log = train_pgrpo(policy, start[1], small_ones, replace(CONFIG, **changes), write=write)
    return policy, log, server


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory): return run(start, tmp_path_factory.mktemp("whole"))


def test_the_server_samples_what_is_trained(start, whole):
    policy, log, server = whole
    assert [row["ratio_off"] < 1e-3 for row in log] == [True, True] and any(row["used"] for row in log)
    assert len(server.loaded) == 2 and {b["lora_name"] for b in server.loaded} == {"policy"}   # once a step, for both modes
    salts = list(dict.fromkeys(b["cache_salt"] for b in server.bodies))
    assert len(salts) == 2 and {b["model"] for b in server.bodies} == {"policy"}
    assert not torch.equal(adapters(policy), adapters(learner(start)))


def test_a_server_that_keeps_the_old_weights_is_seen(start, tmp_path):
    _, log, _ = run(start, tmp_path, load=False)
    assert log[0]["ratio_off"] < 1e-3 and log[1]["ratio_off"] > .01 and log[1]["ratio_spread"] > 1e-3


def test_a_rollout_that_failed_ends_the_run_and_the_run_goes_on_from_there(start, whole, tmp_path):
    "Killed in its second step, and started again: the same weights as without."
    trained, log, server = whole
    per_step = len(server.bodies) // 2
    def in_the_second(n): return "500" if n > per_step + 5 else None
    with pytest.raises(EngineError, match="a rollout failed, and is not trained on: .*500"):
        run(start, tmp_path, fault=in_the_second, folder=str(tmp_path / "run"))
    again, its_log, _ = run(start, tmp_path, folder=str(tmp_path / "run"))
    assert torch.equal(adapters(again), adapters(trained)) and [r["step"] for r in its_log] == [1, 2]
    assert [r["loss"] for r in its_log] == pytest.approx([r["loss"] for r in log])


def test_without_adapters_nothing_is_sent(start, tmp_path):
    with pytest.raises(ValueError, match="add_lora first"): EngineRollouts(None, tmp_path)(*start, ["1+1?"], DecodeConfig(), [0])


def test_ratios_by_hand(start):
    model, tokenizer = start
    rollout, = generate(model, tokenizer, ["a=1+2;b=a*3;b?"])
    assert torch.allclose(ratios(model, [rollout]), torch.ones(len(rollout.logprobs)), atol=1e-3)
    said = rollout.logprobs.clone()
    said[0] -= math.log(2)   # the engine thought it half as likely
    assert ratios(model, [replace(rollout, logprobs=said)])[0] == pytest.approx(2, abs=1e-2)
    assert ratio_row(torch.tensor([.5, 1.5])) == {"ratio_mean": 1, "ratio_spread": .5, "ratio_off": .5} and ratio_row(torch.ones(0)) == {}


def test_the_stand_ins_samples_follow_the_model(start):
    "2,000 draws of one token against its probabilities; a seed says which."
    model, tokenizer = start
    ids = tokenizer("a=1+2;b=a*3;b?").input_ids
    with torch.no_grad(): logits = model(torch.tensor([ids])).logits[0, -1]
    write = sampling_writer(model, temperature=3.0)
    drawn = [write(Request(ids, (1,), 1, (), seed)) for seed in range(2000)]
    share = torch.bincount(torch.tensor([c.ids[0] for c in drawn]), minlength=len(logits)) / 2000
    assert (share - (logits / 3).softmax(-1)).abs().max() < .04
    assert write(Request(ids, (1,), 1, (), 7)) == drawn[7] and isinstance(drawn[7], Completion)
    assert drawn[7].logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[drawn[7].ids[0]]), abs=1e-4)
