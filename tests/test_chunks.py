"""Logits in chunks and layers computed again: the numbers and gradients of the whole pass, and never more logits at once than a chunk."""
import copy
from dataclasses import replace

import pytest
import torch
from architectures import NAMES, build
from helpers import ARCHITECTURES, TOKENIZERS, rngs, spied, tiny
from test_pgrpo import run
from test_tree import random_tree
from torch.utils._python_dispatch import TorchDispatchMode
from training import MIXED, SHORT, TOKENIZER, adapters, flat, fresh

from threadweaver_ref import chunks
from threadweaver_ref.chunks import recomputed
from threadweaver_ref.model import add_lora
from threadweaver_ref.scoring import check_model, collate, tree_logprobs
from threadweaver_ref.sft import train_sft

char = TOKENIZERS["char"]()
SPECIAL = {"Gemma2": {"final_logit_softcapping": 3.0, "sliding_window": 4096}, "Granite": {"logits_scaling": 4.0}, "Cohere": {"logit_scale": .3},
           "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}}
KINDS = [*ARCHITECTURES, *SPECIAL, "LoRA", "LoRA on the output"]


def made(kind, dtype=torch.float64):
    if kind in SPECIAL: model = tiny(kind, char, **SPECIAL[kind])
    else: model = tiny("Qwen3" if "LoRA" in kind else kind, char, tie_word_embeddings=kind == "LoRA on the output")
    if "LoRA" in kind:
        model = add_lora(model, r=2, train_tokens=[5, 7] if "output" in kind else ())
        for p in model.parameters(): p.data += .05 * torch.randn_like(p) * p.requires_grad
    return model.to(dtype)


def batch(dtype=torch.float64, n=5, name="chunks"):
    return collate([random_tree(rng, merges=False).pack() for rng in rngs(n, name)], dtype=dtype)


def passed(model, inputs, **options):
    "Log-probabilities, and the gradient of a loss that weighs each token differently."
    model.zero_grad()
    found = tree_logprobs(model, inputs, **options)
    (found * torch.arange(len(found))).mean().backward()
    return found.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@torch.no_grad()
def by_hand(model, inputs, banned=(), temperature=1.0):
    "From all logits, one token after another."
    logits = model(**{k: inputs[k] for k in ("input_ids", "position_ids", "attention_mask")}, use_cache=False).logits / temperature
    allowed = [v for v in range(logits.shape[-1]) if v not in banned]
    found = []
    for row, column in inputs["sampled"].nonzero().tolist():
        line, token = logits[row, inputs["parent_index"][row, column]], int(inputs["input_ids"][row, column])
        found.append(line[token] - line[allowed].logsumexp(0) if token in allowed else torch.tensor(-torch.inf))
    return torch.stack(found).float()


class Largest(TorchDispatchMode):
    "The largest number of rows of any tensor whose last dimension is the vocabulary, but for the output matrix (V, 32) turned round."
    rows = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(t, torch.Tensor) or not t.ndim or t.shape[-1] != len(char) or t.shape[-2:] == (32, len(char)): continue
            self.rows = max(self.rows, t.numel() // len(char))
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(kind):
    model, inputs = made(kind), batch()
    for options in ({}, {"banned": [8, 9], "temperature": .7}):
        whole = passed(model, inputs, **options)
        torch.testing.assert_close(whole[0], by_hand(model, inputs, **options), atol=1e-5, rtol=1e-5)
        for chunk in (1, 7, 64):
            for found, wanted in zip(passed(model, inputs, chunk=chunk, **options), whole, strict=True):
                torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    with torch.no_grad(): torch.testing.assert_close(tree_logprobs(model, inputs, chunk=7, **options), whole[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "OPT"])   # OPT's own code calls a part of its backbone: its logits are made whole
def test_never_more_logits_than_a_chunk(kind):
    model, inputs = made(kind), batch()
    check_model(model)   # asks with a tree of its own
    assert inputs["sampled"].sum() > 60
    for grad in (False, True):
        with torch.set_grad_enabled(grad), Largest() as seen:
            loss = tree_logprobs(model, inputs, chunk=9).sum()
            if grad: loss.backward()
        assert 0 < seen.rows <= 9


def test_no_logits_are_kept_for_the_backward_pass():
    model, inputs, kept = made("Llama"), batch(), []
    check_model(model)
    def note(tensor):
        if tensor.ndim and len(char) in tensor.shape and tensor.numel() != len(char) * 32: kept.append(tensor.shape)
        return tensor
    for options, wanted in (({}, True), ({"chunk": 9}, False)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor): tree_logprobs(model, inputs, **options)
        assert bool(kept) is wanted


def test_a_chunk_is_as_large_as_a_number_of_logits_allows(monkeypatch):
    model, inputs = made("Llama"), batch()
    check_model(model)
    with Largest() as seen: tree_logprobs(model, inputs)
    assert seen.rows > 60   # a small vocabulary is never cut
    monkeypatch.setattr(chunks, "LARGEST", 10 * len(char) + 1)
    with Largest() as seen: tree_logprobs(model, inputs)
    assert seen.rows == 10


def test_a_head_that_does_not_give_the_models_logits_is_not_used():
    "Here what the model does behind its backbone depends on more than the backbone's output."
    model, inputs = made("Llama"), batch()
    forward = model.forward
    def odd(input_ids=None, **options):
        out = forward(input_ids=input_ids, **options)
        out.logits = out.logits * (1 + float(input_ids.float().mean()))
        return out
    odd.__signature__ = None
    model.forward = odd
    model._tree_faults = {model.config._attn_implementation: None}
    torch.testing.assert_close(tree_logprobs(model, inputs, chunk=3), tree_logprobs(model, inputs))


def test_nothing_is_left_behind():
    model, inputs = made("Llama"), batch()
    before = set(vars(model.model)), len(model.model._forward_hooks)
    passed(model, inputs, chunk=3)
    assert before == (set(vars(model.model)), len(model.model._forward_hooks))
    with pytest.raises(RuntimeError, match="halt"):
        with recomputed(model): raise RuntimeError("halt")
    assert not any("forward" in vars(layer) for layer in model.model.layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_chunks_on_every_architecture(name):
    try: model = build(name)
    except Exception: pytest.skip("not built")
    try: check_model(model)
    except ValueError: pytest.skip("refused")
    inputs = batch(torch.float32)
    with torch.no_grad(): torch.testing.assert_close(tree_logprobs(model, inputs, chunk=7), tree_logprobs(model, inputs), atol=1e-4, rtol=1e-4)


# ---- layers computed again

@pytest.mark.parametrize("kind", KINDS)
def test_layers_computed_again_give_the_same_bits(kind):
    model, inputs = made(kind, torch.float32), batch(torch.float32)
    wanted = passed(model, inputs)
    with recomputed(model): found = passed(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_layers_are_computed_again_in_evaluation_mode_too():
    model, inputs, calls = made("LoRA", torch.float32), batch(torch.float32), []
    layer = model.get_base_model().model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    check_model(model.eval())
    for on, wanted in ((False, 1), (True, 2)):
        calls.clear()
        with recomputed(model, on): loss = tree_logprobs(model, inputs).sum()
        loss.backward()
        assert len(calls) == wanted


def test_dropout_is_the_same_when_a_layer_is_computed_again():
    model, inputs = tiny("Llama", char, attention_dropout=.3), batch(torch.float32)
    check_model(model)
    found = []
    for on in (False, True):
        torch.manual_seed(1)
        with recomputed(model.train(), on): found.append(passed(model, inputs))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], passed(model.eval(), inputs)[0])


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="Linear has no layers that can be computed again"):
        with recomputed(torch.nn.Linear(1, 1)): pass


def test_training_is_the_same(monkeypatch):
    "Fine-tuning and P-GRPO through LoRA, to the last bit."
    a, b, again = fresh(), fresh(), spied(monkeypatch, chunks, "checkpoint")
    log = train_sft(a, TOKENIZER, MIXED, SHORT)
    assert not again
    other_log = train_sft(b, TOKENIZER, MIXED, replace(SHORT, gradient_checkpointing=True))
    assert torch.equal(flat(a.parameters()), flat(b.parameters())) and [r["loss"] for r in log] == [r["loss"] for r in other_log] and again
    learner, rows = run()
    again.clear()
    other, others = run(gradient_checkpointing=True)
    assert again
    assert torch.equal(adapters(learner), adapters(other)) and [r["loss"] for r in rows] == [r["loss"] for r in others]


def test_a_run_goes_on_with_layers_computed_again(tmp_path):
    config = replace(SHORT, folder=str(tmp_path), save_every=2)
    def stop(step, row):
        if step == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train_sft(fresh(), TOKENIZER, MIXED, config, stop)
    model, whole = fresh(), fresh()
    train_sft(model, TOKENIZER, MIXED, replace(config, gradient_checkpointing=True))
    train_sft(whole, TOKENIZER, MIXED, SHORT)
    assert torch.equal(flat(model.parameters()), flat(whole.parameters()))


def test_a_dense_mask_is_refused_beyond_its_limit():
    packs = [random_tree(rng).pack() for rng in rngs(3, "dense")]
    n = max(map(len, packs))
    collate(packs, limit=3 * n * n)
    with pytest.raises(ValueError, match=f"a dense mask for 3 x {n} tokens has more than .* numbers: use collate_blocks and flex_attention"):
        collate(packs, limit=3 * n * n - 1)


def test_copies_of_a_model_within_do_not_share_layers():
    "P-GRPO decodes with a copy; a copy that is made within belongs to itself."
    model, inputs = made("Llama", torch.float32), batch(torch.float32)
    with recomputed(model): other = copy.deepcopy(model)
    for p in other.parameters(): p.data.zero_()
    assert tree_logprobs(model, inputs).std() > .1
