"""Equations 4 to 9 against slow versions, TRL, and properties over random rollouts."""
import random
from types import SimpleNamespace

import pytest
import torch
from helpers import TOKENIZERS, random_trajectory, tiny

from threadweaver_ref.decode import generate
from threadweaver_ref.domains import Problem
from threadweaver_ref.format import Fork, parse, render
from threadweaver_ref.model import load_policy
from threadweaver_ref.replay import replay, units
from threadweaver_ref.reward import eta, group_advantages, pgrpo_loss, reward, speedup_reward
from threadweaver_ref.schoolbook import sum_of_products
from threadweaver_ref.scoring import collate, tree_logprobs
from threadweaver_ref.tokenizer import encode_prompt, encode_text
from threadweaver_ref.tree import SpanTree

PROBLEM = sum_of_products([(2, 3), (4, 5)])


def stand_in(text, latency, total): return SimpleNamespace(text=text, token_latency=latency, total_tokens=total)


# ---- rewards

@pytest.mark.parametrize("latency, total, expected", [(100, 100, 1.0), (90, 100, 1.05), (60, 100, 1.2), (20, 100, 1.2), (80, 100, 1.1)])
def test_reward_by_hand(latency, total, expected):
    "Equation 7 as written: min(rho * eta, clip), neither rho * min(eta, clip) nor a ratio less one."
    assert reward(stand_in("\\boxed{26}", latency, total), PROBLEM) == pytest.approx(expected)
    assert reward(stand_in("\\boxed{27}", latency, total), PROBLEM) == 0


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


@pytest.mark.parametrize("latency, expected", [(100, 1.0), (80, 1.1), (60, 1.2), (10, 1.2), (120, .9), (140, .8), (999, .8)])
def test_speedup_reward_by_hand(latency, expected):
    assert speedup_reward(stand_in("\\boxed{26}", latency, 400), PROBLEM, 100) == pytest.approx(expected)
    assert speedup_reward(stand_in("\\boxed{27}", latency, 400), PROBLEM, 100) == 0


def random_rollouts(rng, n=200):
    for _ in range(n):
        total = rng.randint(1, 2000)
        yield stand_in(f"\\boxed{{{rng.choice((26, 27))}}}", rng.randint(1, total), total)


@pytest.mark.parametrize("pay", [reward, lambda r, p, **options: speedup_reward(r, p, 300, **options)], ids=["eq. 7", "speedup"])
@pytest.mark.parametrize("options", [{}, dict(rho=5.0), dict(rho=1.0, clip=.99)])
def test_a_correct_answer_earns_more_than_any_wrong_one(pay, options):
    "Whatever the latency; and the same rollout earns the same, whatever was paid before and between."
    rollouts = list(random_rollouts(random.Random(0)))
    scores = [pay(r, PROBLEM, **options) for r in rollouts]
    correct = [s for s, r in zip(scores, rollouts) if "26" in r.text]
    wrong = [s for s, r in zip(scores, rollouts) if "27" in r.text]
    assert min(correct) > max(wrong) == 0 and len(correct) > 50 < len(wrong)
    shuffled = random.Random(1).sample(range(len(rollouts)), len(rollouts))
    assert {i: pay(rollouts[i], PROBLEM, **options) for i in shuffled} == dict(enumerate(scores))


def test_speedup_reward_is_monotone_in_latency_alone():
    "Neither text beyond the answer nor total tokens count: copies earn nothing."
    rng = random.Random(2)
    for _ in range(100):
        a, b = sorted(rng.sample(range(1, 900), 2))
        fast, slow = (speedup_reward(stand_in("x\\boxed{26}", n, rng.randint(1, 9999)), PROBLEM, 400) for n in (a, b))
        assert fast >= slow


def test_bad_references_and_clips():
    good = stand_in("\\boxed{26}", 9, 9)
    for bad in (1.0, 1.5, -.1):
        with pytest.raises(ValueError, match="clip="): speedup_reward(good, PROBLEM, 10, clip=bad)
    with pytest.raises(ValueError, match="reference=0"): speedup_reward(good, PROBLEM, 0)


def test_domains_compare_answers_as_text():
    assert reward(stand_in("\\boxed{blue}", 1, 1), Problem("?", "blue", "of a reader")) == 1


# ---- advantages

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


def test_bad_shapes():
    with pytest.raises(ValueError, match="at least 2 rollouts"): group_advantages([[1.0], [2.0]])
    with pytest.raises(ValueError, match="choose mean or std"): group_advantages([[1.0, 2.0]], "max")
    with pytest.raises(ValueError, match="advantages for"): pgrpo_loss(torch.zeros(3), [1.0, 2.0])
    with pytest.raises(ValueError, match="no tokens"): pgrpo_loss(torch.zeros(0), [])


# ---- the loss

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
