"""The loop that every training shares: batches, one update, optimisers, exact resume, precision."""
import json
from contextlib import nullcontext
from dataclasses import asdict, replace

import pytest
import torch
from helpers import spied
from training import MIXED, RUNNING, SHORT, TOKENIZER, flat, forked, fresh, prompt, same, stop_at

from threadweaver_ref import train
from threadweaver_ref.checkpoint import RunFolder
from threadweaver_ref.replay import replay
from threadweaver_ref.scoring import check_model, collate, tree_logprobs
from threadweaver_ref.sft import SFTConfig, step_batches, train_sft
from threadweaver_ref.train import InFull, TrainConfig, make_optimizers, matrices, micro_batches, precision, shard, step_problems


# ---- settings and batches

@pytest.mark.parametrize("bad", [dict(steps=0), dict(batch=0), dict(micro_tokens=0), dict(save_every=0), dict(join="zip"), dict(lr=-1.), dict(lr=0.),
                                 dict(warmup=2), dict(optimizer="sgd"), dict(attention="sparse"), dict(clip=0.), dict(weight_decay=-1.),
                                 dict(mixed_precision="bf17"), dict(mixed_precision=False), dict(mixed_precision="fp16", optimizer="muon")])
def test_config_is_validated(bad):
    with pytest.raises(ValueError, match=next(iter(bad)) if len(bad) == 1 else "adamw alone"): TrainConfig(**bad)


def test_defaults_are_the_ones_written_down():
    assert asdict(TrainConfig()) == dict(
        steps=1000, batch=64, micro_tokens=2048, lr=1e-3, optimizer="adamw", warmup=.05, weight_decay=.01, betas=(.9, .95), clip=1.0,
        join="concat", chat=None, seed=0, folder=None, save_every=200, mixed_precision=None, attention="dense",
        gradient_checkpointing=False)


def test_an_epoch_sees_every_problem_once():
    config = TrainConfig(batch=3)
    seen = [p for step in range(10) for p in step_problems(range(15), step, config, None)]
    assert sorted(seen[:15]) == sorted(seen[15:]) == list(range(15)) and seen[:15] != seen[15:]
    again = [p for step in range(10) for p in step_problems(range(15), step, replace(config, seed=1), None)]
    assert again != seen


def test_a_sampler_is_asked_with_the_step():
    assert step_problems(lambda rng, step: (rng, step), 7, TrainConfig(batch=2), "rng") == [("rng", 7)] * 2


def test_micro_batches():
    packed = [p for s in range(4) for g in step_batches(MIXED, s, TOKENIZER, SFTConfig(batch=8)) for p in g]
    groups = micro_batches(packed, 1500)
    assert sorted(map(id, packed)) == sorted(id(p) for g in groups for p in g)
    assert all(len(g) == 1 or len(g) * max(map(len, g)) <= 1500 for g in groups)


@pytest.mark.parametrize("n, processes", [(5, 2), (4, 2), (1, 3), (7, 1)])
def test_processes_share_a_step(n, processes):
    parts = [shard([[i, "more"] for i in range(n)], p, processes) for p in range(processes)]
    assert len({len(part) for part in parts}) == 1   # each makes as many backward passes
    assert sorted(g[0] for part in parts for g, weight in part if weight) == list(range(n))
    assert all(len(g) == (2 if weight else 1) for part in parts for g, weight in part)   # what only fills up is small


# ---- one update

def test_the_cut_into_micro_batches_changes_nothing():
    ends = []
    for limit in (1, 600, 10 ** 6):
        model = fresh()
        log = train_sft(model, TOKENIZER, MIXED, SFTConfig(steps=1, batch=6, micro_tokens=limit, warmup=0, lr=1e-3, clip=1e9))
        ends.append((log[0]["loss"], log[0]["grad_norm"], log[0]["sampled"]))
    assert ends[0] == pytest.approx(ends[1], rel=1e-5) and ends[1] == pytest.approx(ends[2], rel=1e-5)


def test_one_step_of_adamw_by_hand():
    model, hand, lr = fresh(), fresh(), 1e-2
    config = SFTConfig(steps=1, batch=1, lr=lr, warmup=0, weight_decay=.5, clip=1e9, sequential=0, autoregressive=0)
    row, = train_sft(model, TOKENIZER, [RUNNING], config)
    loss = -tree_logprobs(hand, collate([replay(forked(RUNNING), prompt(RUNNING), TOKENIZER).pack()])).mean()
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for (name, new), p in zip(model.named_parameters(), hand.parameters()):
        step = p.grad / (p.grad.abs() + 1e-8)   # the first step: both means, corrected, are the gradient's own
        assert torch.allclose(new, p * (1 - lr * .5) - lr * step, atol=1e-5), name


def orthogonal(matrix, rounds=5):
    "Newton-Schulz in full precision: singular vectors stay, values go near 1."
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if len(matrix) > matrix.shape[1] else x
    for _ in range(rounds):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


@pytest.mark.parametrize("within, off", [(nullcontext(), .02), (InFull(), 1e-5)])
@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (32, 32), (1, 7)])
def test_muon_by_hand(shape, within, off):
    "Momentum, Nesterov's look ahead, decoupled weight decay, steps as large as AdamW's; to the rounding of bf16, or in full."
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(5, *shape)
    model = torch.nn.Linear(shape[1], shape[0], bias=False)
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    with torch.no_grad(): model.weight.copy_(start)
    optimizer, = make_optimizers(model, TrainConfig(optimizer="muon", lr=.1, weight_decay=.3))
    hand, mean = start.clone(), torch.zeros(shape)
    for g in gradients:
        model.weight.grad = g.clone()
        with within: optimizer.step()
        mean = .95 * mean + .05 * g
        hand = hand * (1 - .1 * .3) - .1 * .2 * max(shape) ** .5 * orthogonal(.95 * mean + .05 * g)
    assert (model.weight - hand).norm() < off * (hand - start).norm()


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
    adamws, muons, norms = spied(monkeypatch, torch.optim, "AdamW"), spied(monkeypatch, torch.optim, "Muon"), spied(monkeypatch, train, "shard")
    clipped, seeded = spied(monkeypatch, train.Accelerator, "clip_grad_norm_"), spied(monkeypatch, train, "set_seed")
    made, saved = spied(monkeypatch, train, "Accelerator"), spied(monkeypatch, RunFolder, "save")
    config = SFTConfig(steps=4, batch=2, micro_tokens=99, lr=.02, warmup=.5, weight_decay=.07, betas=(.7, .8), clip=.3, seed=3, folder=str(tmp_path),
                       save_every=3, mixed_precision="bf16")
    log = train_sft(fresh(), TOKENIZER, [RUNNING], config)
    (args, named), = adamws
    assert args[1:] == (.02, (.7, .8)) and named["weight_decay"] == .07 and not muons and [len(c[0][0]) for c in norms] == [2] * 4
    assert [r["lr"] / .02 for r in log] == pytest.approx([0, .5, 1, .5])   # of each step itself
    assert {c[0][2] for c in clipped} == {.3} and made == [((), {"mixed_precision": "bf16"})] and seeded == [((3,), {})]
    assert [c[0][2] for c in saved] == [0, 3, 4]
    train_sft(fresh(), TOKENIZER, [RUNNING], replace(config, optimizer="muon", folder=None, steps=1))
    (args, named), = muons
    assert args[1:] == (.02, .07) and named == {"adjust_lr_fn": "match_rms_adamw"} and len(args[0]) == 14 and len(adamws) == 2
    assert adamws[1][0][1:] == (.02, (.7, .8)) and adamws[1][1]["weight_decay"] == .07


def test_the_first_steps_are_small(monkeypatch):
    "Warm-up: what each step moves, and with which learning rate."
    used, real = [], torch.optim.AdamW.step
    def step(self, *args): used.append(self.param_groups[0]["lr"]); return real(self, *args)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    log = train_sft(fresh(), TOKENIZER, [RUNNING], SFTConfig(steps=8, batch=1, lr=1., warmup=.5, clip=1e-9))
    assert used == [r["lr"] for r in log] == pytest.approx([0, .25, .5, .75, 1, (1 + .5 ** .5) / 2, .5, (1 - .5 ** .5) / 2])


def test_what_fills_up_weighs_nothing(monkeypatch):
    "A process that runs short repeats a batch, with weight 0."
    plain, filled, config = fresh(), fresh(), SFTConfig(steps=2, batch=3, micro_tokens=1)
    log = train_sft(plain, TOKENIZER, MIXED, config)
    monkeypatch.setattr(train, "shard", lambda groups, *_: [(g, 1.0) for g in groups] + [(groups[0][:1], 0.0)])
    again = train_sft(filled, TOKENIZER, MIXED, config)
    assert same(plain, filled) and [(r["loss"], r["grad_norm"]) for r in again] == [(r["loss"], r["grad_norm"]) for r in log]


def test_a_gradient_from_before_is_not_used():
    one, two, config = fresh(), fresh(), replace(SHORT, steps=1)
    sum(p.sum() for p in two.parameters()).backward()
    assert [r["grad_norm"] for r in train_sft(one, TOKENIZER, MIXED, config)] == [r["grad_norm"] for r in train_sft(two, TOKENIZER, MIXED, config)]
    assert same(one, two)


def test_a_loss_that_is_no_number_changes_nothing(tmp_path):
    model = fresh()
    check_model(model)
    with torch.no_grad(): model.model.norm.weight[0] = float("nan")
    before = flat(model.parameters())
    with pytest.raises(FloatingPointError, match="loss nan"): train_sft(model, TOKENIZER, MIXED, replace(SHORT, folder=str(tmp_path)))
    assert torch.equal(flat(model.parameters()).nan_to_num(), before.nan_to_num()) and [p.name for p in tmp_path.glob("step-*")] == ["step-000000"]


def test_after_a_loss_that_is_no_number_a_lower_lr_trains(monkeypatch):
    scored, calls = train.tree_logprobs, []
    def once(*args):
        calls.append(1)
        return scored(*args) * (float("nan") if len(calls) == 1 else 1)
    monkeypatch.setattr(train, "tree_logprobs", once)
    model, healthy, lower = fresh(), fresh(), replace(SHORT, lr=1e-4)
    with pytest.raises(FloatingPointError, match="try a lower lr"): train_sft(model, TOKENIZER, MIXED, SHORT)
    log = train_sft(model, TOKENIZER, MIXED, lower)
    assert log[-1]["grad_norm"] > 0 and log[0]["loss"] == train_sft(healthy, TOKENIZER, MIXED, lower)[0]["loss"] and same(model, healthy)


# ---- stopped and resumed

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


def interrupt(monkeypatch, call):
    "The stop button: KeyboardInterrupt in the scoring of the `call`-th micro-batch."
    scored, calls = train.tree_logprobs, []
    def stopping(*args):
        calls.append(1)
        if len(calls) == call: raise KeyboardInterrupt
        return scored(*args)
    monkeypatch.setattr(train, "tree_logprobs", stopping)


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


# ---- what the model is like afterwards

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
    monkeypatch.setattr(train, "parse_flag_from_env", lambda name: False)
    model, trained_with = fresh(), []
    model.set_attn_implementation("eager")
    def stop(seed): trained_with.append(model.config._attn_implementation); raise KeyboardInterrupt
    monkeypatch.setattr(train, "set_seed", stop)   # as early as can be
    with pytest.raises(KeyboardInterrupt): train_sft(model, TOKENIZER, MIXED, SFTConfig(steps=1, attention="flex", mixed_precision="no"))
    assert trained_with == ["flex_attention"] and model.config._attn_implementation == "eager"


@pytest.mark.parametrize("precision, by", [("bf16", "products"), ("no", "sdpa")])
@pytest.mark.parametrize("again", [False, True])
def test_on_a_cpu_bf16_is_trained_by_products(monkeypatch, precision, by, again):
    "Backward passes too, which compute layers again; afterwards the model attends as before."
    model, seen = fresh(), set()
    attend = model.model.layers[0].self_attn.forward
    def spy(*args, **options):
        seen.add((model.config._attn_implementation, torch.is_grad_enabled()))
        return attend(*args, **options)
    monkeypatch.setattr(model.model.layers[0].self_attn, "forward", spy)
    check_model(model)
    seen.clear()
    log = train_sft(model, TOKENIZER, MIXED, replace(SHORT, steps=2, mixed_precision=precision, gradient_checkpointing=again))
    assert {kind for kind, grad in seen if grad} == {by} and model.config._attn_implementation == "sdpa"
    assert log[-1]["loss"] == pytest.approx(train_sft(fresh(), TOKENIZER, MIXED, replace(SHORT, steps=2, mixed_precision="no"))[-1]["loss"], rel=.02)


def test_what_is_asked_without_gradients_is_not_asked_where_scores_are_made(monkeypatch):
    "Some versions of torch keep, within one autocast, weights that were cast without gradients; then nothing would reach them."
    model, asked, scoring, score = fresh(), [], [], train._score
    def spy(*args):
        scoring.append(True)
        try: return score(*args)
        finally: scoring.pop()
    attend = model.model.layers[0].self_attn.forward
    def forward(*args, **options):
        if not torch.is_grad_enabled(): asked.append(bool(scoring))
        return attend(*args, **options)
    monkeypatch.setattr(train, "_score", spy)
    monkeypatch.setattr(model.model.layers[0].self_attn, "forward", forward)
    train_sft(model, TOKENIZER, MIXED, replace(SHORT, steps=1, mixed_precision="bf16"))
    assert asked and not any(asked)


def test_a_model_of_which_nothing_is_trained_is_refused():
    model = fresh().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is trainable"): train_sft(model, TOKENIZER, MIXED, replace(SHORT, steps=1))


def test_flex_attention_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match="needs a CUDA device"): train_sft(fresh(), TOKENIZER, [RUNNING], SFTConfig(steps=1, attention="flex"))


def test_mixed_precision_comes_off_again():
    model = fresh()
    train_sft(model, TOKENIZER, [RUNNING], SFTConfig(steps=1, batch=2, mixed_precision="bf16"))
    twin = fresh()
    twin.load_state_dict(model.state_dict())
    ids = torch.tensor([prompt(RUNNING)])
    with torch.no_grad(): assert torch.equal(model(ids).logits, twin(ids).logits)
    train_sft(model, TOKENIZER, [RUNNING], SFTConfig(steps=1, batch=2, mixed_precision="no"))


def test_precision_of_a_gpu_without_bf16(monkeypatch):
    "A T4 only emulates it."
    asked = []
    def supported(including_emulation=True): asked.append(including_emulation); return including_emulation
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert precision(TrainConfig(), True) == precision(TrainConfig(), False) == "no" and asked == [False]
    assert precision(TrainConfig(mixed_precision="bf16"), True) == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert precision(TrainConfig(), True) == "bf16"


@pytest.mark.parametrize("dropout", [True, False])
def test_dropout_is_on_where_asked_for(dropout):
    model, seen = fresh(), []
    def one_step(step, setup): seen.append(setup.model.training); return {}
    train.train_loop(model, TrainConfig(steps=1), [], one_step, dropout=dropout)
    assert seen == [dropout] and not model.training
