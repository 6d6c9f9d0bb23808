"""The same checks on a CUDA GPU: masks against FlexAttention, decoding against the CPU, and a decoding step that is timed."""
import random

import pytest
import torch
from helpers import ARCHITECTURES, TOKENIZERS, random_forks, random_text, rngs, tiny
from test_decode import ROOMY, Script, clean_plan, questions, random_plan, replayed, same
from training import MIXED

from threadweaver_ref.decode import DecodeConfig, generate
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.replay import replay
from threadweaver_ref.tokenizer import encode_prompt
from threadweaver_ref.sampling import filter_logits, uniforms
from threadweaver_ref.sft import SFTConfig, train_sft
from threadweaver_ref.scoring import collate, collate_blocks, tree_block_mask, tree_logprobs
from threadweaver_ref.tree import PackedTree, tree_mask

pytestmark = pytest.mark.cuda
char = TOKENIZERS["char"]()


@pytest.fixture(autouse=True)
def exact():
    "Products in full float32, as on the CPU."
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_cuda(packed): return PackedTree(*[t.cuda() for t in vars(packed).values()])


def packs(name, n, tokenizer=char):
    return [replay(random_forks(rng), encode_prompt(tokenizer, random_text(rng)), tokenizer).pack() for rng in rngs(n, name)]


# ---- masks and packing

def test_masks_do_not_depend_on_the_device():
    for packed in packs("cuda mask", 5):
        there = on_cuda(packed)
        assert tree_mask(there).is_cuda and torch.equal(tree_mask(there).cpu(), tree_mask(packed))
        i = torch.arange(len(packed), device="cuda")
        assert torch.equal(tree_block_mask(there).mask_mod(0, 0, i[:, None], i[None]), tree_mask(there))


def test_flex_attention_equals_dense():
    from torch.nn.attention.flex_attention import flex_attention
    compiled = torch.compile(flex_attention, dynamic=False)
    packed = on_cuda(replay(random_forks(random.Random(3), depth=3), encode_prompt(char, "12*3+4*5?" * 40), char).pack())
    assert len(packed) > 300
    q, k, v = torch.randn(3, 1, 2, len(packed), 64, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=tree_mask(packed))
    # FlexAttention may multiply in TF32
    assert torch.allclose(compiled(q, k, v, block_mask=tree_block_mask(packed)), dense, atol=5e-3)


def test_logprobs_dense_flex_and_cpu():
    model, trees = tiny("Qwen3", char), packs("cuda logprobs", 6)
    with torch.no_grad():
        cpu = tree_logprobs(model, collate(trees))
        model = model.cuda()
        assert torch.allclose(tree_logprobs(model, collate(trees, "cuda")).cpu(), cpu, atol=1e-3)
        model.set_attn_implementation("flex_attention")
        flex = tree_logprobs(model, collate_blocks(trees, "cuda")).cpu()
    # the trees come one after another in both
    assert flex.shape == cpu.shape and torch.allclose(flex, cpu, atol=5e-2)
    assert (flex - cpu).abs().mean() < 5e-3


# ---- decoding

@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_cuda_decodes_as_the_cpu_does(arch, name):
    tokenizer = TOKENIZERS[name]()
    model, asked = tiny(arch, tokenizer), questions(random.Random(arch + name), 16)
    config = lambda: DecodeConfig(hook=Script(tokenizer, random_plan), batch=5, limits=Limits(max_tokens=400, max_thread_tokens=60))
    here = generate(model, tokenizer, asked, config())
    there = generate(model.cuda(), tokenizer, asked, config())
    assert any(r.forks for r in here)
    for a, b in zip(here, there, strict=True):
        assert a.text == b.text and a.tree == b.tree == replayed(b, tokenizer, config()) and a.finish_reason == b.finish_reason
        assert torch.allclose(a.logprobs, b.logprobs.cpu(), atol=1e-3)
        assert a.decode_steps == b.decode_steps


def test_noise_does_not_depend_on_the_device():
    keys, steps = torch.tensor([3, 99, 2 ** 61, 2 ** 62 - 1]), torch.tensor([0, 7, 7, 4095])
    assert torch.equal(uniforms(keys.cuda(), steps.cuda()).cpu(), uniforms(keys, steps))
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    for options in (dict(), dict(top_k=7), dict(top_p=.7)):
        kept = [torch.isfinite(filter_logits(x, **options)).cpu() for x in (logits, logits.cuda())]
        assert torch.equal(*kept)


def test_sampling_among_neighbours():
    "The same seeds draw the same tokens in batches of 8 and of 3, and on the CPU."
    model, asked = tiny("Qwen3", char), questions(random.Random("cuda sampling"), 8)
    limits = Limits(max_tokens=300, max_thread_tokens=40)
    config = lambda batch: DecodeConfig(temperature=1., hook=Script(char, random_plan), batch=batch, limits=limits)
    here = generate(model, char, asked, config(8))
    model = model.cuda()
    together = generate(model, char, asked, config(8))
    assert all(map(same, together, generate(model, char, asked, config(3))))
    assert sum(a.text == b.text for a, b in zip(here, together, strict=True)) >= 7   # rounding may turn a near tie on another device


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decodes(dtype):
    model = tiny("Qwen3", char, hidden_size=64, head_dim=32, initializer_range=.05).to("cuda", dtype)
    config = DecodeConfig(hook=Script(char, clean_plan), limits=ROOMY, batch=4)
    for r in generate(model, char, questions(random.Random("half"), 8), config):
        assert r.finish_reason == "stop" and r.well_formed and torch.isfinite(r.logprobs).all()
        assert r.tree == replayed(r, char, config)


# ---- speed: a smoke test, no claim

def test_a_step_for_many_lanes_costs_less_than_many_steps():
    "64 problems at once take fewer forward passes, and less time, than one after another."
    model = tiny("Qwen3", char, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, head_dim=64, intermediate_size=512).cuda()
    config = lambda batch: DecodeConfig(mode="sequential", temperature=1., limits=Limits(max_tokens=64), batch=batch)
    asked, stats = [f"{i}*{i + 1}?" for i in range(64)], {1: {}, 64: {}}
    generate(model, char, asked[:4], config(4))   # warm up
    wide = generate(model, char, asked, config(64), stats=stats[64])
    narrow = generate(model, char, asked[:8], config(1), stats=stats[1])
    per_token = {b: stats[b]["forward_seconds"] / sum(r.total_tokens for r in rs) for b, rs in ((1, narrow), (64, wide))}
    print({b: f"{1e6 * t:.1f} us a token" for b, t in per_token.items()}, torch.cuda.get_device_name())
    assert stats[64]["forwards"] < stats[1]["forwards"] and per_token[64] < per_token[1] / 4


def test_training_with_flex_equals_dense(monkeypatch):
    "Three steps with either attention: nearly the same losses."
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    losses = {}
    for attention in ("dense", "flex"):
        model = tiny("Qwen3", char, hidden_size=64, head_dim=32)
        config = SFTConfig(steps=3, batch=4, attention=attention, mixed_precision="no")
        losses[attention] = [row["loss"] for row in train_sft(model, char, MIXED, config)]
        assert model.config._attn_implementation == "sdpa" and next(model.parameters()).is_cuda
    assert losses["dense"] == pytest.approx(losses["flex"], rel=2e-2)


def test_pgrpo_samples_and_updates_as_on_the_cpu(monkeypatch, tmp_path):
    "A step with adapters: the same rollouts, so the same reward, and about the same gradient; stopped and resumed as well."
    from test_pgrpo import run
    from training import adapters
    here, log = run()
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    there, rows = run(str(tmp_path / "whole"))
    assert next(there.parameters()).is_cuda
    assert rows[0]["reward"] == pytest.approx(log[0]["reward"]) and rows[0]["grad_norm"] == pytest.approx(log[0]["grad_norm"], rel=2e-2)
    with pytest.raises(KeyboardInterrupt): run(str(tmp_path / "stopped"), steps=3)
    assert torch.allclose(adapters(run(str(tmp_path / "stopped"))[0]), adapters(there), atol=1e-4)
