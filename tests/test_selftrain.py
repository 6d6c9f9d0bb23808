"""Self-training: what is kept, by itself, by a reward, in two processes, and again in the same folder."""
import ast
import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import TOKENIZERS, tiny
from training import adapters, in_two_processes

from threadweaver_ref.decode import DecodeConfig, generate
from threadweaver_ref.domains import grade
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.model import load_policy
from threadweaver_ref.schoolbook import sum_of_products
from threadweaver_ref.selftrain import self_train, worth_keeping
from threadweaver_ref.sft import SFTConfig

PROBLEM, OTHER = sum_of_products([(2, 3), (4, 5)]), sum_of_products([(3, 7), (8, 2), (5, 9)])
HOT = DecodeConfig(temperature=1.5, limits=Limits(300, 150))


def quick(rollout, problem): return 1 / rollout.token_latency


def test_what_is_worth_keeping():
    "By hand: wrong and malformed ones go; by a reward the first of the best stays, and nothing where none is good."
    say = lambda answer, latency, well=True: SimpleNamespace(text=f"\\boxed{{{answer}}}", token_latency=latency, well_formed=well)
    group = [say(26, 9), say(27, 1), say(26, 5), say(26, 2, False), say(26, 5)]
    assert worth_keeping(group, PROBLEM) == [group[0], group[2], group[4]]
    best, = worth_keeping(group, PROBLEM, quick)
    assert best is group[2] and worth_keeping(group[1:2], PROBLEM, quick) == worth_keeping(group[3:4], PROBLEM) == []


def test_nothing_to_keep():
    tokenizer = TOKENIZERS["char"]()
    with pytest.raises(ValueError, match="none of 2 rollouts"):
        self_train(tiny("Qwen3", tokenizer), tokenizer, [PROBLEM] * 2, SFTConfig(batch=2), DecodeConfig(temperature=1.0, limits=Limits(40, 12)))


def test_it_keeps_the_best_of_every_group():
    model, tokenizer = load_policy("schoolbook-sft", device="cpu")
    problems = [PROBLEM, OTHER]
    alike = generate(model, tokenizer, [p.question for p in problems for _ in range(6)], HOT)   # what self_train will see
    kept, log = self_train(copy.deepcopy(model), tokenizer, problems, SFTConfig(batch=2, lr=1e-9), HOT, epochs=3, group=6, reward=quick)
    assert len(kept) == 2 and len(log) == 3
    for k, p, group in zip(kept, problems, (alike[:6], alike[6:])):
        good = [r.token_latency for r in group if grade(r.text, p) and r.well_formed]
        assert k.token_latency == min(good) < max(good) and grade(k.text, p)


def test_twice_in_one_folder(tmp_path):
    "The same again is loaded; other rollouts are another run, and one line says so."
    model, tokenizer = load_policy("schoolbook-sft", device="cpu")
    config = SFTConfig(batch=2, lr=1e-3, folder=str(tmp_path))
    learned = copy.deepcopy(model)
    kept, log = self_train(learned, tokenizer, [PROBLEM, OTHER], config, HOT, group=3)
    again = copy.deepcopy(model)
    assert self_train(again, tokenizer, [PROBLEM, OTHER], config, HOT, group=3)[1] == log and torch.equal(adapters(again), adapters(learned))
    assert not torch.equal(adapters(model), adapters(learned))
    for other in (model, learned):
        with pytest.raises(ValueError, match="holds a run with another training set"):
            self_train(copy.deepcopy(other), tokenizer, [PROBLEM, OTHER], config, replace(HOT, seed=1), group=3)


def test_in_two_processes(tmp_path):
    "Each decodes half of the rollouts; both keep what one process by itself keeps."
    in_two_processes("""
        from accelerate import PartialState
        from test_selftrain import HOT, OTHER, PROBLEM, SFTConfig, load_policy, self_train
        from threadweaver_ref import pgrpo
        decoded, real = [], pgrpo.generate
        def counted(model, tokenizer, questions, *rest): decoded.append(len(questions)); return real(model, tokenizer, questions, *rest)
        pgrpo.generate = counted
        kept, _ = self_train(*load_policy("schoolbook-sft", device="cpu"), [PROBLEM, OTHER, PROBLEM], SFTConfig(batch=2, lr=1e-9), HOT, group=3)
        open(sys.argv[1] + f"/{PartialState().process_index}", "x").write(repr((decoded, [r.text for r in kept])))
    """, tmp_path)
    shares = [ast.literal_eval((tmp_path / rank).read_text()) for rank in "01"]
    alone, _ = self_train(*load_policy("schoolbook-sft", device="cpu"), [PROBLEM, OTHER, PROBLEM], SFTConfig(batch=2, lr=1e-9), HOT, group=3)
    assert [decoded for decoded, _ in shares] == [[5], [4]]
    assert shares[0][1] == shares[1][1] == [r.text for r in alone]
