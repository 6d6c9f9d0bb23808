"""P-GRPO: against slow implementations and TRL; its training loop in one and two processes, stopped and resumed."""
import ast
import copy
import functools
import itertools
import json
import os
import random
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from helpers import TOKENIZERS, random_trajectory, spied, tiny
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from threadweaver_ref import cli, policy, sft
from threadweaver_ref.decode import DecodeConfig, generate
from threadweaver_ref.forkjoin import ForkJoin, Limits
from threadweaver_ref.replay import replay, units
from threadweaver_ref.model import add_lora, decoding_copy, load_policy, merge_lora, save_policy
from threadweaver_ref.draw import live_plot, show_log
from threadweaver_ref.policy import (
    PGRPO_RECIPES,
    PGRPORecipe,
    PGRPOConfig,
    behaviour,
    eta,
    group_advantages,
    latency_reward,
    measure_policies,
    measure_seconds,
    of_group,
    pgrpo_loss,
    repeats,
    reward,
    roll_out,
    score_group,
    self_train,
    step_bench,
    train_pgrpo,
    train_pgrpo_recipe,
)
from threadweaver_ref.seconds import StepCost
from threadweaver_ref.sft import SFTConfig
from threadweaver_ref.tasks import bench, chain, grade, oracle, sum_of_products
from threadweaver_ref.format import Fork, Text, Thread, parse, render
from threadweaver_ref.tokenizer import control_ids, encode_prompt, encode_text
from threadweaver_ref.scoring import collate, tree_logprobs
from threadweaver_ref.tree import SpanTree

PROBLEM = sum_of_products([(2, 3), (4, 5)])
SHORT = Limits(max_tokens=40, max_thread_tokens=12)


def stand_in(text, latency, total): return SimpleNamespace(text=text, token_latency=latency, total_tokens=total)


@pytest.mark.parametrize("latency, total, expected", [(100, 100, 1.0), (90, 100, 1.05), (60, 100, 1.2), (20, 100, 1.2), (80, 100, 1.1)])
def test_reward_by_hand(latency, total, expected):
    "Equation 7 as written: min(rho * eta, clip), neither rho * min(eta, clip) nor a ratio less one."
    assert reward(stand_in("\\boxed{26}", latency, total), PROBLEM) == pytest.approx(expected)
    assert reward(stand_in("\\boxed{27}", latency, total), PROBLEM) == 0
    assert reward(stand_in("\\boxed{27}", latency, total), PROBLEM, incorrect=-1) == -1


def test_eta_counts_no_prompt():
    "Of a real rollout, from its text alone: what runs beside the longest thread, over all that was written. An empty one has none."
    model, tokenizer = load_policy("schoolbook-sft", device="cpu")
    r, = generate(model, tokenizer, ["12*3+4*5+67*8?"])
    size = lambda text: len(encode_text(tokenizer, text))
    fork, = [n for n in parse(r.text) if isinstance(n, Fork)]
    threads = [size(f"<Thread>{i}:{render(t.body)}</Thread>") for i, t in enumerate(fork.threads, 1)]
    assert len(threads) == 3 and eta(r) == pytest.approx((sum(threads) - max(threads)) / (size(r.text) + 1))
    assert reward(r, sum_of_products([(12, 3), (4, 5), (67, 8)]), rho=.3) == pytest.approx(1 + .3 * eta(r))
    assert eta(stand_in("", 30, 40)) == 0.25 and eta(stand_in("", 0, 0)) == 0


def test_advantages_against_a_loop():
    rng = random.Random(0)
    rewards = [[rng.random() for _ in range(5)] for _ in range(4)]
    expected = [[r - sum(row) / 5 for r in row] for row in rewards]
    assert torch.allclose(group_advantages(rewards), torch.tensor(expected, dtype=torch.float64))
    deviations = [(sum(a * a for a in row) / 4) ** .5 for row in expected]
    by_std = [[a / (d + 1e-4) for a in row] for row, d in zip(expected, deviations)]
    assert torch.allclose(group_advantages(rewards, "std"), torch.tensor(by_std, dtype=torch.float64))
    before = torch.tensor(rewards)
    kept = before.clone()
    group_advantages(before, "std")
    assert torch.equal(before, kept)   # nothing is overwritten


BAD = [(dict(group=1), "at least 2"), (dict(normalize="max"), "choose mean or std"), (dict(lr=0.0), "above 0"),
       (dict(mode="fast"), "choose one of"), (dict(join="glue"), "glue"), (dict(steps=0), "at least 1"), (dict(tensorboard=True), "folder"),
       (dict(optimizer="sgd"), "adamw or muon"), (dict(clip=0.0), "above 0"), (dict(warmup=2.0), "between 0 and 1"), (dict(eval_every=-1), "below 0"),
       (dict(weight_decay=-1.0), "below 0"), (dict(mixed_precision="fp16", optimizer="muon"), "adamw alone")]

@pytest.mark.parametrize("bad, message", BAD)
def test_bad_settings(bad, message):
    with pytest.raises(ValueError, match=message): PGRPOConfig(**bad)


def test_bad_shapes():
    with pytest.raises(ValueError, match="at least 2 rollouts"): group_advantages([[1.0], [2.0]])
    with pytest.raises(ValueError, match="choose mean or std"): group_advantages([[1.0, 2.0]], "max")
    with pytest.raises(ValueError, match="advantages for"): pgrpo_loss(torch.zeros(3), [1.0, 2.0])
    with pytest.raises(ValueError, match="no tokens"): pgrpo_loss(torch.zeros(0), [])


def slow_loss(model, tokenizer, rollouts, advantages):
    "Equation 4 unit by unit: every completion scored by the plain causal model behind its own context."
    total, count = 0, 0
    for (trajectory, prompt), advantage in zip(rollouts, advantages):
        for context, completion in units(trajectory, prompt, tokenizer):
            logits = model(torch.tensor([context + completion]), use_cache=False).logits[0].log_softmax(-1)
            for k, token in enumerate(completion): total = total + advantage * logits[len(context) + k - 1, token]
            count += len(completion)
    return -total / count


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("arch", ("Qwen3", "Llama"))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_loss_and_gradients_against_units(arch, name):
    "Forked rollouts: the packed loss is that of the slow one, and so are its gradients, to 1e-5."
    tokenizer = TOKENIZERS[name]()
    model, rng = tiny(arch, tokenizer), random.Random(3)
    rollouts = [(random_trajectory(rng), encode_prompt(tokenizer, "12*3?")) for _ in range(4)]
    advantages = [.5, -.25, 1.0, -.75]
    packed = [replay(t, p, tokenizer).pack() for t, p in rollouts]
    logprobs = tree_logprobs(model, collate(packed))
    fast = pgrpo_loss(logprobs, advantages, [int(p.sampled.sum()) for p in packed])
    slow = slow_loss(model, tokenizer, rollouts, advantages)
    assert fast.item() == pytest.approx(slow.item(), abs=1e-5)
    assert torch.allclose(gradients(model, fast), gradients(model, slow), atol=1e-5)


def test_the_loss_has_the_type_of_the_log_probabilities():
    "Advantages are float64, as rewards are; the loss is not."
    assert pgrpo_loss(torch.zeros(3), torch.ones(3, dtype=torch.float64)).dtype == torch.float32


def test_loss_in_parts():
    "A batch cut in two, each part over the tokens of the whole, gives the loss of the batch, not a mean of means."
    logprobs, advantages = torch.randn(10), [.5, -1.0, 2.0]
    whole = pgrpo_loss(logprobs, advantages, [2, 3, 5])
    parts = pgrpo_loss(logprobs[:2], advantages[:1], [2], count=10) + pgrpo_loss(logprobs[2:], advantages[1:], [3, 5], count=10)
    assert torch.allclose(whole, parts)


def test_banned_ids_have_no_share():
    "In sequential mode `<Parallel>` cannot be drawn: the probabilities of all others add up to 1."
    model, tokenizer = learner()
    banned, trees = tokenizer.convert_tokens_to_ids("<Parallel>"), []
    for i in range(len(tokenizer)):
        tree = SpanTree()
        tree.add([i], [tree.add(encode_prompt(tokenizer, "7?"), [], sampled=False)], sampled=True)
        trees.append(tree.pack())
    with torch.no_grad(): logprobs = tree_logprobs(model, collate(trees), [banned])
    assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-5) and logprobs[banned] == -torch.inf
    with torch.no_grad(): free = tree_logprobs(model, collate(trees))
    others = torch.arange(len(tokenizer)) != banned
    assert torch.allclose(free[others] - torch.log1p(-free[banned].exp()), logprobs[others], atol=1e-5)


def seen_scores(monkeypatch):
    "What an update asks `tree_logprobs` for, and gets: [(batch, banned, logprobs), ...]."
    found, scored = [], sft.tree_logprobs
    def spy(model, batch, banned=()):
        found.append((batch, list(banned), scored(model, batch, banned)))
        return found[-1][2]
    monkeypatch.setattr(sft, "tree_logprobs", spy)
    return found


def test_sequential_scores_are_those_of_what_was_drawn_from(monkeypatch):
    """Recorded are the model's own log-probabilities, and drawing was among all tokens that are not banned. So a score is the recorded one
    less the logarithm of the share that was left; the model's own, run over each line alone, say how large that was."""
    (model, tokenizer), found = learner(), seen_scores(monkeypatch)
    config = PGRPOConfig(steps=1, batch=1, group=4, mode="sequential", limits=SHORT, micro_tokens=1)
    rollouts = roll_out(model, tokenizer, [PROBLEM], config)
    train_pgrpo(copy.deepcopy(model), tokenizer, [PROBLEM], config, lively)
    banned = ForkJoin([0], tokenizer, mode="sequential").main.banned_ids
    assert control_ids(tokenizer)["<Parallel>"] in banned and all(sorted(b) == sorted(banned) for _, b, _ in found) and len(found) > 1
    lines = {tuple(r.tree.path_ids(len(r.tree) - 1)): r for r in rollouts}
    for batch, _, scores in found:
        r = lines[tuple(batch["input_ids"][0].tolist())]
        n = len(r.logprobs)
        with torch.no_grad(): own = model(batch["input_ids"]).logits[0, -n - 1:-1].log_softmax(-1)
        left = 1 - own[:, list(banned)].exp().sum(1)
        assert torch.allclose(scores, r.logprobs - left.log(), atol=1e-4) and (scores > r.logprobs + 1e-4).any()


def slow_step(model, rollouts, advantages):
    "Equation 4 by hand: every sampled span behind all that it sees, through the plain model; over all tokens, those without an advantage too."
    total, count = 0, 0
    for r, advantage in zip(rollouts, advantages):
        for s in (s for s in range(len(r.tree)) if r.tree.sampled[s]):
            line, n = r.tree.path_ids(s), len(r.tree.ids[s])
            own = model(torch.tensor([line]), use_cache=False).logits[0, -n - 1:-1].log_softmax(-1)
            total, count = total + advantage * own[range(n), line[-n:]].sum(), count + n
    return -total / count, count


def test_one_step_by_hand(monkeypatch):
    "Two groups; the rewards of one are all alike: its advantages are 0, and its tokens count all the same (eq. 4)."
    model, tokenizer = learner()
    config = PGRPOConfig(steps=1, batch=2, group=3, limits=SHORT, lr=1e-2, warmup=0, weight_decay=.1, betas=(.8, .9), clip=1e-2, seed=5)
    problems, trained, hand = [PROBLEM, sum_of_products([(7, 8)])], copy.deepcopy(model), copy.deepcopy(model)
    pay = lambda r, p: .25 if p is PROBLEM else lively(r, p)
    passes = seen_scores(monkeypatch)
    row, = train_pgrpo(trained, tokenizer, problems, config, pay)
    chosen = sft.step_problems(problems, 0, config, None)
    rollouts = roll_out(model, tokenizer, chosen, config, 0)
    scores = [[pay(r, p) for r in rollouts[3 * i:3 * i + 3]] for i, p in enumerate(chosen)]
    advantages = [x - sum(group) / 3 for group in scores for x in group]
    nought, at = [abs(a) < 1e-12 for a in advantages], 3 * chosen.index(PROBLEM)
    assert sum(len(batch["input_ids"]) for batch, *_ in passes) == 6 - sum(nought)   # no pass for what has no advantage
    assert all(nought[at:at + 3]) and not all(nought) and row["used"] == pytest.approx(1 - sum(nought) / 6)
    loss, count = slow_step(hand, rollouts, advantages)
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-6) and row["sampled"] == count == sum(len(r.logprobs) for r in rollouts)
    loss.backward()
    assert row["grad_norm"] == pytest.approx(torch.nn.utils.clip_grad_norm_(hand.parameters(), 1e-2).item(), rel=1e-4)
    torch.optim.AdamW(hand.parameters(), 1e-2, (.8, .9), weight_decay=.1).step()
    assert torch.allclose(adapters(trained), adapters(hand), atol=1e-5) and not torch.allclose(adapters(trained), adapters(model), atol=1e-3)


def test_settings_of_rollouts_arrive(monkeypatch):
    "Temperature 1 and nothing left out, join, mode and limits as asked for; new seeds in every step."
    (model, tokenizer), decoded, chosen = learner(), spied(monkeypatch, policy, "generate"), spied(monkeypatch, policy, "step_problems")
    config = PGRPOConfig(steps=3, batch=2, group=3, mode="autoregressive", join="result", chat=False, limits=Limits(11, 7), seed=4)
    texts = train_pgrpo(copy.deepcopy(model), tokenizer, [PROBLEM, sum_of_products([(7, 8)])], config, lively)
    assert len(texts) == len(decoded) == 3
    for (_, _, questions, decoding, seeds), _ in decoded:
        assert decoding == DecodeConfig("autoregressive", "result", 1.0, limits=Limits(11, 7), chat=False)
        assert len(questions) == 6 == 3 + questions.count(PROBLEM.question)
        assert len(set(map(str, seeds))) == 6
    assert len({str(seed) for (*_, seeds), _ in decoded for seed in seeds}) == 18
    other = spied(monkeypatch, policy, "generate")
    train_pgrpo(copy.deepcopy(model), tokenizer, [PROBLEM], replace(config, steps=1, batch=1, seed=5), lively)
    assert not {str(s) for s in other[0][0][4]} & {str(s) for s in decoded[0][0][4]} and [c[0][2].seed for c in chosen[-1:]] == [5]


@pytest.mark.parametrize("join", ["concat", "result", "kv"])
def test_rollouts_join_as_they_are_told(monkeypatch, join):
    "What policies decode with is what they are asked for, in `answers` too."
    (model, tokenizer), decoded = learner(), spied(monkeypatch, policy, "generate")
    roll_out(model, tokenizer, [PROBLEM], PGRPOConfig(group=2, join=join, limits=SHORT))
    policy.answers(model, tokenizer, [PROBLEM], "sequential", join, .5)
    assert [(c[0][3].mode, c[0][3].join, c[0][3].temperature) for c in decoded] == [("parallel", join, 1), ("sequential", join, .5)]


def test_settings_of_the_update_arrive(monkeypatch, tmp_path):
    (model, tokenizer), optimizers = learner(), spied(monkeypatch, torch.optim, "AdamW")
    centred, cut, muons = spied(monkeypatch, policy, "group_advantages"), spied(monkeypatch, policy, "micro_batches"), spied(monkeypatch, sft, "Muon")
    clipped, seeded = spied(monkeypatch, sft.Accelerator, "clip_grad_norm_"), spied(monkeypatch, sft, "set_seed")
    made, saved = spied(monkeypatch, sft, "Accelerator"), spied(monkeypatch, sft, "_checkpoint")
    config = PGRPOConfig(steps=4, batch=1, group=3, normalize="std", lr=.02, warmup=.5, weight_decay=.07, betas=(.7, .8), clip=.3, micro_tokens=99,
                         seed=3, folder=str(tmp_path), save_every=3, limits=SHORT, mixed_precision="bf16")
    log = train_pgrpo(copy.deepcopy(model), tokenizer, [PROBLEM], config, lively)
    assert [r["lr"] / .02 for r in log] == pytest.approx([.5, 1, .5, 0]) and {c[0][1] for c in centred} == {"std"} and {c[0][1] for c in cut} == {99}
    (args, named), = optimizers
    assert args[1:] == (.02, (.7, .8)) and named["weight_decay"] == .07 and not muons
    assert {c[0][2] for c in clipped} == {.3} and made == [((), {"mixed_precision": "bf16"})] and seeded == [((3,), {})]
    assert [c[0][2] for c in saved] == [0, 3, 4] and Path(saved[0][0][1]) == tmp_path
    train_pgrpo(copy.deepcopy(model), tokenizer, [PROBLEM], replace(config, steps=1, folder=None, optimizer="muon", mixed_precision="no"), lively)
    (args, named), = muons
    assert args[1] == .02 and named == {"weight_decay": .07} and len(args[0]) == 14


def test_defaults_are_the_ones_written_down():
    assert asdict(PGRPOConfig()) == dict(
        steps=100, batch=16, group=8, mode="parallel", join="concat", chat=None, limits=asdict(Limits(max_tokens=2048, max_thread_tokens=1024)),
        normalize="mean", lr=1e-3, optimizer="adamw", warmup=.05, weight_decay=0.0, betas=(.9, .95), clip=1.0, micro_tokens=2048, seed=0,
        folder=None, save_every=25, eval_every=0, tensorboard=False, mixed_precision="no")


def test_evaluation_is_as_often_as_asked_for(monkeypatch):
    (model, tokenizer), asked = learner(), spied(monkeypatch, policy, "answers")
    monkeypatch.setattr(policy, "generate", lambda m, t, q, decoding, seeds: generate(m, t, q, replace(decoding, limits=SHORT), seeds))
    config = PGRPOConfig(steps=5, batch=1, group=2, eval_every=2, mode="sequential", join="kv", limits=SHORT)
    log = train_pgrpo(copy.deepcopy(model), tokenizer, [PROBLEM], config, lively, [PROBLEM] * 2)
    assert [r["step"] for r in log if "eval" in r] == [2, 4] and [c[0][3:6] for c in asked] == [("sequential", "kv", 0.0)] * 2


def wide_hook(tokenizer):
    "A fork first; the threads write until they are full."
    block = encode_text(tokenizer, "<Parallel><Outlines><Outline>1:a</Outline><Outline>2:b</Outline></Outlines>")
    def hook(branch, ids, logits):
        out = logits.clone()
        out[[*control_ids(tokenizer).values(), *tokenizer.all_special_ids]] = -torch.inf
        if not branch.path and not branch.forks:
            out[:] = -torch.inf
            out[block[len(ids)]] = 0
        return out
    return hook


@pytest.mark.parametrize("arch", ["Mistral", "GPT2"])
def test_forced_tokens_behind_the_window(arch, monkeypatch, tmp_path):
    "A join may put some there. Nothing sampled sees them, and what is sampled is learned as by hand."
    tokenizer = TOKENIZERS["char"]()
    torch.manual_seed(0)
    small = dict(n_positions=42, n_embd=32, n_layer=2, n_head=2, vocab_size=len(tokenizer), initializer_range=.3,
                 bos_token_id=None, eos_token_id=tokenizer.eos_token_id, resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.)
    model = tiny(arch, tokenizer, sliding_window=42) if arch == "Mistral" else GPT2LMHeadModel(GPT2Config(**small)).eval()
    monkeypatch.setattr(policy, "generate", lambda m, t, q, decoding, seeds: generate(m, t, q, replace(decoding, hook=wide_hook(t)), seeds))
    config = PGRPOConfig(steps=1, batch=1, group=3, limits=Limits(100, 12), warmup=0)
    pay = lambda r, p: sum(map(ord, r.text)) % 9
    rollouts, problem = roll_out(model, tokenizer, [sum_of_products([(7, 8)])], config), sum_of_products([(7, 8)])
    ends = [max(map(r.tree.end, range(len(r.tree)))) for r in rollouts]
    assert min(ends) > 42 and all(r.tree.end(s) <= 42 for r in rollouts for s in range(len(r.tree)) if r.tree.sampled[s])
    trained = copy.deepcopy(model)
    row, = train_pgrpo(trained, tokenizer, [problem], config, pay)
    scores = [pay(r, problem) for r in rollouts]
    loss, count = slow_step(model, rollouts, [x - sum(scores) / 3 for x in scores])
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-5) and row["sampled"] == count and row["grad_norm"] > 0
    log = sft.train_sft(trained, tokenizer, [r.tree for r in rollouts], SFTConfig(steps=1, batch=3, lr=1e-9))   # ready trees, in fine-tuning
    assert log[0]["sampled"] == count and log[0]["tokens"] < sum(len(r.tree.pack()) for r in rollouts)


def test_self_training_twice_in_one_folder(tmp_path):
    "The same again is loaded; other rollouts are another run, and one line says so."
    model, tokenizer = load_policy("tiny-sft-random", device="cpu")
    problems, limits = [PROBLEM, sum_of_products([(3, 7), (8, 2)])], Limits(300, 150)
    sft_config, decoding = SFTConfig(batch=2, lr=1e-3, folder=str(tmp_path)), DecodeConfig(temperature=1.5, limits=limits)
    learned = copy.deepcopy(model)
    kept, log = self_train(learned, tokenizer, problems, sft_config, decoding, group=3)
    again = copy.deepcopy(model)
    assert self_train(again, tokenizer, problems, sft_config, decoding, group=3)[1] == log and torch.equal(adapters(again), adapters(learned))
    assert not torch.equal(adapters(model), adapters(learned))
    for other in (model, learned):
        with pytest.raises(ValueError, match="holds a run with another training set"):
            self_train(copy.deepcopy(other), tokenizer, problems, sft_config, replace(decoding, seed=1), group=3)


def test_latency_reward_by_hand():
    group = [stand_in("\\boxed{26}", 100, 100), stand_in("\\boxed{26}", 50, 90), stand_in("\\boxed{1}", 10, 10)]
    assert score_group(latency_reward, group, PROBLEM) == pytest.approx([1 - .5 / 3, 1 + .5 / 3, 0])
    assert score_group(functools.partial(latency_reward, rho=5.0), group, PROBLEM) == pytest.approx([.8, 1.2, 0])
    assert score_group(reward, group, PROBLEM) == pytest.approx([1, 1.2, 0])
    assert score_group(latency_reward, group[2:], PROBLEM) == [0]


def test_seconds_by_hand():
    "Two steps of one branch, one of two; two passes that read 5 and 4 tokens."
    rollout = SimpleNamespace(load=[(1, 6), (2, 9), (1, 20)], timeline=[SimpleNamespace(forced=n) for n in (5, 4, 0)])
    assert StepCost(1, .1, .01, 10, .5).seconds(rollout) == pytest.approx(3 + .4 + .01 * (6 + 18 + 20) + 20 + 4.5)


@pytest.mark.parametrize("join", ("concat", "result", "kv"))
def test_load_of_real_rollouts(join):
    "What a decoder notes of each step: live branches as on the timeline, at most as many slots as were in use at the peak."
    model, tokenizer = load_policy("schoolbook-sft", device="cpu")
    for r in generate(model, tokenizer, ["12*3+4*5?", "347*6+58*9+21*74?", "7*8?"], DecodeConfig(join=join)):
        assert len(r.load) == r.decode_steps - 1 and max(slots for _, slots in r.load) == r.peak_slots
        lines = [(i.start, i.end) for i in r.timeline]
        first = min(start for start, _ in lines)
        assert [live for live, _ in r.load] == [sum(start < t <= end for start, end in lines) for t in range(first + 1, first + r.decode_steps)]


@functools.cache
def learner():
    tokenizer = TOKENIZERS["char"]()
    return tiny("Qwen3", tokenizer, initializer_range=.1), tokenizer


def lively(rollout, problem): return (len(rollout.text) % 7) / 7 + rollout.text.count("1")   # differs among rollouts of random weights


def test_rollouts_do_not_depend_on_who_decodes_them():
    "Two shares, decoded apart, are the rollouts of one process."
    (model, tokenizer), config = learner(), PGRPOConfig(batch=2, group=3, limits=SHORT)
    problems = [PROBLEM, sum_of_products([(7, 8)])]
    whole = roll_out(model, tokenizer, problems, config, 5)
    shares = [roll_out(model, tokenizer, problems, config, 5, k, 2) for k in (0, 1)]
    together = [shares[i % 2][i // 2] for i in range(6)]
    assert [r.text for r in together] == [r.text for r in whole] and len({r.text for r in whole}) > 2


def test_decoding_copy_gives_the_same_logits():
    model, tokenizer = learner()
    adapted = add_lora(copy.deepcopy(model))
    with torch.no_grad():
        for n, p in adapted.named_parameters():
            if "lora_B" in n: p.normal_(0, .02, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([encode_prompt(tokenizer, "12*3+4*5?")])
    before = adapted(ids).logits
    assert (decoding_copy(adapted)(ids).logits - before).abs().max() < 1e-4
    assert (merge_lora(copy.deepcopy(adapted))(ids).logits - before).abs().max() < 1e-4
    assert torch.equal(adapted(ids).logits, before) and (model(ids).logits - before).abs().max() > 1e-3


def run(folder=None, steps=4, own=False, **options):
    "A short run, stopped after `steps`; `own`: with a reward that only the first process gives as it should be."
    model, tokenizer = learner()
    torch.manual_seed(0)
    adapted = add_lora(copy.deepcopy(model), r=4)
    config = PGRPOConfig(**{**dict(steps=4, batch=2, group=4, limits=SHORT, lr=1e-2, save_every=2, folder=folder), **options})
    reward = (lambda r, p: lively(r, p) + int(os.environ["RANK"]) * random.random()) if own else lively
    stop = lambda step, row: (_ for _ in ()).throw(KeyboardInterrupt) if step == steps and steps < 4 else None
    log = train_pgrpo(adapted, tokenizer, [PROBLEM, sum_of_products([(7, 8)]), sum_of_products([(1, 9)])], config, reward, [PROBLEM] * 3, stop)
    return adapted, log


def adapters(model): return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def test_stopped_and_resumed_is_uninterrupted(tmp_path):
    whole, log = run()
    with pytest.raises(KeyboardInterrupt): run(str(tmp_path), steps=3)
    resumed, again = run(str(tmp_path))
    assert torch.equal(adapters(whole), adapters(resumed))
    assert [r["reward"] for r in log] == pytest.approx([r["reward"] for r in again]) and log[0]["grad_norm"] > 0


def test_a_reward_is_learned():
    "Rollouts that write a certain character earn more: after a few steps it is written more often."
    model, tokenizer = learner()
    adapted = copy.deepcopy(model)
    config = PGRPOConfig(steps=40, batch=1, group=16, limits=Limits(max_tokens=10), lr=5e-3)
    likes = lambda rollout, problem: float(rollout.text.count("7"))
    log = train_pgrpo(adapted, tokenizer, [PROBLEM], config, likes)
    before, after = (sum(r["reward"] for r in rows) / 5 for rows in (log[:5], log[-5:]))
    assert before < 1 and after > 2


def test_all_alike_changes_nothing():
    "Groups whose rollouts all earn the same leave the weights as they are."
    model, tokenizer = learner()
    adapted = copy.deepcopy(model)
    log = train_pgrpo(adapted, tokenizer, [PROBLEM], PGRPOConfig(steps=1, batch=1, group=2, limits=SHORT), lambda r, p: 0.3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), adapted.parameters()))
    assert log[0]["used"] == log[0]["loss"] == log[0]["grad_norm"] == 0 < log[0]["sampled"]


def test_a_question_without_room_for_an_answer():
    "Its rollouts have no tokens; whatever they earn, the others are learned."
    tokenizer = TOKENIZERS["char"]()
    model, numbers = tiny("Qwen3", tokenizer, max_position_embeddings=12), itertools.count()
    config = PGRPOConfig(steps=1, batch=2, group=2, limits=SHORT)
    problems = [sum_of_products([(7, 8)]), sum_of_products([(7, 8)] * 5)]
    assert sorted(len(r.logprobs) for r in roll_out(model, tokenizer, problems, config))[:2] == [0, 0]
    row, = train_pgrpo(model, tokenizer, problems, config, lambda r, p: next(numbers))
    assert row["used"] == 1 and row["grad_norm"] > 0


def test_muon_trains_adapters_too():
    adapted, log = run(optimizer="muon", lr=1e-2)
    start, _ = run(steps=4, lr=1e-9)
    assert log[0]["grad_norm"] > 0 and not torch.allclose(adapters(adapted), adapters(start))


def test_the_base_stays_as_it_was():
    model, _ = learner()
    before = [p.clone() for p in model.parameters()]
    adapted, _ = run()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) and not adapted.training
    base = [p for n, p in adapted.named_parameters() if "lora" not in n]
    assert len(base) == len(before) and all(torch.equal(a, b) for a, b in zip(before, base))


def test_a_reward_that_is_no_number():
    model, tokenizer = learner()
    with pytest.raises(ValueError, match="no finite number"):
        train_pgrpo(copy.deepcopy(model), tokenizer, [PROBLEM], PGRPOConfig(steps=1, batch=1, group=2, limits=SHORT), lambda r, p: float("nan"))


def test_a_group_gets_as_many_rewards_as_rollouts():
    few = of_group(lambda rollouts, problem: [1.0] * (len(rollouts) - 1))
    with pytest.raises(ValueError, match="gave 1 rewards for 2 rollouts"): score_group(few, [stand_in("", 1, 1)] * 2, PROBLEM)


def test_latency_reward_keeps_right_above_wrong():
    right, wrong = stand_in("\\boxed{26}", 9, 9), stand_in("\\boxed{27}", 1, 1)
    with pytest.raises(ValueError, match="below 1"): latency_reward([right, wrong], PROBLEM, clip=1.2)
    assert latency_reward([right, wrong], PROBLEM, cost=lambda r: 0)[0] > 0   # nothing cost anything


def test_behaviour_by_hand():
    "Right, forked, forked where it pays and where it cannot, how wide, of three made-up rollouts."
    pays, never = sum_of_products([(347, 689), (589, 973), (218, 746)]), chain(random.Random(0))
    say = lambda p, forks, latency, right=True: SimpleNamespace(
        text=f"\\boxed{{{p.answer + (not right)}}}", forks=forks, token_latency=latency, total_tokens=latency, well_formed=True,
        trajectory=[Fork(["1*2", "1*2"][:1 + (right is True)], [])] * forks)
    did = behaviour([say(pays, 1, oracle(pays).best), say(never, 0, oracle(never).best), say(never, 1, 999, False)], [pays, never, never])
    assert did["accuracy"] == pytest.approx(2 / 3) and did["fork_rate"] == pytest.approx(2 / 3) and did["share_of_possible"] == pytest.approx(1)
    assert did["fork_rate_pays"] == 1 and did["fork_rate_never"] == .5 and did["repeats"] == pytest.approx(1 / 3)
    assert did["width"] == 1.5   # forks of two and of one
    assert behaviour([say(never, 0, 9)], [never])["width"] is None


def test_repeated_work_is_seen():
    "Outlines of one fork count, of an inner one too; two forks in a row that ask for the same do not."
    once, twice = Fork(["a=1*2", "b=3*4"], [Thread([]), Thread([])]), Fork(["a=1*2", "b=1*2"], [Thread([]), Thread([])])
    inner = Fork(["c", "d"], [Thread([Text("x"), twice]), Thread([])])
    assert [repeats(SimpleNamespace(trajectory=t)) for t in ([once, once], [Text("x")], [once, twice], [inner])] == [False, False, True, True]


def test_self_training_keeps_what_is_right():
    model, tokenizer = learner()
    with pytest.raises(ValueError, match="none of 2 rollouts"):
        self_train(copy.deepcopy(model), tokenizer, [PROBLEM] * 2, SFTConfig(batch=2), DecodeConfig(temperature=1.0, limits=SHORT))


def test_live_plot(monkeypatch):
    "One figure, drawn again every second step; none is left open."
    drawn, before = [], plt.get_fignums()   # other tests leave theirs
    monkeypatch.setattr("IPython.display.display", lambda **_: SimpleNamespace(update=drawn.append))
    on_step = live_plot(every=2)
    for step in range(1, 5): on_step(step, {"step": step, "accuracy": .5, "fork_rate_pays": .5, "fork_rate_never": None, "token_latency": 9.0})
    assert len(drawn) == 2 and [len(ax.lines[0].get_xdata()) for ax in drawn[1].axes] == [4, 4, 4] and plt.get_fignums() == before


def test_step_bench():
    found = step_bench(problems=2, group=2, alone=2, steps=1)
    assert found["processes"] == 1 and all(found[k] > 0 for k in ("rollout_seconds", "update_seconds", "alone_over_batched"))


def test_empty_list():
    model, tokenizer = learner()
    with pytest.raises(ValueError, match="empty"): train_pgrpo(model, tokenizer, [], PGRPOConfig(steps=1))


def test_sequential_baseline_never_forks():
    model, tokenizer = learner()
    rollouts = roll_out(model, tokenizer, [PROBLEM], PGRPOConfig(group=4, mode="sequential", limits=SHORT))
    assert all(r.forks == 0 for r in rollouts) and generate(model, tokenizer, [PROBLEM.question], DecodeConfig(limits=SHORT))


def trl_loss(loss_type, model, tokenizer, rows, advantages, tmp_path):
    "What TRL's GRPO trainer makes of (prompt ids, completion ids) and advantages: no scaling of rewards, no KL."
    pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    args = GRPOConfig(output_dir=str(tmp_path), loss_type=loss_type, scale_rewards="none", beta=0.0, use_cpu=True, report_to="none", bf16=False,
                      epsilon_high=5.0,   # `cispo` caps the ratio, 1 here, at this
                      num_generations=len(rows), per_device_train_batch_size=len(rows), gradient_accumulation_steps=1, gradient_checkpointing=False)
    trainer = GRPOTrainer(model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args, processing_class=tokenizer,
                          train_dataset=Dataset.from_list([{"prompt": "1"}] * len(rows)))
    trainer.current_gradient_accumulation_steps = 1
    width = lambda k: max(len(r[k]) for r in rows)
    pad = lambda ids, n, left: [0] * (n - len(ids)) * left + ids + [0] * (n - len(ids)) * (not left)
    inputs = {"advantages": torch.tensor(advantages), "num_items_in_batch": torch.tensor(sum(len(c) for _, c in rows))}
    for k, (name, left) in enumerate((("prompt", True), ("completion", False))):
        inputs[f"{name}_ids"] = torch.tensor([pad(r[k], width(k), left) for r in rows])
        inputs[f"{name}_mask"] = torch.tensor([pad([1] * len(r[k]), width(k), left) for r in rows])
    return trainer._compute_loss(model.train(), inputs)


@pytest.mark.parametrize("loss_type", ("dapo", "cispo"))
def test_loss_and_gradients_against_trl(loss_type, tmp_path):
    """Rollouts without forks. TRL's `dapo` writes the loss as ratio times advantage, whose gradient is ours and whose value is not;
    its `cispo`, on-policy, is the same loss with the logarithm in it, so there the values agree too."""
    tokenizer, rng = TOKENIZERS["char"](), random.Random(1)
    model = tiny("Qwen3", tokenizer)
    letters = encode_prompt(tokenizer, "0123456789+*=;")
    rows = [(rng.choices(letters, k=rng.randint(3, 9)), rng.choices(letters, k=rng.randint(4, 20))) for _ in range(6)]
    advantages = [rng.uniform(-1, 1) for _ in rows]
    theirs = trl_loss(loss_type, model, tokenizer, rows, advantages, tmp_path)
    their_gradients = gradients(model, theirs)
    packed = []
    for prompt, completion in rows:
        tree = SpanTree()
        tree.add(completion, [tree.add(prompt, [], sampled=False)], sampled=True)
        packed.append(tree.pack())
    ours = pgrpo_loss(tree_logprobs(model, collate(packed)), advantages, [len(c) for _, c in rows])
    if loss_type == "cispo": assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert torch.allclose(gradients(model, ours), their_gradients, atol=1e-5) and their_gradients.abs().max() > 1e-3


def test_a_run_goes_on_with_its_own_reward_only(tmp_path):
    run(str(tmp_path), lr=1e-3)
    model, tokenizer = learner()
    config = PGRPOConfig(steps=6, batch=2, group=4, limits=SHORT, lr=1e-3, save_every=2, folder=str(tmp_path))
    with pytest.raises(ValueError, match="another reward"):
        train_pgrpo(add_lora(copy.deepcopy(model), r=4), tokenizer, [PROBLEM], config, functools.partial(latency_reward, rho=1.0))


def test_train_command_saves_adapter_and_merged(tmp_path, monkeypatch):
    "`threadweaver-ref train tiny-rl`: two folders, with the same logits; the merged one needs no peft."
    config = PGRPOConfig(steps=1, batch=1, group=2, limits=Limits(300, 150), lr=1e-2)
    recipe = PGRPORecipe(lively, config, self_training=2, rounds=2, selection=2, selections=1, start="schoolbook-sft", problems=lambda rng, step: PROBLEM)
    monkeypatch.setitem(PGRPO_RECIPES, "tiny-rl", recipe)
    folders = ["--out", str(tmp_path / "rl"), "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["threadweaver-ref", "train", "tiny-rl", "--seed", "3", *folders])
    with pytest.raises(SystemExit) as stop: cli.main()
    assert not stop.value.code and (tmp_path / "rl" / "adapter_config.json").is_file() and not (tmp_path / "rl" / "config.json").exists()
    run = tmp_path / "runs" / "seed-3" / "tiny-rl"   # other seeds than 0 keep their runs apart
    trained, = (tmp_path / "runs" / "seed-3").glob("self-training-parallel-*")
    for k in (1, 2): assert [json.loads(r)["step"] for r in (trained / f"round-{k}" / "log.jsonl").open()] == [1, 2]   # both rollouts, twice
    assert (run / "selection-1" / "log.jsonl").is_file() and not (run / "selection-2").exists()
    assert '"seed": 3' in next(run.glob("step-*/step.json")).read_text()
    adapted, tokenizer = load_policy("schoolbook-sft", adapter=tmp_path / "rl", device="cpu")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "rl-merged")
    ids = torch.tensor([encode_prompt(tokenizer, PROBLEM.question)])
    with torch.no_grad(): assert (adapted(ids).logits - merged(ids).logits).abs().max() < 1e-4


def test_self_training_keeps_the_best_of_every_group():
    model, tokenizer = load_policy("tiny-sft-random", device="cpu")
    problems = [PROBLEM, sum_of_products([(3, 7), (8, 2), (5, 9)])]
    config = DecodeConfig(temperature=1.0, limits=Limits(300, 150))
    alike = generate(model, tokenizer, [p.question for p in problems for _ in range(6)], config)   # what self_train will see
    kept, _ = self_train(copy.deepcopy(model), tokenizer, problems, SFTConfig(batch=2, lr=1e-9), config, group=6, reward=latency_reward)
    assert len(kept) == 2
    for k, p, group in zip(kept, problems, (alike[:6], alike[6:])):
        good = [r.token_latency for r in group if grade(r.text, p) and r.well_formed]
        assert k.token_latency == min(good) < max(good) and grade(k.text, p)


def test_runs_that_begin_alike_share_their_self_training(tmp_path, monkeypatch):
    config = PGRPOConfig(steps=1, batch=1, group=2, limits=Limits(300, 150), lr=1e-9)
    recipe = PGRPORecipe(lively, config, self_training=2, rounds=1, selection=0, start="schoolbook-sft", problems=lambda rng, step: PROBLEM)
    for name in ("tiny-rl", "tiny-rl-eq7"): monkeypatch.setitem(PGRPO_RECIPES, name, recipe)
    first, *_ = train_pgrpo_recipe("tiny-rl", tmp_path)
    monkeypatch.setattr(policy, "self_train", None)   # would fail
    second, *_ = train_pgrpo_recipe("tiny-rl-eq7", tmp_path)
    assert torch.allclose(adapters(first), adapters(second), atol=1e-6)
    assert (adapters(second) == 0).double().mean() < .1   # half of an adapter starts at 0: something was trained
    for changed in (replace(recipe, rounds=2), replace(recipe, config=replace(config, mode="sequential"))):
        monkeypatch.setitem(PGRPO_RECIPES, "tiny-rl-eq7", changed)
        with pytest.raises(TypeError): train_pgrpo_recipe("tiny-rl-eq7", tmp_path, folder=str(tmp_path / "third"))


def in_two_processes(script, folder):
    "Run a script in two gloo processes on the CPU; it gets the folder as its argument."
    (folder / "process.py").write_text(textwrap.dedent(script))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(folder / "process.py"), str(folder)]
    subprocess.run(launch, check=True, timeout=300, env={**os.environ, "ACCELERATE_USE_CPU": "true"})


def test_step_bench_in_two_processes(tmp_path):
    "They find each other, though it is the first thing they do; one writes."
    in_two_processes("""
        import json, sys
        from accelerate import PartialState
        from threadweaver_ref.policy import step_bench
        found = step_bench(problems=2, group=2, alone=2, steps=1)
        if PartialState().is_main_process: open(sys.argv[1] + "/found", "x").write(json.dumps(found))
    """, tmp_path)
    assert json.loads((tmp_path / "found").read_text())["processes"] == 2


def test_self_training_in_two_processes(tmp_path):
    "Each decodes half of the rollouts; both keep what one process by itself keeps."
    script = """
        import sys
        from accelerate import PartialState
        from threadweaver_ref import policy
        from threadweaver_ref.decode import DecodeConfig, generate
        from threadweaver_ref.forkjoin import Limits
        from threadweaver_ref.model import load_policy
        from threadweaver_ref.sft import SFTConfig
        from threadweaver_ref.tasks import sum_of_products
        decoded = []
        def counted(model, tokenizer, questions, *rest): decoded.append(len(questions)); return generate(model, tokenizer, questions, *rest)
        policy.generate = counted
        problems = [sum_of_products([(2, 3), (4, 5)]), sum_of_products([(3, 7), (8, 2)]), sum_of_products([(6, 2), (9, 9)])]
        kept, _ = policy.self_train(*load_policy("tiny-sft-random", device="cpu"), problems, SFTConfig(batch=2, lr=1e-9),
                                    DecodeConfig(temperature=1.0, limits=Limits(300, 150)), group=3)
        open(sys.argv[1] + f"/{PartialState().process_index}", "x").write(repr((decoded, [r.text for r in kept])))
    """
    in_two_processes(script, tmp_path)
    shares = [ast.literal_eval((tmp_path / rank).read_text()) for rank in "01"]
    model, tokenizer = load_policy("tiny-sft-random", device="cpu")
    problems = [PROBLEM, sum_of_products([(3, 7), (8, 2)]), sum_of_products([(6, 2), (9, 9)])]
    alone, _ = self_train(model, tokenizer, problems, SFTConfig(batch=2, lr=1e-9), DecodeConfig(temperature=1.0, limits=Limits(300, 150)), group=3)
    assert [decoded for decoded, _ in shares] == [[5], [4]]
    assert shares[0][1] == shares[1][1] == [r.text for r in alone]


def test_tensorboard(tmp_path):
    "Rewards and losses of every step can be read back from its files."
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, log = run(str(tmp_path), tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [e.value for e in events.Scalars("reward")] == pytest.approx([r["reward"] for r in log])


def test_policies_are_measured(tmp_path, monkeypatch):
    "Adapters of two recipes and two seeds: one row for each mode, and speedups where both answers are right."
    model, tokenizer = load_policy("schoolbook-sft", device="cpu")
    adapter = add_lora(copy.deepcopy(model), r=2)   # as it starts: it changes nothing
    recipes = {"tiny-rl": PGRPORecipe(lively, PGRPOConfig(), start="schoolbook-sft"),
               "tiny-rl-sequential": PGRPORecipe(lively, PGRPOConfig(mode="sequential"), start="schoolbook-sft")}
    monkeypatch.setattr(policy, "PGRPO_RECIPES", recipes)
    monkeypatch.setattr(policy, "BENCH_FAMILIES", families := ("gsm8k", "sums"))
    for folder in ("tiny-rl", "tiny-rl-sequential", "seed-2/tiny-rl"): save_policy(adapter, tokenizer, tmp_path / folder / "policy")
    found = measure_policies(tmp_path, 1)
    assert [(r["recipe"], r["seed"], r["mode"]) for r in found["policies"]] == [
        ("schoolbook-sft", 0, "parallel"), ("tiny-rl", 0, "parallel"), ("tiny-rl-sequential", 0, "sequential"),
        ("tiny-rl-sequential", 0, "parallel"), ("tiny-rl", 2, "parallel")]
    start, rl, baseline, unbound, other = [r["families"] for r in found["policies"]]
    assert start == rl == unbound == other and baseline["all"]["fork_rate"] == 0 < rl["all"]["fork_rate"]
    problems = [p for f in families for p in bench(f, 1)]
    both = [[r.token_latency if grade(r.text, p) else None for r, p in zip(generate(
        model, tokenizer, [p.question for p in problems], DecodeConfig(mode)), problems)] for mode in ("sequential", "parallel")]
    assert found["speedups"] == {0: [s / p if s and p else None for s, p in zip(*both)]} and max(filter(None, found["speedups"][0])) > 1.5
    clock = measure_seconds(tmp_path, 1)["clock"]
    assert [(r["recipe"], r["seed"], r["mode"]) for r in clock] == [
        ("tiny-rl", 0, "parallel"), ("tiny-rl-sequential", 0, "sequential"), ("tiny-rl", 2, "parallel")]
    assert clock[1]["token_latency"]["all"] == pytest.approx(baseline["all"]["token_latency"]) and all(r["seconds"]["all"] > 0 for r in clock)
