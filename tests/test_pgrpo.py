"""P-GRPO: one step by hand, scores of what was drawn from, settings that arrive, resume, stops, limits of models."""
import copy
import functools
import itertools
import os
import random
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from helpers import TOKENIZERS, spied, tiny
from training import adapters, stop_at
from transformers import GPT2Config, GPT2LMHeadModel

from threadweaver_ref import pgrpo, train
from threadweaver_ref import reward as reward_room
from threadweaver_ref.checkpoint import RunFolder, describe
from threadweaver_ref.decode import DecodeConfig, generate
from threadweaver_ref.forkjoin import ForkJoin, Limits
from threadweaver_ref.format import Fork, Text, Thread
from threadweaver_ref.model import add_lora, decoding_copy, merge_lora
from threadweaver_ref.pgrpo import PGRPOConfig, RoundedRollouts, Speedup, drawn_problems, reference_latencies, roll_out, summary, train_pgrpo
from threadweaver_ref.reward import group_advantages, reward
from threadweaver_ref.schoolbook import sum_of_products
from threadweaver_ref.scoring import collate, tree_logprobs
from threadweaver_ref.sft import SFTConfig, train_sft
from threadweaver_ref.tokenizer import control_ids, encode_prompt, encode_text
from threadweaver_ref.train import TrainConfig, step_problems
from threadweaver_ref.tree import SpanTree

PROBLEM = sum_of_products([(2, 3), (4, 5)])
SHORT = Limits(max_tokens=40, max_thread_tokens=12)


@functools.cache
def learner():
    tokenizer = TOKENIZERS["char"]()
    return tiny("Qwen3", tokenizer, initializer_range=.1), tokenizer


def lively(rollout, problem): return (len(rollout.text) % 7) / 7 + rollout.text.count("1")   # differs among rollouts of random weights


def run(folder=None, steps=4, own=False, paid=None, **options):
    "A short run, stopped after `steps`; `own`: with a reward that only the first process gives as it should be; `paid`: with another one."
    model, tokenizer = learner()
    torch.manual_seed(0)
    adapted = add_lora(copy.deepcopy(model), r=4)
    config = PGRPOConfig(**{**dict(steps=4, batch=2, group=4, limits=SHORT, lr=1e-2, save_every=2, folder=folder), **options})
    pay = (lambda r, p: lively(r, p) + int(os.environ["RANK"]) * random.random()) if own else paid or lively
    problems = [PROBLEM, sum_of_products([(7, 8)]), sum_of_products([(1, 9)])]
    return adapted, train_pgrpo(adapted, tokenizer, problems, config, pay, stop_at(steps) if steps < 4 else None)


# ---- settings

BAD = [(dict(group=1), "at least 2"), (dict(normalize="max"), "choose mean or std"), (dict(lr=0.0), "above 0"),
       (dict(mode="fast"), "choose one of"),
       (dict(join="glue"), "glue"), (dict(steps=0), "at least 1"), (dict(attention="flex"), "dense"),
       (dict(optimizer="sgd"), "adamw or muon"), (dict(clip=0.0), "above 0"), (dict(warmup=2.0), "between 0 and 1"),
       (dict(weight_decay=-1.0), "below 0"), (dict(decode_dtype="half"), "choose bfloat16 or float16"),
       (dict(temperature=0.0), "at least 0.001"), (dict(temperature=float("nan")), "finite"),
       (dict(mixed_precision="fp16", optimizer="muon"), "adamw alone")]

@pytest.mark.parametrize("bad, message", BAD)
def test_bad_settings(bad, message):
    with pytest.raises(ValueError, match=message): PGRPOConfig(**bad)


def test_defaults_are_the_ones_written_down():
    assert asdict(PGRPOConfig()) == dict(
        asdict(TrainConfig()), steps=100, batch=16, weight_decay=0.0, save_every=25, mixed_precision="no", group=8, mode="parallel",
        temperature=1.0, sequential=0.0, limits=asdict(Limits(max_tokens=2048, max_thread_tokens=1024)), normalize="mean", decode_dtype=None)


def test_settings_of_rollouts_arrive(monkeypatch):
    "Temperature, join, mode and limits as asked for, and nothing left out; new seeds in every step."
    (model, tokenizer), decoded, chosen = learner(), spied(monkeypatch, pgrpo, "generate"), spied(monkeypatch, pgrpo, "step_problems")
    config = PGRPOConfig(steps=3, batch=2, group=3, mode="autoregressive", join="result", chat=False, limits=Limits(11, 7), temperature=.7, seed=4)
    texts = train_pgrpo(copy.deepcopy(model), tokenizer, [PROBLEM, sum_of_products([(7, 8)])], config, lively)
    assert len(texts) == len(decoded) == 3
    for (_, _, questions, decoding, seeds), _ in decoded:
        assert decoding == DecodeConfig("autoregressive", "result", .7, limits=Limits(11, 7), chat=False)
        assert len(questions) == 6 == 3 + questions.count(PROBLEM.question)
        assert len(set(map(str, seeds))) == 6
    assert len({str(seed) for (*_, seeds), _ in decoded for seed in seeds}) == 18
    other = spied(monkeypatch, pgrpo, "generate")
    train_pgrpo(copy.deepcopy(model), tokenizer, [PROBLEM], replace(config, steps=1, batch=1, seed=5), lively)
    assert not {str(s) for s in other[0][0][4]} & {str(s) for s in decoded[0][0][4]} and [c[0][2].seed for c in chosen[-1:]] == [5]


@pytest.mark.parametrize("join", ["concat", "result", "kv"])
def test_rollouts_join_as_asked(monkeypatch, join):
    (model, tokenizer), decoded = learner(), spied(monkeypatch, pgrpo, "generate")
    roll_out(model, tokenizer, [PROBLEM], PGRPOConfig(group=2, join=join, limits=SHORT))
    assert [(c[0][3].mode, c[0][3].join, c[0][3].temperature) for c in decoded] == [("parallel", join, 1)]


def test_settings_of_the_update_arrive(monkeypatch, tmp_path):
    (model, tokenizer), adamws, muons = learner(), spied(monkeypatch, torch.optim, "AdamW"), spied(monkeypatch, torch.optim, "Muon")
    centred, cut, clipped = (spied(monkeypatch, pgrpo, name) for name in ("group_advantages", "micro_batches", "update"))
    seeded, made, saved = spied(monkeypatch, train, "set_seed"), spied(monkeypatch, train, "Accelerator"), spied(monkeypatch, RunFolder, "save")
    config = PGRPOConfig(steps=4, batch=1, group=3, normalize="std", lr=.02, warmup=.5, weight_decay=.07, betas=(.7, .8), clip=.3, micro_tokens=99,
                         seed=3, folder=str(tmp_path), save_every=3, limits=SHORT, mixed_precision="bf16")
    log = train_pgrpo(copy.deepcopy(model), tokenizer, [PROBLEM], config, lively)
    assert [r["lr"] / .02 for r in log] == pytest.approx([0, .5, 1, .5]) and {c[0][1] for c in centred} == {"std"} and {c[0][1] for c in cut} == {99}
    (args, named), = adamws
    assert args[1:] == (.02, (.7, .8)) and named["weight_decay"] == .07 and not muons
    assert {c[0][2] for c in clipped} == {.3} and made == [((), {"mixed_precision": "bf16"})] and seeded == [((3,), {})]
    assert [c[0][2] for c in saved] == [0, 3, 4] and saved[0][0][0].path == tmp_path
    train_pgrpo(copy.deepcopy(model), tokenizer, [PROBLEM], replace(config, steps=1, folder=None, optimizer="muon", mixed_precision="no"), lively)
    (args, named), = muons
    assert args[1:] == (.02, .07) and len(args[0]) == 14


# ---- scores of what was drawn from

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
    "What an update asks `tree_logprobs` for, and gets: [(batch, banned, logprobs, was dropout on?), ...]."
    found, scored = [], train.tree_logprobs
    def spy(model, batch, banned=(), temperature=1.0):
        found.append((batch, list(banned), scored(model, batch, banned, temperature), model.training))
        return found[-1][2]
    monkeypatch.setattr(train, "tree_logprobs", spy)
    return found


def test_sequential_scores_are_those_of_what_was_drawn_from(monkeypatch):
    """Recorded are the model's own log-probabilities, and drawing was among all tokens that are not banned. So a score is the recorded one
    less the logarithm of the share that was left; the model's own, run over each line alone, say how large that was."""
    (model, tokenizer), found = learner(), seen_scores(monkeypatch)
    config = PGRPOConfig(steps=1, batch=1, group=4, mode="sequential", limits=SHORT, micro_tokens=1)
    rollouts = roll_out(model, tokenizer, [PROBLEM], config)
    train_pgrpo(copy.deepcopy(model), tokenizer, [PROBLEM], config, lively)
    banned = ForkJoin([0], tokenizer, mode="sequential").main.banned_ids
    assert control_ids(tokenizer)["<Parallel>"] in banned and all(sorted(b) == sorted(banned) for _, b, *_ in found) and len(found) > 1
    lines = {tuple(r.tree.path_ids(len(r.tree) - 1)): r for r in rollouts}
    for batch, _, scores, _ in found:
        r = lines[tuple(batch["input_ids"][0].tolist())]
        n = len(r.logprobs)
        with torch.no_grad(): own = model(batch["input_ids"]).logits[0, -n - 1:-1].log_softmax(-1)
        left = 1 - own[:, list(banned)].exp().sum(1)
        assert torch.allclose(scores, r.logprobs - left.log(), atol=1e-4) and (scores > r.logprobs + 1e-4).any()


@pytest.mark.parametrize("adapted", [False, True], ids=["of the model", "of its adapters"])
def test_dropout_is_off_while_scoring(monkeypatch, adapted):
    "Decoding samples without it, so a score with it would be another policy's. The first scores are the recorded log-probabilities."
    tokenizer, found = TOKENIZERS["char"](), seen_scores(monkeypatch)
    torch.manual_seed(0)
    drop = dict(resid_pdrop=.5, embd_pdrop=.5, attn_pdrop=.5) if not adapted else dict(resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.)
    model = GPT2LMHeadModel(GPT2Config(n_positions=256, n_embd=32, n_layer=2, n_head=2, vocab_size=len(tokenizer), initializer_range=.3,
                                       bos_token_id=None, eos_token_id=tokenizer.eos_token_id, **drop)).eval()
    if adapted:
        model = add_lora(model, r=4, dropout=.5)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "lora_B" in n: p.normal_(0, .05)
    config = PGRPOConfig(steps=1, batch=1, group=3, limits=SHORT, micro_tokens=1)
    recorded = {tuple(r.tree.scored().pack().input_ids.tolist()): r.logprobs for r in roll_out(model, tokenizer, [PROBLEM], config)}
    numbers = itertools.count()
    train_pgrpo(model, tokenizer, [PROBLEM], config, lambda r, p: next(numbers))
    assert len(found) >= 2 and not any(training for *_, training in found)
    for batch, _, scores, _ in found: assert torch.allclose(scores, recorded[tuple(batch["input_ids"][0].tolist())], atol=1e-4)


# ---- one step

def slow_step(model, rollouts, advantages, temperature=1.0, banned=itertools.repeat([])):
    """Equation 4 by hand: every sampled span behind all that it sees, through the plain model; over all tokens, those without an advantage too.
    `banned`: of every rollout, the ids that it could not choose."""
    total, count = 0, 0
    for r, advantage, ids in zip(rollouts, advantages, banned):
        for s in (s for s in range(len(r.tree)) if r.tree.sampled[s]):
            line, n = r.tree.path_ids(s), len(r.tree.ids[s])
            logits = model(torch.tensor([line]), use_cache=False).logits[0, -n - 1:-1].div(temperature)
            own = logits.index_fill(1, torch.tensor(ids, dtype=torch.long), -torch.inf).log_softmax(-1)
            total, count = total + advantage * own[range(n), line[-n:]].sum(), count + n
    return -total / count, count


@pytest.mark.parametrize("temperature", [1.0, .5])
def test_one_step_by_hand(monkeypatch, temperature):
    "Two groups; the rewards of one are all alike: its advantages are 0, and its tokens count all the same (eq. 4)."
    model, tokenizer = learner()
    config = PGRPOConfig(steps=1, batch=2, group=3, limits=SHORT, lr=1e-2, warmup=0, weight_decay=.1, betas=(.8, .9), clip=1e-2, seed=5,
                         temperature=temperature)
    problems, trained, hand = [PROBLEM, sum_of_products([(7, 8)])], copy.deepcopy(model), copy.deepcopy(model)
    pay = lambda r, p: .25 if p is PROBLEM else lively(r, p)
    passes = seen_scores(monkeypatch)
    row, = train_pgrpo(trained, tokenizer, problems, config, pay)
    chosen = step_problems(problems, 0, config, None)
    rollouts = roll_out(model, tokenizer, chosen, config, 0)
    scores = [[pay(r, p) for r in rollouts[3 * i:3 * i + 3]] for i, p in enumerate(chosen)]
    advantages = [x - sum(group) / 3 for group in scores for x in group]
    nought, at = [abs(a) < 1e-12 for a in advantages], 3 * chosen.index(PROBLEM)
    assert sum(len(batch["input_ids"]) for batch, *_ in passes) == 6 - sum(nought)   # no pass for what has no advantage
    assert all(nought[at:at + 3]) and not all(nought) and row["used"] == pytest.approx(1 - sum(nought) / 6)
    loss, count = slow_step(hand, rollouts, advantages, temperature)
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-6) and row["sampled"] == count == sum(len(r.logprobs) for r in rollouts)
    loss.backward()
    assert row["grad_norm"] == pytest.approx(torch.nn.utils.clip_grad_norm_(hand.parameters(), 1e-2).item(), rel=1e-4)
    torch.optim.AdamW(hand.parameters(), 1e-2, (.8, .9), weight_decay=.1).step()
    assert torch.allclose(adapters(trained), adapters(hand), atol=1e-5) and not torch.allclose(adapters(trained), adapters(model), atol=1e-3)


def test_a_share_in_sequential_mode(monkeypatch):
    """Half of a step's problems are answered without forks, and scored among what could be chosen there; the others as ever.
    Rewards are compared within a problem's own group, which is of one mode."""
    model, tokenizer = learner()
    config = PGRPOConfig(steps=1, batch=4, group=3, sequential=.5, limits=SHORT, lr=1e-2, warmup=0, clip=1e-2, seed=5, micro_tokens=400)
    problems, trained = [sum_of_products([(i, i + 1)]) for i in range(2, 6)], copy.deepcopy(model)
    passes, decoded = seen_scores(monkeypatch), spied(monkeypatch, pgrpo, "generate")
    row, = train_pgrpo(trained, tokenizer, problems, config, lively)
    chosen = [p.question for p in step_problems(problems, 0, config, None) for _ in range(3)]
    assert [(c[0][3].mode, c[0][2]) for c in decoded] == [("sequential", chosen[:6]), ("parallel", chosen[6:])]
    assert decoded[0][0][4] + decoded[1][0][4] == [(5, 0, i) for i in range(12)]   # every rollout has a seed of its own
    control = sorted(control_ids(tokenizer).values())
    rollouts = [r for mode, part in (("sequential", slice(6)), ("parallel", slice(6, 12)))
                for r in generate(model, tokenizer, chosen[part], DecodeConfig(mode, temperature=1.0, limits=SHORT),
                                  [(5, 0, i) for i in range(12)[part]])]
    ids = [i for r in rollouts[:6] for i in r.tree.pack().input_ids.tolist()]
    assert not set(control) & set(ids)
    scores = [lively(r, None) for r in rollouts]
    advantages = [x - sum(scores[i // 3 * 3:i // 3 * 3 + 3]) / 3 for i, x in enumerate(scores)]
    loss, count = slow_step(model, rollouts, advantages, banned=[control] * 6 + [[]] * 6)
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-6) and row["sampled"] == count
    loss.backward()
    assert row["grad_norm"] == pytest.approx(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2).item(), rel=1e-4)
    assert {tuple(sorted(banned)) for _, banned, *_ in passes} == {(), tuple(control)}
    with pytest.raises(ValueError, match="sequential=1.5: must lie between 0 and 1"): PGRPOConfig(sequential=1.5)


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
def test_forced_tokens_behind_the_window(arch, monkeypatch):
    "A join may put some there. Nothing sampled sees them, and what is sampled is learned as by hand."
    tokenizer = TOKENIZERS["char"]()
    torch.manual_seed(0)
    small = dict(n_positions=42, n_embd=32, n_layer=2, n_head=2, vocab_size=len(tokenizer), initializer_range=.3,
                 bos_token_id=None, eos_token_id=tokenizer.eos_token_id, resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.)
    model = tiny(arch, tokenizer, sliding_window=42) if arch == "Mistral" else GPT2LMHeadModel(GPT2Config(**small)).eval()
    monkeypatch.setattr(pgrpo, "generate", lambda m, t, q, decoding, seeds: generate(m, t, q, replace(decoding, hook=wide_hook(t)), seeds))
    config = PGRPOConfig(steps=1, batch=1, group=3, limits=Limits(100, 12), warmup=0)
    pay = lambda r, p: sum(map(ord, r.text)) % 9
    rollouts, problem = roll_out(model, tokenizer, [sum_of_products([(7, 8)])], config), sum_of_products([(7, 8)])
    ends = [max(map(r.tree.end, range(len(r.tree)))) for r in rollouts]
    assert min(ends) > 42 and all(r.tree.end(s) <= 42 for r in rollouts for s in range(len(r.tree)) if r.tree.sampled[s])
    assert pgrpo.ratios(model, rollouts) == pytest.approx(torch.ones(sum(len(r.logprobs) for r in rollouts)), abs=1e-3)
    trained = copy.deepcopy(model)
    row, = train_pgrpo(trained, tokenizer, [problem], config, pay)
    scores = [pay(r, problem) for r in rollouts]
    loss, count = slow_step(model, rollouts, [x - sum(scores) / 3 for x in scores])
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-5) and row["sampled"] == count and row["grad_norm"] > 0
    log = train_sft(trained, tokenizer, [r.tree for r in rollouts], SFTConfig(steps=1, batch=3, lr=1e-9))   # ready trees, in fine-tuning
    assert log[0]["sampled"] == count and log[0]["tokens"] < sum(len(r.tree.pack()) for r in rollouts)


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


def test_a_reward_that_is_no_number():
    model, tokenizer = learner()
    with pytest.raises(ValueError, match="not a finite number"):
        train_pgrpo(copy.deepcopy(model), tokenizer, [PROBLEM], PGRPOConfig(steps=1, batch=1, group=2, limits=SHORT), lambda r, p: float("nan"))


def test_summary_by_hand():
    "Correct, forked, width over inner forks too, of three made-up rollouts; without a fork there is no width."
    inner = Fork(["c", "d", "e"], [Thread([])] * 3)
    say = lambda answer, trajectory, latency, total, well: SimpleNamespace(
        text=f"\\boxed{{{answer}}}", trajectory=trajectory, forks=len(trajectory) - 1, token_latency=latency, total_tokens=total, well_formed=well)
    rollouts = [say(26, [Text("x"), Fork(["a", "b"], [Thread([inner]), Thread([])])], 10, 30, True), say(26, [Text("x")], 20, 20, True),
                say(27, [Text("x")], 30, 40, False)]
    rewards = torch.tensor([[1.2, 1, 0.]])
    row = summary(rollouts, [PROBLEM] * 3, rewards, group_advantages(rewards))
    assert row == pytest.approx(dict(accuracy=2 / 3, fork_rate=1 / 3, token_latency=20, total_tokens=30, well_formed=2 / 3, width=2.5,
                                     reward=2.2 / 3, used=1))
    alike = torch.ones(1, 2)
    row = summary(rollouts[1:], [PROBLEM] * 2, alike, group_advantages(alike))
    assert row["width"] is None and row["used"] == 0


# ---- training

def test_a_reward_is_learned():
    "Rollouts that write a certain character earn more: after a few steps it is written more often."
    model, tokenizer = learner()
    adapted = copy.deepcopy(model)
    config = PGRPOConfig(steps=40, batch=1, group=16, limits=Limits(max_tokens=10), lr=5e-3)
    likes = lambda rollout, problem: float(rollout.text.count("7"))
    log = train_pgrpo(adapted, tokenizer, [PROBLEM], config, likes)
    before, after = (sum(r["reward"] for r in rows) / 5 for rows in (log[:5], log[-5:]))
    assert before < 1 and after > 2 and not adapted.training


def test_stopped_and_resumed_is_uninterrupted(tmp_path):
    whole, log = run()
    with pytest.raises(KeyboardInterrupt): run(str(tmp_path), steps=3)
    resumed, again = run(str(tmp_path))
    assert torch.equal(adapters(whole), adapters(resumed))
    assert [r["reward"] for r in log] == pytest.approx([r["reward"] for r in again]) and log[0]["grad_norm"] > 0


def test_a_run_goes_on_with_its_own_reward_only(tmp_path):
    run(str(tmp_path), lr=1e-3)
    model, tokenizer = learner()
    config = PGRPOConfig(steps=4, batch=2, group=4, limits=SHORT, lr=1e-3, save_every=2, folder=str(tmp_path))
    problems = [PROBLEM, sum_of_products([(7, 8)]), sum_of_products([(1, 9)])]
    torch.manual_seed(0)
    adapted = add_lora(copy.deepcopy(model), r=4)
    with pytest.raises(ValueError, match="with another reward: choose"):
        train_pgrpo(adapted, tokenizer, problems, config, functools.partial(reward, rho=1.0))


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


def test_empty_list():
    model, tokenizer = learner()
    with pytest.raises(ValueError, match="empty"): train_pgrpo(model, tokenizer, [], PGRPOConfig(steps=1))


def test_sequential_baseline_never_forks():
    model, tokenizer = learner()
    rollouts = roll_out(model, tokenizer, [PROBLEM], PGRPOConfig(group=4, mode="sequential", limits=SHORT))
    assert all(r.forks == 0 for r in rollouts) and generate(model, tokenizer, [PROBLEM.question], DecodeConfig(limits=SHORT))


# ---- references and the speed-up against them

def sampler(rng, step): return sum_of_products([(rng.randint(1, 9), rng.randint(1, 9)), (step + 1, 2)])


@pytest.mark.parametrize("problems", [[PROBLEM, sum_of_products([(7, 8)]), sum_of_products([(1, 9)])], sampler], ids=["list", "sampler"])
def test_drawn_problems_are_those_that_a_run_asks_for(monkeypatch, problems):
    "In its order; every one of them `group` times."
    (model, tokenizer), decoded = learner(), spied(monkeypatch, pgrpo, "generate")
    config = PGRPOConfig(steps=4, batch=2, group=2, limits=Limits(max_tokens=6), seed=3)
    found = drawn_problems(problems, config)
    train_pgrpo(copy.deepcopy(model), tokenizer, problems, config, lively)
    assert [p.question for p in found for _ in range(2)] == [q for c in decoded for q in c[0][2]] and len(found) == 8
    assert found == drawn_problems(problems, replace(config, group=5)) and found[:2] == drawn_problems(problems, replace(config, steps=1))
    assert [p.question for p in found] != [p.question for p in drawn_problems(problems, replace(config, seed=4))]
    with pytest.raises(ValueError, match="empty"): drawn_problems([], config)


def test_a_resumed_run_asks_for_the_same_problems(monkeypatch, tmp_path):
    (model, tokenizer), config = learner(), PGRPOConfig(steps=3, batch=2, group=2, limits=Limits(max_tokens=6), save_every=1, folder=str(tmp_path))
    with pytest.raises(KeyboardInterrupt): train_pgrpo(copy.deepcopy(model), tokenizer, sampler, config, lively, stop_at(1))
    decoded = spied(monkeypatch, pgrpo, "generate")
    train_pgrpo(copy.deepcopy(model), tokenizer, sampler, config, lively)
    asked = [q for c in decoded for q in c[0][2][::2]]
    assert 2 <= len(asked) <= 6 and asked == [p.question for p in drawn_problems(sampler, config)][-len(asked):]


# ---- in half precision

@pytest.mark.parametrize("lora", [True, False])
def test_a_rounded_copy_rolls_out_and_the_model_stays_as_it_is(lora):
    model, tokenizer = learner()
    policy = add_lora(copy.deepcopy(model)) if lora else copy.deepcopy(model)
    with torch.no_grad():
        for n, p in policy.named_parameters():
            if "lora_B" in n: p.normal_(0, .02, generator=torch.Generator().manual_seed(0))
    config, half, before = PGRPOConfig(group=4, limits=SHORT), RoundedRollouts("bfloat16"), {n: p.clone() for n, p in policy.named_parameters()}
    found = roll_out(policy, tokenizer, [PROBLEM], config, write=half)
    assert all(p.dtype == torch.float32 and torch.equal(p, before[n]) for n, p in policy.named_parameters())
    whole = copy.deepcopy(policy)
    by_hand = (merge_lora(whole) if lora else whole).to(torch.bfloat16)
    assert [r.text for r in found] == [r.text for r in roll_out(by_hand, tokenizer, [PROBLEM], config)]
    off, exact = half.measured(policy, found), half.measured(policy, roll_out(policy, tokenizer, [PROBLEM], config))
    assert .1 > off["ratio_spread"] > 1e-3 > exact["ratio_off"] and exact["ratio_mean"] == pytest.approx(1, abs=1e-4)


def test_a_run_says_how_far_off_its_rollouts_are(monkeypatch):
    decoded = spied(monkeypatch, pgrpo, "generate")
    (_, exact), (policy, rounded) = run(), run(decode_dtype="bfloat16")
    assert not any("ratio_off" in row for row in exact) and all(1e-3 < row["ratio_off"] < .2 for row in rounded)
    assert [next(args[0].parameters()).dtype for args, _ in decoded] == [torch.float32] * 4 + [torch.bfloat16] * 4
    assert next(policy.parameters()).dtype == torch.float32 and any(row["grad_norm"] for row in rounded)


def test_references_are_decoded_as_the_rollouts_are(monkeypatch):
    (model, tokenizer), decoded = learner(), spied(monkeypatch, pgrpo, "generate")
    for dtype in (None, "bfloat16"): reference_latencies(model, tokenizer, [PROBLEM], PGRPOConfig(limits=SHORT, decode_dtype=dtype))
    assert [next(args[0].parameters()).dtype for args, _ in decoded] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_references_are_greedy_and_sequential_whatever_is_trained(monkeypatch, mode):
    (model, tokenizer), decoded = learner(), spied(monkeypatch, pgrpo, "generate")
    problems = [PROBLEM, sum_of_products([(7, 8)]), PROBLEM]
    config = PGRPOConfig(mode=mode, join="kv", limits=Limits(max_tokens=17, max_thread_tokens=9), chat=False, group=2, seed=5)
    found = reference_latencies(model, tokenizer, problems, config)
    (_, _, questions, decoding, _), _ = decoded[0]
    assert len(decoded) == 1 and questions == [p.question for p in problems[:2]]   # each question once
    assert decoding == DecodeConfig("sequential", "kv", 0.0, limits=Limits(max_tokens=17, max_thread_tokens=9), chat=False)
    alone = {q: generate(model, tokenizer, [q], decoding)[0] for q in questions}
    assert found == {q: r.token_latency for q, r in alone.items()} and all(r.forks == 0 and r.token_latency == r.total_tokens for r in alone.values())
    assert found == reference_latencies(model, tokenizer, problems[::-1], replace(config, seed=9, group=4, steps=1))


def test_references_stay_those_of_the_start():
    "They are numbers: training the model does not move them."
    model, tokenizer = learner()
    trained = copy.deepcopy(model)
    config = PGRPOConfig(steps=3, batch=1, group=4, limits=Limits(max_tokens=12), lr=.05, warmup=0)
    pay = Speedup(reference_latencies(trained, tokenizer, [PROBLEM], config))
    before = dict(pay.references)
    train_pgrpo(trained, tokenizer, [PROBLEM], config, lively)
    assert pay.references == before == reference_latencies(model, tokenizer, [PROBLEM], config)


def ended(problem, latency, correct=True):
    return SimpleNamespace(text=f"\\boxed{{{problem.answer if correct else 'no'}}}", token_latency=latency, total_tokens=2 * latency)


@pytest.mark.parametrize("latency, paid", [(100, 1), (80, 1.1), (60, 1.2), (40, 1.25), (1, 1.25), (120, .9), (150, .75), (900, .75)])
def test_the_speed_up_by_hand(latency, paid):
    "Half of the share of 100 tokens that was saved, a quarter at most; a correct answer is always worth more than a wrong one."
    pay = Speedup({PROBLEM.question: 100}, rho=.5, clip=.25)
    assert pay(ended(PROBLEM, latency), PROBLEM) == pytest.approx(paid) and pay(ended(PROBLEM, latency, correct=False), PROBLEM) == 0


def test_every_problem_has_its_own_reference():
    other = sum_of_products([(7, 8)])
    pay = Speedup({PROBLEM.question: 100, other.question: 50}, rho=1, clip=.9)
    assert (pay(ended(PROBLEM, 40), PROBLEM), pay(ended(other, 40), other)) == pytest.approx((1.6, 1.2))
    assert Speedup({PROBLEM.question: 100})(ended(PROBLEM, 90), PROBLEM) == pytest.approx(1.05)   # rho .5, as it is written down
    with pytest.raises(KeyError): pay(ended(PROBLEM, 40), sum_of_products([(1, 1)]))


def test_a_run_is_known_by_how_it_pays_not_by_its_references(tmp_path):
    assert describe(Speedup({"a": 1}, .2, .1)) == "Speedup(rho=0.2, clip=0.1, until=None)" == describe(Speedup({}, .2, .1))
    known = {sum_of_products(pairs).question: 40 for pairs in ([(2, 3), (4, 5)], [(7, 8)], [(1, 9)])}
    for more in ({}, {"a": 1}): run(str(tmp_path), paid=Speedup({**known, **more}, .2))
    with pytest.raises(ValueError, match="with another reward: choose"): run(str(tmp_path), paid=Speedup(known, .3))


def test_a_bonus_that_is_annealed(monkeypatch):
    "It falls evenly and stays away; every step is paid by its own reward."
    with pytest.raises(ValueError, match="until=0: must be at least 1"): Speedup({}, until=0)
    pay = Speedup({PROBLEM.question: 100}, rho=.5, clip=.25, until=4)
    for latency, whole in ((80, .1), (20, .25), (900, -.25)):
        assert [pay.at(step)(ended(PROBLEM, latency), PROBLEM) for step in range(6)] == pytest.approx(
            [1 + whole * x for x in (1, .75, .5, .25, 0, 0)])
    assert Speedup({}, .3).at(100) == Speedup({}, .3)
    asked, (model, tokenizer) = [], learner()
    class Paid:
        def at(self, step): return lambda rollout, problem: asked.append(step) or float(len(asked) % 2)
    train_pgrpo(copy.deepcopy(model), tokenizer, [PROBLEM], PGRPOConfig(steps=3, batch=1, group=2, limits=SHORT), Paid())
    assert asked == [0, 0, 1, 1, 2, 2]


def test_it_is_what_a_step_pays(monkeypatch):
    "The rewards of a step are those of every rollout and its own problem."
    (model, tokenizer), made = learner(), spied(monkeypatch, pgrpo, "roll_out")
    problems, config = [PROBLEM, sum_of_products([(7, 8)])], PGRPOConfig(steps=1, batch=2, group=2, limits=SHORT)
    monkeypatch.setattr(reward_room, "grade", lambda text, problem: "1" in text)
    pay, paid = Speedup(reference_latencies(model, tokenizer, problems, config), .5, .2), []
    def noted(rollout, problem):
        paid.append((rollout, problem, pay(rollout, problem)))
        return paid[-1][2]
    row, = train_pgrpo(copy.deepcopy(model), tokenizer, problems, config, noted)
    assert len(paid) == 4 and len(made) == 1 and all(r.question == p.question for r, p, _ in paid)
    for r, p, got in paid:
        wanted = 1 + min(max(.5 * (1 - r.token_latency / pay.references[p.question]), -.2), .2) if "1" in r.text else 0
        assert got == pytest.approx(wanted)
    assert row["reward"] == pytest.approx(sum(x for *_, x in paid) / 4)
