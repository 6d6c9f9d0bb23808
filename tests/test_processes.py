"""Two processes make the update that one makes: fine-tuning, stopped and gone on with, and P-GRPO."""
from dataclasses import replace

import pytest
import torch
from test_pgrpo import run
from training import MIXED, SHORT, TOKENIZER, adapters, flat, fresh, in_two_processes

from threadweaver_ref.sft import train_sft


def test_two_processes_make_the_same_update(tmp_path):
    "Two gloo processes on the CPU share micro-batches, rollouts and rewards; weights and logs are those of one process."
    in_two_processes("""
        import torch
        from dataclasses import replace
        from test_pgrpo import run
        from training import MIXED, SHORT, TOKENIZER, adapters, flat, fresh, stop_at
        from threadweaver_ref import chunks
        from threadweaver_ref.sft import train_sft
        torch.set_num_threads(1)
        folder, model = sys.argv[1], fresh()
        config = replace(SHORT, folder=folder + "/sft")
        try: train_sft(model, TOKENIZER, MIXED, config, stop_at(3))
        except KeyboardInterrupt: pass
        tuned = train_sft(model, TOKENIZER, MIXED, config)
        chunks.LARGEST = 20 * len(TOKENIZER)   # logits in chunks, and layers computed again: so in two processes as well
        learner, log = run(folder + "/rl", own=True, gradient_checkpointing=True)
        torch.save([flat(model.parameters()), tuned, adapters(learner), log], folder + f"/{torch.distributed.get_rank()}.pt")
    """, tmp_path)
    assert len(list((tmp_path / "sft").glob("step-*/random_states_*"))) == 2   # there were two
    model = fresh()
    tuned = train_sft(model, TOKENIZER, MIXED, SHORT)
    learner, log = run()
    for rank in (0, 1):
        weights, its_tuned, adapter, its_log = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(weights, flat(model.parameters()), atol=1e-4) and torch.allclose(adapter, adapters(learner), atol=1e-5)
        for key in ("loss", "sampled"): assert [r[key] for r in its_tuned[-3:]] == pytest.approx([r[key] for r in tuned[-3:]], rel=1e-4)
        assert [r["reward"] for r in its_log] == pytest.approx([r["reward"] for r in log])
    finished = fresh()   # by one process, from what two have left
    its_tuned = train_sft(finished, TOKENIZER, MIXED, replace(SHORT, folder=str(tmp_path / "sft")))
    assert torch.equal(flat(finished.parameters()), weights) and len(its_tuned) == 6
