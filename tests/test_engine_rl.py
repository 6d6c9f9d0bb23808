"""P-GRPO whose rollouts come from a server: the adapter that samples is the one that is trained, and what fails is not learned."""
import copy
import math
import re
from dataclasses import replace

import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from training import adapters, in_two_processes

from threadweaver_ref.checkpoint import digest
from threadweaver_ref.decode import DecodeConfig, generate
from threadweaver_ref.engine_rl import EngineRollouts
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.model import add_lora, load_policy
from threadweaver_ref.pgrpo import PGRPOConfig, ratio_row, ratios, train_pgrpo
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


def serving(start, load=True, **options):
    "A stand-in; `load`: does it read the adapters that it is sent?"
    served = add_lora(copy.deepcopy(start[0]), r=4).eval()
    def read(folder): set_peft_model_state_dict(served, load_file(f"{folder}/adapter_model.safetensors"))
    return StandIn(sampling_writer(served), model="tiny-sft", load=read if load else None, **options)


def through(url, start, at, **changes):
    "(policy, log) of a training with the rollouts of the server at this address."
    policy, client = learner(start), CompletionsClient(url, "tiny-sft", retries=1, backoff=.01)
    return policy, train_pgrpo(policy, start[1], small_ones, replace(CONFIG, **changes), write=EngineRollouts(client, f"{at}/adapter"))


def run(start, tmp_path, load=True, fault=None, **changes):
    "(policy, log, server) of a training through a stand-in."
    with serving(start, load, fault=fault) as server: return *through(server.url, start, tmp_path, **changes), server


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory): return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def whole(start, whole_folder): return run(start, whole_folder)


def test_the_server_samples_what_is_trained(start, whole, whole_folder):
    policy, log, server = whole
    assert [row["ratio_off"] < 1e-3 for row in log] == [True, True] and any(row["used"] for row in log)
    names = [b["lora_name"] for b in server.loaded]   # one a step, for both modes
    assert len({*names}) == len(names) == 2 and all(re.fullmatch("policy-[0-9a-f]{12}", n) for n in names)
    assert [b["load_inplace"] for b in server.loaded] == [False] * 2 and len({b["lora_path"] for b in server.loaded}) == 2
    assert list(dict.fromkeys(b["model"] for b in server.bodies)) == names and len({b["cache_salt"] for b in server.bodies}) == 2
    assert server.served == ["tiny-sft", names[1]] and [p.name for p in (whole_folder / "adapter").iterdir()] == names[1:]   # the old one has gone
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


def test_two_processes_make_the_same_training_and_fail_together(start, whole, tmp_path):
    "The first sends the adapter; where it cannot, or where a rollout fails in one of them, none waits for the other."
    once = []
    with serving(start) as good, serving(start) as full, serving(start, fault=lambda n: "gone" if n == 30 else None) as poor:
        full.adapt = lambda *args: once.append(args) or (500, {"error": {"message": "no room"}}, None)
        in_two_processes(f"""
            import torch
            from test_engine_rl import EngineError, adapters, load_policy, through
            torch.set_num_threads(1)
            folder, start, said = sys.argv[1], load_policy("tiny-sft", device="cpu"), []
            policy, log = through({good.url!r}, start, folder)
            for url in {[full.url, poor.url]}:
                try: through(url, start, folder + "/other")
                except EngineError as error: said.append(str(error))
            torch.save([adapters(policy), log, said], folder + f"/{{torch.distributed.get_rank()}}.pt")
        """, tmp_path)
    alone, its_log, _ = whole
    assert len(good.loaded) == 2 and len(once) == 2
    for rank in (0, 1):
        weights, log, said = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(weights, adapters(alone), atol=1e-5) and [r["reward"] for r in log] == pytest.approx([r["reward"] for r in its_log])
        assert "no room" in said[0] and "status 404" in said[1] and said[0].startswith("in another process") == (rank == 1)


def test_a_version_that_is_there_already_is_used_and_old_ones_are_taken_away(start, tmp_path):
    "A run that was killed has left its adapter on the server, and half of another one in the folder."
    policy, half, other = learner(start), tmp_path / "policy-0123456789ab.part", tmp_path / "policy-of-mine"
    end = lambda request: Completion([1], [-1.], "stop")
    with StandIn(end, model="tiny-sft") as server:
        for _ in "12":
            half.mkdir(), other.mkdir(exist_ok=True)
            EngineRollouts(CompletionsClient(server.url, "tiny-sft", retries=0), tmp_path)(policy, start[1], ["1+1?"], DecodeConfig(), [0])
            assert not half.exists() and other.exists()
        name, = {b["model"] for b in server.bodies}
        assert len(server.loaded) == 1 and server.served == ["tiny-sft", name] and {p.name for p in tmp_path.iterdir()} == {name, other.name}
        with torch.no_grad(): next(p for p in policy.parameters() if p.requires_grad).add_(1)
        EngineRollouts(CompletionsClient(server.url, "tiny-sft", retries=0), tmp_path)(policy, start[1], ["1+1?"], DecodeConfig(), [0])
        assert len(server.loaded) == 2 and name not in server.served and not (tmp_path / name).exists()


def test_all_ids_that_end_the_models_texts_end_a_rollout(start, tmp_path):
    policy = learner(start)
    policy.base_model.model.generation_config.eos_token_id = [1, 20]
    with StandIn(lambda request: Completion([20], [-1.], "stop"), model="tiny-sft") as server:
        write = EngineRollouts(CompletionsClient(server.url, "tiny-sft", retries=0), tmp_path)
        r, = write(policy, start[1], ["1+1?"], DecodeConfig(), [0])
    assert (r.finish_reason, r.end) == ("stop", 20) and 20 in server.bodies[0]["sampling_params"]["stop_token_ids"]


def test_the_digest_is_that_of_what_is_trained(start):
    policy = learner(start)
    before, frozen = digest(policy, trained=True), next(p for p in policy.parameters() if not p.requires_grad)
    with torch.no_grad():
        frozen.add_(1)
        assert digest(policy, trained=True) == before
        next(p for p in policy.parameters() if p.requires_grad)[-1, -1] += 1e-3
        assert digest(policy, trained=True) != before
        frozen.sub_(1)


def test_without_adapters_nothing_is_sent(start, tmp_path):
    with pytest.raises(ValueError, match="add_lora first"): EngineRollouts(None, tmp_path)(*start, ["1+1?"], DecodeConfig(), [0])


def test_ratios_by_hand(start):
    model, tokenizer = start
    rollout, = generate(model, tokenizer, ["a=1+2;b=a*3;b?"])
    assert torch.allclose(ratios(model, [rollout]), torch.ones(len(rollout.logprobs)), atol=1e-3)
    said = rollout.logprobs.clone()
    said[0] -= math.log(2)   # the engine thought it half as likely
    assert ratios(model, [replace(rollout, logprobs=said)])[0] == pytest.approx(2, abs=1e-2)
    said[-1] = math.nan
    with pytest.raises(ValueError, match="no log-probabilities of the model itself"): ratios(model, [rollout, replace(rollout, logprobs=said)])
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
