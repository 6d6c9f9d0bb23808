"""Two processes make the update that one makes: fine-tuning, stopped and gone on with, and P-GRPO."""
from pathlib import Path

import pytest
import torch
from test_policy import SHORT as LIMITS
from test_policy import adapters, functools, in_two_processes, policy, run
from test_sft import MIXED, SHORT, TOKENIZER, flat, fresh, replace, train_sft

SCRIPT = """
    import sys
    sys.path.insert(0, {tests!r})
    from test_policy import SHORT as LIMITS, adapters, functools, policy, run
    from test_sft import MIXED, SHORT, TOKENIZER, flat, fresh, replace, stop_at, torch, train_sft
    torch.set_num_threads(1)
    folder, model = sys.argv[1], fresh()
    config = replace(SHORT, folder=folder + "/sft")
    try: train_sft(model, TOKENIZER, MIXED, config, stop_at(3))
    except KeyboardInterrupt: pass
    tuned = train_sft(model, TOKENIZER, MIXED, config)
    policy.DecodeConfig = functools.partial(policy.DecodeConfig, limits=LIMITS)   # short evaluations, too
    learner, log = run(folder + "/rl", own=True, eval_every=4)
    torch.save([flat(model.parameters()), tuned, adapters(learner), log], folder + f"/{{torch.distributed.get_rank()}}.pt")
"""


def test_two_processes_make_the_same_update(tmp_path, monkeypatch):
    "Two gloo processes on the CPU share micro-batches, rollouts, rewards and evaluation; weights and logs are those of one process."
    in_two_processes(SCRIPT.format(tests=str(Path(__file__).parent)), tmp_path)
    assert len(list((tmp_path / "sft").glob("step-*/random_states_*"))) == 2   # there were two
    model = fresh()
    tuned = train_sft(model, TOKENIZER, MIXED, SHORT)
    monkeypatch.setattr(policy, "DecodeConfig", functools.partial(policy.DecodeConfig, limits=LIMITS))
    learner, log = run(eval_every=4)
    for rank in (0, 1):
        weights, its_tuned, adapter, its_log = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(weights, flat(model.parameters()), atol=1e-4) and torch.allclose(adapter, adapters(learner), atol=1e-5)
        for key in ("loss", "sampled"): assert [r[key] for r in its_tuned[-3:]] == pytest.approx([r[key] for r in tuned[-3:]], rel=1e-4)
        assert [r["reward"] for r in its_log] == pytest.approx([r["reward"] for r in log])
        assert its_log[-1]["eval"] == log[-1]["eval"] and log[-1]["eval"]["all"]["problems"] == 3
    finished = fresh()   # by one process, from what two have left
    its_tuned = train_sft(finished, TOKENIZER, MIXED, replace(SHORT, folder=str(tmp_path / "sft")))
    assert torch.equal(flat(finished.parameters()), weights) and len(its_tuned) == 6
