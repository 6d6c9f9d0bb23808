"""Fine-tuning: packed against unit by unit, each token once, micro-batches, exact resume, several processes, recipes."""
import json
import random
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch
from helpers import spied, tiny
from safetensors.torch import load_file

from threadweaver_ref import sft
from threadweaver_ref.replay import replay, units
from threadweaver_ref.model import add_lora, tiny_model
from threadweaver_ref.sft import (
    RECIPES,
    SFTConfig,
    matrices,
    orthogonal,
    curriculum,
    example_tree,
    micro_batches,
    packing_ratio,
    share,
    step_batches,
    step_problems,
    thin,
    packing_counts,
    mean_weights,
    train_recipe,
    train_sft,
)
from threadweaver_ref.tasks import BENCH_FAMILIES, held_out, sum_of_products, trace, training_problem
from threadweaver_ref.tokenizer import char_tokenizer, encode_prompt
from threadweaver_ref.scoring import check_model, collate, tree_logprobs
from threadweaver_ref.tree import SpanTree

TOKENIZER = char_tokenizer()
RUNNING = sum_of_products([(12, 3), (4, 5)])
MIXED = [training_problem(random.Random(1), [name]) for name in BENCH_FAMILIES]
SHORT = SFTConfig(steps=6, batch=4, save_every=2, micro_tokens=512)


def prompt(p): return encode_prompt(TOKENIZER, p.question)
def flat(tensors): return torch.cat([t.detach().flatten() for t in tensors])
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def fresh(seed=0, **options):
    torch.manual_seed(seed)
    return tiny_model("tiny", TOKENIZER, **{"hidden_size": 32, "num_hidden_layers": 2, **options})


# ---- packed against unit by unit

@pytest.mark.parametrize("arch", ["Qwen3", "Llama"])
@pytest.mark.parametrize("problems", [[RUNNING], MIXED], ids=["running example", "every family"])
@pytest.mark.parametrize("join", ["concat", "result"])
def test_packed_loss_and_gradient(arch, problems, join):
    model, written = tiny(arch, TOKENIZER), lambda p: trace(p, conclude=join == "result")
    requests = [u for p in problems for u in units(written(p), prompt(p), TOKENIZER, join)]
    count = sum(len(completion) for _, completion in requests)
    alone = 0
    for context, completion in requests:   # one plain causal run each
        logprobs = model(torch.tensor([context + completion])).logits[0, len(context) - 1:-1].log_softmax(-1)
        loss = -logprobs[range(len(completion)), completion].sum() / count
        loss.backward()
        alone += loss.item()
    slow = flat(p.grad for p in model.parameters())
    model.zero_grad()
    packed = [replay(written(p), prompt(p), TOKENIZER, join).pack() for p in problems]
    together = 0
    for group in micro_batches(packed, 2048):
        loss = -tree_logprobs(model, collate(group)).sum() / count
        loss.backward()
        together += loss.item()
    fast = flat(p.grad for p in model.parameters())
    assert together == pytest.approx(alone, rel=1e-5)
    assert (fast - slow).norm() / slow.norm() < 1e-5


def test_each_generated_token_once():
    for p in [RUNNING, *MIXED]:
        packed = replay(trace(p), prompt(p), TOKENIZER).pack()
        written = Counter(i for _, completion in units(trace(p), prompt(p), TOKENIZER) for i in completion)
        assert Counter(packed.input_ids[packed.sampled].tolist()) == written


def test_packing_saves_half_of_the_tokens():
    rng = random.Random(0)
    problems = [curriculum(rng, 1000) for _ in range(300)]
    forked = [p for p in problems if len(replay(trace(p), prompt(p), TOKENIZER)) > 2]
    assert len(forked) > 100 and packing_ratio(forked, TOKENIZER) > 2
    assert packing_ratio(problems, TOKENIZER) > 1.7   # chains and all
    assert packing_ratio([p for p in problems if p.family == "chain"], TOKENIZER) == 1
    requests = units(trace(RUNNING), prompt(RUNNING), TOKENIZER)
    assert packing_counts(RUNNING, TOKENIZER) == (sum(len(c) + len(d) for c, d in requests),
                                                len(replay(trace(RUNNING), prompt(RUNNING), TOKENIZER).pack()))


# ---- batches

def test_config_is_validated():
    for bad in (dict(steps=0), dict(batch=0), dict(micro_tokens=0), dict(save_every=0), dict(sequential=.8, autoregressive=.3),
                dict(sequential=-.5, autoregressive=1), dict(join="zip"), dict(fork="sometimes"), dict(lr=-1.), dict(lr=0.), dict(warmup=2),
                dict(window=0), dict(leaves=0), dict(optimizer="sgd"), dict(attention="sparse"), dict(clip=0.),
                dict(weight_decay=-1.), dict(mixed_precision="fp16", optimizer="muon")):
        with pytest.raises(ValueError): SFTConfig(**bad)


def test_modes():
    config = SFTConfig(sequential=1, autoregressive=0)
    assert len(example_tree(RUNNING, TOKENIZER, config, random.Random(0))) == 2
    flat_line = example_tree(RUNNING, TOKENIZER, SFTConfig(sequential=0, autoregressive=1), random.Random(0))
    assert len(flat_line) == 2 and TOKENIZER.decode(flat_line.ids[1]).count("<Thread>") == 2
    assert len(example_tree(RUNNING, TOKENIZER, SFTConfig(sequential=0, autoregressive=0), random.Random(0))) > 2


def test_an_epoch_sees_every_problem_once():
    config = SFTConfig(batch=3)
    seen = [p for step in range(10) for p in step_problems(range(15), step, config, None)]
    assert sorted(seen[:15]) == sorted(seen[15:]) == list(range(15)) and seen[:15] != seen[15:]


def test_a_step_depends_on_seed_and_number_alone():
    config = SFTConfig(batch=6)
    one, two, other = (step_batches(MIXED, 3, TOKENIZER, c) for c in (config, config, replace(config, seed=1)))
    ids = [[p.input_ids.tolist() for g in groups for p in g] for groups in (one, two, other)]
    assert ids[0] == ids[1] != ids[2]


def test_micro_batches():
    packed = [p for s in range(4) for g in step_batches(MIXED, s, TOKENIZER, SFTConfig(batch=8)) for p in g]
    groups = micro_batches(packed, 1500)
    assert sorted(map(id, packed)) == sorted(id(p) for g in groups for p in g)
    assert all(len(g) == 1 or len(g) * max(map(len, g)) <= 1500 for g in groups)


@pytest.mark.parametrize("n, processes", [(5, 2), (4, 2), (1, 3), (7, 1)])
def test_processes_share_a_step(n, processes):
    parts = [share([[i, "more"] for i in range(n)], p, processes) for p in range(processes)]
    assert len({len(part) for part in parts}) == 1   # each makes as many backward passes
    assert sorted(g[0] for part in parts for g, weight in part if weight) == list(range(n))
    assert all(len(g) == (2 if weight else 1) for part in parts for g, weight in part)   # what only fills up is small


def drawing(*values):
    "An `rng` whose first draws are these."
    rng, values = random.Random(0), iter(values)
    real = rng.random
    rng.random = lambda: next(values, None) or real()
    return rng


@pytest.mark.parametrize("draw, mode", [(.05, "flat"), (.099, "flat"), (.101, "tree"), (.5, "tree"), (.699, "tree"), (.701, "line"), (.99, "line")])
def test_shares_do_not_overlap(draw, mode):
    "The first tenth of all draws are shown as one flat line with their control tokens, the last three tenths without forks."
    tree = example_tree(RUNNING, TOKENIZER, SFTConfig(), drawing(draw))
    assert (len(tree) > 2, len(tree) == 2 and "<Parallel>" in TOKENIZER.decode(tree.ids[1])) == (mode == "tree", mode == "flat")


# ---- training

def test_the_cut_into_micro_batches_changes_nothing():
    ends = []
    for limit in (1, 600, 10 ** 6):
        model = fresh()
        log = train_sft(model, TOKENIZER, MIXED, SFTConfig(steps=1, batch=6, micro_tokens=limit, warmup=0, lr=1e-3, clip=1e9))
        ends.append((log[0]["loss"], log[0]["grad_norm"], log[0]["sampled"]))
    assert ends[0] == pytest.approx(ends[1], rel=1e-5) and ends[1] == pytest.approx(ends[2], rel=1e-5)


def test_it_learns_and_ends_in_eval_mode():
    model = fresh()
    log = train_sft(model, TOKENIZER, [RUNNING], SFTConfig(steps=40, batch=2, lr=1e-2, sequential=0, autoregressive=0))
    assert log[-1]["loss"] < log[0]["loss"] / 2 and not model.training
    assert [row["step"] for row in log] == list(range(1, 41)) and all(row["lr"] >= 0 for row in log)


@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (32, 32), (1, 7)])
def test_orthogonal_against_the_singular_value_decomposition(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) @ torch.diag(torch.logspace(0, -1, shape[1]))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ orthogonal(matrix, rounds=12) @ right.T   # the same singular vectors: diagonal
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-3
    assert .6 < inside.diagonal().min() and inside.diagonal().max() < 1.3


def test_muon_moves_every_direction_and_the_rest_is_adamw():
    "One step from the same gradients: matrices inside move by 0.2 sqrt(longer side) lr in every direction; embeddings and norms as with AdamW."
    models = {name: fresh() for name in ("adamw", "muon")}
    start, lr = {n: p.detach().clone() for n, p in models["muon"].named_parameters()}, 1e-3
    for name, model in models.items():
        train_sft(model, TOKENIZER, [RUNNING], SFTConfig(steps=1, batch=1, lr=lr, warmup=0, weight_decay=0, optimizer=name))
    inner = {id(p) for p in matrices(models["muon"])}
    assert len(inner) == 7 * models["muon"].config.num_hidden_layers
    for (name, p), other in zip(models["muon"].named_parameters(), models["adamw"].parameters(), strict=True):
        if id(p) not in inner: assert torch.equal(p, other), name
        else:
            moved = torch.linalg.svdvals(p.detach() - start[name]) / (lr * .2 * max(p.shape) ** .5)
            assert moved[0] < 1.3 and moved[0] > .5


def test_settings_of_the_update_arrive(monkeypatch, tmp_path):
    adamws, muons, cut = spied(monkeypatch, torch.optim, "AdamW"), spied(monkeypatch, sft, "Muon"), spied(monkeypatch, sft, "micro_batches")
    clipped, seeded = spied(monkeypatch, sft.Accelerator, "clip_grad_norm_"), spied(monkeypatch, sft, "set_seed")
    made, saved = spied(monkeypatch, sft, "Accelerator"), spied(monkeypatch, sft, "_checkpoint")
    config = SFTConfig(steps=4, batch=2, micro_tokens=99, lr=.02, warmup=.5, weight_decay=.07, betas=(.7, .8), clip=.3, seed=3, folder=str(tmp_path),
                       save_every=3, mixed_precision="bf16")
    log = train_sft(fresh(), TOKENIZER, [RUNNING], config)
    (args, named), = adamws
    assert args[1:] == (.02, (.7, .8)) and named["weight_decay"] == .07 and not muons and [c[0][1] for c in cut] == [99] * 4
    assert [r["lr"] / .02 for r in log] == pytest.approx([.5, 1, .5, 0])
    assert {c[0][2] for c in clipped} == {.3} and made == [((), {"mixed_precision": "bf16"})] and seeded == [((3,), {})]
    assert [c[0][2] for c in saved] == [0, 3, 4] and [len(c[0][0]) for c in cut] == [2] * 4
    train_sft(fresh(), TOKENIZER, [RUNNING], replace(config, optimizer="muon", folder=None, steps=1))
    (args, named), = muons
    assert args[1] == .02 and named == {"weight_decay": .07} and len(args[0]) == 14 and len(adamws) == 2
    assert adamws[1][0][1:] == (.02, (.7, .8)) and adamws[1][1]["weight_decay"] == .07


def test_settings_of_the_trees_arrive(monkeypatch):
    "Fork, join, window, leaves and the two shares; flex attention asks for a GPU elsewhere."
    traced, grown, thinned = spied(monkeypatch, sft, "trace"), spied(monkeypatch, sft, "replay"), spied(monkeypatch, sft, "thin")
    example_tree(RUNNING, TOKENIZER, SFTConfig(fork="nested", join="result", leaves=3), drawing(.5))
    assert traced[0][0][1] == "nested" and traced[0][0][3] is True and grown[0][0][3:] == ("result", "parallel") and thinned[0][0][1] == 3
    example_tree(RUNNING, TOKENIZER, SFTConfig(join="kv", sequential=.6, autoregressive=.4), drawing(.39))
    assert traced[1][0][1] is True and traced[1][0][3] is False and grown[1][0][3:] == ("kv", "autoregressive") and len(thinned) == 1
    example_tree(RUNNING, TOKENIZER, SFTConfig(sequential=.6, autoregressive=.4), drawing(.41))
    assert traced[2][0][1] is False and grown[2][0][3:] == ("concat", "parallel")
    asked = spied(monkeypatch, sft, "encode_prompt")
    example_tree(RUNNING, TOKENIZER, SFTConfig(chat=False), drawing(.5))
    assert [c[0][1:] for c in asked] == [(RUNNING.question, False)]
    with pytest.raises(ValueError, match="the window has 9"): example_tree(RUNNING, TOKENIZER, SFTConfig(window=9), drawing(.5))


def test_defaults_are_the_ones_written_down():
    assert asdict(SFTConfig()) == dict(
        steps=1000, batch=64, micro_tokens=2048, lr=1e-3, optimizer="adamw", warmup=.05, weight_decay=.01, betas=(.9, .95), clip=1.0, fork=True,
        sequential=.3, autoregressive=.1, join="concat", chat=None, window=None, leaves=None, seed=0, folder=None, save_every=200,
        mixed_precision=None, attention="dense")


def test_the_first_steps_are_small(monkeypatch):
    "Warm-up: what each step moves, and with which learning rate."
    used, real = [], torch.optim.AdamW.step
    def step(self, *args): used.append(self.param_groups[0]["lr"]); return real(self, *args)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train_sft(fresh(), TOKENIZER, [RUNNING], SFTConfig(steps=8, batch=1, lr=1., warmup=.5, clip=1e-9))
    assert used == pytest.approx([0, .25, .5, .75, 1, (1 + .5 ** .5) / 2, .5, (1 - .5 ** .5) / 2])


def test_one_step_of_adamw_by_hand():
    model, hand, lr = fresh(), fresh(), 1e-2
    config = SFTConfig(steps=1, batch=1, lr=lr, warmup=0, weight_decay=.5, clip=1e9, sequential=0, autoregressive=0)
    row, = train_sft(model, TOKENIZER, [RUNNING], config)
    loss = -tree_logprobs(hand, collate([replay(trace(RUNNING), prompt(RUNNING), TOKENIZER).pack()])).mean()
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for (name, new), p in zip(model.named_parameters(), hand.parameters()):
        step = p.grad / (p.grad.abs() + 1e-8)   # the first step: both means, corrected, are the gradient's own
        assert torch.allclose(new, p * (1 - lr * .5) - lr * step, atol=1e-5), name


def test_muon_by_hand():
    "Two steps: momentum, Nesterov's look ahead, decoupled weight decay. Defaults are the ones used."
    torch.manual_seed(0)
    start, gradients = torch.randn(6, 4), torch.randn(2, 6, 4)
    for options, decay, momentum in (({}, .01, .95), (dict(weight_decay=.3, momentum=.5), .3, .5)):
        p = torch.nn.Parameter(start.clone())
        optimizer, hand, mean = sft.Muon([p], .1, **options), start.clone(), torch.zeros(6, 4)
        for g in gradients:
            p.grad = g.clone()
            optimizer.step()
            mean = momentum * mean + (1 - momentum) * g
            ahead = momentum * mean + (1 - momentum) * g
            hand = hand * (1 - .1 * decay) - .1 * .2 * 6 ** .5 * orthogonal(ahead)
        assert torch.allclose(p, hand, atol=1e-5)


def test_what_fills_up_weighs_nothing(monkeypatch):
    "A process that runs short repeats a batch, with weight 0."
    plain, filled, config = fresh(), fresh(), SFTConfig(steps=2, batch=3, micro_tokens=1)
    log = train_sft(plain, TOKENIZER, MIXED, config)
    monkeypatch.setattr(sft, "share", lambda groups, *_: [(g, 1.0) for g in groups] + [(groups[0][:1], 0.0)])
    again = train_sft(filled, TOKENIZER, MIXED, config)
    assert same(plain, filled) and [(r["loss"], r["grad_norm"]) for r in again] == [(r["loss"], r["grad_norm"]) for r in log]


def stop_at(n):
    def on_step(step, row):
        if step == n: raise KeyboardInterrupt
    return on_step


@pytest.mark.parametrize("stopped, optimizer", [(1, "adamw"), (2, "adamw"), (5, "adamw"), (2, "muon"), (5, "muon")])
def test_exact_resume(tmp_path, stopped, optimizer):
    through, first, second, short = fresh(), fresh(), fresh(), replace(SHORT, optimizer=optimizer)
    log = train_sft(through, TOKENIZER, MIXED, short)
    config = replace(short, folder=str(tmp_path))
    with pytest.raises(KeyboardInterrupt): train_sft(first, TOKENIZER, MIXED, config, stop_at(stopped))
    (tmp_path / "part").mkdir(exist_ok=True)
    (tmp_path / "part" / "half").write_text("of a save that was interrupted")
    with open(tmp_path / "log.jsonl", "a") as f: f.write('{"step": 6, "lo')   # of a line, too
    resumed = train_sft(second, TOKENIZER, MIXED, config)
    assert same(through, second)
    on_disk = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert on_disk == resumed
    assert [(r["step"], r["loss"], r["lr"]) for r in resumed] == [(r["step"], r["loss"], r["lr"]) for r in log]
    assert all(a["seconds"] <= b["seconds"] for a, b in zip(resumed, resumed[1:], strict=False))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["left.txt", "log.jsonl", "step-000006"]


def test_a_finished_run_is_loaded_not_repeated(tmp_path):
    config = replace(SHORT, folder=str(tmp_path))
    first, again = fresh(), fresh()
    log = train_sft(first, TOKENIZER, MIXED, config)
    done = flat(first.parameters())
    assert train_sft(again, TOKENIZER, MIXED, config, stop_at(1)) == log and same(first, again)
    assert train_sft(first, TOKENIZER, MIXED, config, stop_at(1)) == log and torch.equal(flat(first.parameters()), done)   # the cell, run again
    for other in (dict(seed=1), dict(lr=.5), dict(fork=False)):
        with pytest.raises(ValueError, match=f"holds a run with another {next(iter(other))}: choose"):
            train_sft(again, TOKENIZER, MIXED, replace(config, **other))
    assert torch.equal(flat(again.parameters()), done) and not again.training


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
    refused(tmp_path, "another training set", fresh(), [replay(trace(p), prompt(p), TOKENIZER) for p in MIXED])
    refused(tmp_path, "another training set", fresh(), curriculum)
    refused(tmp_path, "holds a run of 6 steps, over which its lr falls: ask for 6,", fresh(), steps=12)
    refused(tmp_path, "holds a run of 6 steps", first, steps=3)
    with torch.no_grad(): first.model.norm.weight[0] += 1e-3   # neither the start, nor what the run left behind
    refused(tmp_path, "started from other weights", first)
    (tmp_path / "left.txt").unlink()   # of a killed process there is none
    refused(tmp_path, "started from other weights", first)
    if stopped: assert len(train_sft(fresh(), TOKENIZER, MIXED, replace(SHORT, folder=str(tmp_path)))) == 6


def test_a_sampler_is_known_by_its_name_and_options(tmp_path):
    from functools import partial
    config, late = replace(SHORT, steps=1, batch=1, folder=str(tmp_path / "new" / "too")), partial(curriculum, steps=10)
    train_sft(fresh(), TOKENIZER, late, config)
    refused(tmp_path / "new" / "too", "another training set", fresh(), partial(curriculum, steps=20), steps=1, batch=1)
    assert len(train_sft(fresh(), TOKENIZER, partial(curriculum, steps=10), config)) == 1
    assert sft._describe(partial(curriculum, curriculum, steps=SHORT)) == f"curriculum(curriculum, steps={SHORT})"
    assert " at 0x" not in sft._describe(partial(curriculum, object()))


def interrupt(monkeypatch, call):
    "The stop button: KeyboardInterrupt in the scoring of the `call`-th micro-batch."
    scored, calls = sft.tree_logprobs, []
    def stopping(*args):
        calls.append(1)
        if len(calls) == call: raise KeyboardInterrupt
        return scored(*args)
    monkeypatch.setattr(sft, "tree_logprobs", stopping)


@pytest.mark.parametrize("step", [2, 4])   # before the first checkpoint, and behind it
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_within_a_step_and_run_again(tmp_path, monkeypatch, step, optimizer):
    "The same model object in the same process and folder: the very weights of a run that was not stopped."
    through, model, short = fresh(), fresh(), replace(SHORT, micro_tokens=1, optimizer=optimizer)   # four micro-batches a step
    log = train_sft(through, TOKENIZER, MIXED, short)
    interrupt(monkeypatch, 4 * (step - 1) + 3)
    config = replace(short, folder=str(tmp_path))
    with pytest.raises(KeyboardInterrupt): train_sft(model, TOKENIZER, MIXED, config)
    assert not model.training and any(p.grad is not None for p in model.parameters())   # half of a step
    again = train_sft(model, TOKENIZER, MIXED, config)
    assert same(through, model) and [r["grad_norm"] for r in again] == [r["grad_norm"] for r in log]


def test_a_gradient_from_before_is_not_used():
    one, two, config = fresh(), fresh(), replace(SHORT, steps=1)
    sum(p.sum() for p in two.parameters()).backward()
    assert [r["grad_norm"] for r in train_sft(one, TOKENIZER, MIXED, config)] == [r["grad_norm"] for r in train_sft(two, TOKENIZER, MIXED, config)]
    assert same(one, two)


def test_a_stop_leaves_a_plain_model(monkeypatch):
    "Not autocast, in eval mode."
    model, ids = fresh(), torch.tensor([prompt(RUNNING)])
    with torch.no_grad(): before = model(ids).logits
    interrupt(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt): train_sft(model, TOKENIZER, MIXED, replace(SHORT, mixed_precision="bf16"))
    with torch.no_grad(): assert torch.equal(model(ids).logits, before) and not model.training


def test_its_own_attention_comes_back(monkeypatch):
    "Of a model with eager attention that was trained with blocks, or was to be."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sft, "parse_flag_from_env", lambda name: False)
    model, trained_with = fresh(), []
    model.set_attn_implementation("eager")
    def stop(seed): trained_with.append(model.config._attn_implementation); raise KeyboardInterrupt
    monkeypatch.setattr(sft, "set_seed", stop)   # as early as can be
    with pytest.raises(KeyboardInterrupt): train_sft(model, TOKENIZER, MIXED, SFTConfig(steps=1, attention="flex", mixed_precision="no"))
    assert trained_with == ["flex_attention"] and model.config._attn_implementation == "eager"


def test_after_a_loss_that_is_no_number_a_lower_lr_trains(monkeypatch):
    scored, calls = sft.tree_logprobs, []
    def once(*args):
        calls.append(1)
        return scored(*args) * (float("nan") if len(calls) == 1 else 1)
    monkeypatch.setattr(sft, "tree_logprobs", once)
    model, healthy, lower = fresh(), fresh(), replace(SHORT, lr=1e-4)
    with pytest.raises(FloatingPointError, match="try a lower lr"): train_sft(model, TOKENIZER, MIXED, SHORT)
    log = train_sft(model, TOKENIZER, MIXED, lower)
    assert log[-1]["grad_norm"] > 0 and log[0]["loss"] == train_sft(healthy, TOKENIZER, MIXED, lower)[0]["loss"] and same(model, healthy)


def forced_tree():
    tree = SpanTree()
    tree.add([6], [tree.add([5, 5])])
    return tree


def test_nothing_to_learn(tmp_path):
    with pytest.raises(ValueError, match="there is nothing to learn"): train_sft(fresh(), TOKENIZER, [forced_tree()] * 2, SHORT)
    trees = [forced_tree(), replay(trace(RUNNING), prompt(RUNNING), TOKENIZER)]   # some have something
    assert train_sft(fresh(), TOKENIZER, trees, replace(SHORT, steps=1, batch=2))[0]["loss"] > 0


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
    for name in ("step-999998", "step-1000000", "step-999999", "step-old", "step-000002"): (tmp_path / name).mkdir()
    assert [p.name for p in sft._checkpoints(tmp_path)] == ["step-000002", "step-999998", "step-999999", "step-1000000"]


def test_precision_of_a_gpu_without_bf16(monkeypatch):
    "A T4 only emulates it."
    asked = []
    def supported(including_emulation=True): asked.append(including_emulation); return including_emulation
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert sft._precision(SFTConfig(), True) == sft._precision(SFTConfig(), False) == "no" and asked == [False]
    assert sft._precision(SFTConfig(mixed_precision="bf16"), True) == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert sft._precision(SFTConfig(), True) == "bf16"


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
    assert same(through, second)


def test_ready_trees_are_taken_as_they_are():
    trees = [replay(trace(p), prompt(p), TOKENIZER) for p in MIXED]
    assert example_tree(trees[0], TOKENIZER, SFTConfig(), random.Random(0)) is trees[0]
    assert [t.scored() for t in trees] == trees   # nothing is lost
    one, two, config = fresh(), fresh(), SFTConfig(steps=2, batch=4, sequential=0, autoregressive=0)
    assert [r["loss"] for r in train_sft(one, TOKENIZER, trees, config)] == [r["loss"] for r in train_sft(two, TOKENIZER, MIXED, config)]


def test_flex_attention_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match="needs a CUDA device"): train_sft(fresh(), TOKENIZER, [RUNNING], SFTConfig(steps=1, attention="flex"))


def test_no_problems(tmp_path):
    with pytest.raises(ValueError, match="there are no problems to train on"):
        train_sft(fresh(), TOKENIZER, [], replace(SHORT, folder=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_changes_nothing(tmp_path):
    model = fresh()
    check_model(model)
    with torch.no_grad(): model.model.norm.weight[0] = float("nan")
    before = flat(model.parameters())
    with pytest.raises(FloatingPointError, match="loss nan"): train_sft(model, TOKENIZER, MIXED, replace(SHORT, folder=str(tmp_path)))
    assert torch.equal(flat(model.parameters()).nan_to_num(), before.nan_to_num()) and [p.name for p in tmp_path.glob("step-*")] == ["step-000000"]


def test_mixed_precision_comes_off_again():
    model = fresh()
    train_sft(model, TOKENIZER, [RUNNING], SFTConfig(steps=1, batch=2, mixed_precision="bf16"))
    twin = fresh()
    twin.load_state_dict(model.state_dict())
    ids = torch.tensor([prompt(RUNNING)])
    with torch.no_grad(): assert torch.equal(model(ids).logits, twin(ids).logits)
    train_sft(model, TOKENIZER, [RUNNING], SFTConfig(steps=1, batch=2, mixed_precision="no"))


# ---- recipes

def test_curriculum_keeps_to_training_problems():
    rng = random.Random(0)
    drawn = [curriculum(rng, step) for step in (0, 400, 1000, 2000) for _ in range(25)]
    assert {p.family for p in drawn} == set(BENCH_FAMILIES) and not held_out() & {p.question for p in drawn}


def test_recipes(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown recipe 'nope': choose one of tiny-base, tiny-sft"): train_recipe("nope")
    model, _, log = train_recipe("tiny-base", runs=tmp_path, steps=1, batch=2)
    assert len(log) == 1 and (tmp_path / "tiny-base" / "step-000001").is_dir()
    monkeypatch.setitem(RECIPES, "tiny-base", replace(RECIPES["tiny-base"], start="small"))
    with pytest.raises(ValueError, match="started from other weights"): train_recipe("tiny-base", runs=tmp_path, steps=1, batch=2)
    monkeypatch.undo()
    model, _, log = train_recipe("schoolbook-sft", runs=tmp_path, steps=1, batch=2, sequential=1., autoregressive=0.)   # its earlier stages come first
    assert log == []   # it is the mean of three of them
    last = [load_file(tmp_path / f"tiny-sft-{n}" / "step-000001" / "model.safetensors") for n in ("sixth", "seventh", "eighth")]
    assert all(torch.allclose(w, sum(x[k] for x in last) / 3, atol=1e-6) for k, w in model.state_dict().items() if k in last[0])
    first = [json.loads(row) for row in (tmp_path / "tiny-sft-first" / "log.jsonl").open()]
    assert first[0]["loss"] < 3   # it starts from tiny-base: random weights give about ln 151 = 5.0
    assert RECIPES["tiny-sft-random"].config.fork == "random"
    stages = "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"
    others = ("random", "wide", "nested", *(f"nested-{n}" for n in stages[:6]),
              "result", *(f"result-{n}" for n in stages[:5]), "kv", *(f"kv-{n}" for n in stages[:2]))
    assert set(RECIPES) == {"tiny-base", "schoolbook-sft", *(f"tiny-sft-{n}" for n in stages + others)}
    assert all((tmp_path / f"tiny-sft-{n}" / "step-000001").is_dir() for n in stages)


def test_mean_weights():
    models = [tiny_model("tiny", TOKENIZER) for _ in range(3)]
    assert not torch.equal(*(m.lm_head.weight for m in models[:2]))
    hand = {k: sum(m.state_dict()[k].double() for m in models) / 3 for k in models[0].state_dict()}
    mean = mean_weights(models)
    assert all(torch.allclose(v.double(), hand[k], atol=1e-6) for k, v in mean.state_dict().items())
    assert mean.lm_head.weight is mean.model.embed_tokens.weight   # tied heads stay tied


@pytest.mark.parametrize("name", sorted({n for n, r in RECIPES.items() if r.config} - {"tiny-base", "tiny-sft-first"}))   # the others are means
def test_steps_of_every_recipe_fit(name):
    "Problems are drawn at every stage, are no held-out ones, and keep to the window that the recipe promises."
    recipe = RECIPES[name]
    for step in (0, 400, 1000):
        problems = [recipe.problems(random.Random(f"{step} {i}"), step) for i in range(20)]
        assert not held_out() & {p.question for p in problems}
        groups = step_batches(lambda rng, _, problems=problems: rng.choice(problems), step, TOKENIZER, replace(recipe.config, batch=8))
        longest = max(int(p.position_ids.max()) for g in groups for p in g)
        assert longest < (recipe.config.window or 8192)


@pytest.mark.parametrize("join", ["concat", "result", "kv"])
def test_thin_keeps_contexts(join):
    "What is left of a tree has the contexts that it had; over many draws everything comes up."
    problem = sum_of_products([(a, a + 1) for a in range(2, 12)])
    tree, rng, seen = replay(trace(problem, "nested", conclude=join == "result"), prompt(problem), TOKENIZER, join), random.Random(0), set()
    contexts = lambda t: {(tuple(t.path_ids(s)), t.start[s], t.sampled[s]) for s in range(len(t))}
    for _ in range(60):
        few = thin(tree, 3, rng)
        assert contexts(few) <= contexts(tree)
        seen |= contexts(few)
    assert seen == contexts(tree) and (len(few) < len(tree) or join == "kv")
    assert thin(tree, 99, rng) == tree


def test_what_does_not_fit_is_forked_or_refused():
    problem = sum_of_products([(a, a + 11) for a in range(12, 24)])
    config = SFTConfig(sequential=1., autoregressive=0., fork="nested", join="result", window=512)
    assert len(example_tree(RUNNING, TOKENIZER, config, random.Random(0))) == 2   # short: on one line, as asked
    assert len(example_tree(problem, TOKENIZER, config, random.Random(0))) > 20
    with pytest.raises(ValueError, match="positions, the window has 200"):
        example_tree(problem, TOKENIZER, replace(config, window=200), random.Random(0))
