"""Right or refused (invariant 7): every causal architecture that transformers builds from a tiny config."""
import random

import pytest
import torch
from architectures import NAMES, build
from helpers import TOKENIZERS, alone, random_forks, random_text, rngs, tiny
from test_decode import Script, plain_loop, questions, random_plan
from test_scoring import spans_of

from threadweaver_ref import scoring
from threadweaver_ref.decode import DecodeConfig, generate
from threadweaver_ref.branch import Limits
from threadweaver_ref.replay import replay
from threadweaver_ref.tokenizer import encode_prompt
from threadweaver_ref.rows import reads_by_rows
from threadweaver_ref.scoring import check_model, collate, line_limit, tree_logits, tree_logprobs
from threadweaver_ref.tree import SpanTree

char = TOKENIZERS["char"]()
HYBRID = ("qwen3_next", "qwen3_5_text", "lfm2", "mamba2", "granitemoehybrid", "jamba", "gpt_neo", "falcon_h1", "bamba", "recurrent_gemma", "rwkv")
PLAIN = ("qwen3", "qwen2", "llama", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "mixtral", "gpt2", "gpt_oss", "deepseek_v3",
         "smollm3", "llama4_text")


ATOL = 1e-3   # weights are initialised with 0.3, fifteen times the usual: roundings grow


def check_packed_is_unpacked(model):
    "Invariant 1, on two random trees."
    for rng in rngs(2, "architectures"):
        tree = replay(random_forks(rng, 2), encode_prompt(char, random_text(rng)), char)
        packed = tree.pack()
        with torch.no_grad(): found = spans_of(tree_logprobs(model, collate([packed])), packed)
        for s, p in found.items(): assert torch.allclose(p, alone(model, tree.path_ids(tree.parents[s][0]), tree.ids[s]), atol=ATOL)


def check_decoded_is_rerun(model):
    "Invariant 2, on two rollouts with forks."
    config = DecodeConfig(hook=Script(char, random_plan), batch=2, limits=Limits(max_tokens=60, max_thread_tokens=12))
    asked = questions(random.Random("q"), 2)
    for question, rollout in zip(asked, generate(model, char, asked, config), strict=True):
        machine = plain_loop(model, char, question, config)
        assert rollout.text == machine.text and rollout.tree == machine.tree and rollout.forks
        with torch.no_grad(): scored = tree_logprobs(model, collate([rollout.tree.pack()]))
        assert torch.allclose(rollout.logprobs, scored, atol=ATOL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NAMES)
def test_right_or_refused(kind):
    try: model = build(kind)
    except Exception as error: pytest.skip(f"cannot be built tiny: {type(error).__name__}")
    try: check_model(model)
    except ValueError as error:
        assert kind not in PLAIN and "\n" not in str(error) and str(error).startswith("a tree mask cannot serve")
        return
    assert kind not in HYBRID
    check_packed_is_unpacked(model)
    check_decoded_is_rerun(model)


@pytest.mark.parametrize("kind", HYBRID[:7])
def test_what_is_refused_is_refused_everywhere(kind):
    model, tree = build(kind), SpanTree()
    tree.add([21], [tree.add([20])], True)
    for call in (lambda: tree_logprobs(model, collate([tree.pack()])), lambda: generate(model, char, ["1+1?"]), lambda: check_model(model)):
        with pytest.raises(ValueError, match="a tree mask cannot serve"): call()


def line(n):
    tree = SpanTree()
    tree.add([30 + i % 9 for i in range(n - 1)], [tree.add([20])], True)
    return collate([tree.pack()])


@pytest.mark.parametrize("kind, field", [("mistral", "sliding_window"), ("gemma3_text", "sliding_window"), ("gpt_oss", "sliding_window"),
                                         ("cohere2", "sliding_window"), ("llama4_text", "attention_chunk_size")])
def test_lines_longer_than_a_window_or_chunk_are_refused(kind, field):
    model = build(kind, **{field: 8})
    assert line_limit(model) == 8
    with torch.no_grad(): found = tree_logprobs(model, line(8))
    assert torch.allclose(found, alone(model, [20], [30 + i % 9 for i in range(7)]), atol=1e-4)
    with pytest.raises(ValueError, match="a line of 9 tokens is longer .* of 8 tokens"): tree_logprobs(model, line(9))


def test_windows_of_layer_types_that_the_model_does_not_have_are_no_limit():
    "Qwen2 keeps a sliding window in its config whose layers all see everything."
    assert line_limit(tiny("Qwen2", char, use_sliding_window=True, sliding_window=8, layer_types=["full_attention"] * 2)) == float("inf")


@pytest.mark.parametrize("window", [8, 64])
def test_the_least_of_all_windows(window):
    "A wider window asked for does not overrule the model's own."
    model = build("mistral", sliding_window=16)
    rollout = generate(model, char, ["1?"], DecodeConfig(window=window, limits=Limits(max_tokens=60)))[0]
    assert rollout.tree.sorted().start[-1] + len(rollout.tree.ids[-1]) == min(window, 16) and rollout.finish_reason == "length"


@pytest.mark.parametrize("name", ["flash_attention_2", "paged|sdpa", "something_new"])
def test_attention_without_masks_is_refused(name):
    model = tiny("Qwen3", char)
    model.config._attn_implementation = name
    with pytest.raises(ValueError, match="takes no mask of our own: choose one of sdpa, eager, flex_attention"): check_model(model)


def test_the_verdict_is_asked_once_and_changes_nothing(monkeypatch):
    model, asked, real = tiny("Qwen3", char).train(), [], scoring._fault
    monkeypatch.setattr(scoring, "_fault", lambda m: asked.append(m.training) or real(m))
    for _ in range(3): check_model(model)
    assert asked == [False] and model.training
    model.set_attn_implementation("eager")   # another implementation is another question
    check_model(model)
    assert len(asked) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_told_from_wrong(dtype):
    check_model(tiny("Qwen3", char).to(dtype))
    with pytest.raises(ValueError, match="cannot serve"): check_model(build("lfm2").to(dtype))


def test_eager_and_sdpa_agree_in_bfloat16():
    "The mask has the model's number format; scores are off by no more than its noise."
    seen, model = [], tiny("Qwen3", char).to(torch.bfloat16)
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    batch = collate([replay(random_forks(random.Random(3), 2), encode_prompt(char, "7?"), char).pack()])
    found = {}
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        check_model(model)
        with torch.no_grad(): found[kind] = tree_logits(model, batch).float()
        assert seen[-1].dtype == torch.bfloat16 and seen[-1].isfinite().all()
    exact = tree_logits(tiny("Qwen3", char), batch)
    noise = {kind: (x - exact).abs().mean() for kind, x in found.items()}
    assert noise["eager"] < 1.5 * noise["sdpa"] and (found["eager"] - found["sdpa"]).abs().mean() < 2 * noise["sdpa"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])   # the last cannot be asked for the logits of some positions alone
def test_logits_of_some_columns(kind):
    model, batch = build(kind), collate([replay(random_forks(random.Random(5), 2), encode_prompt(char, "7?"), char).pack() for _ in range(2)])
    keep = torch.tensor([0, 3, 4])
    with torch.no_grad(): assert torch.allclose(tree_logits(model, batch, keep), tree_logits(model, batch)[:, keep], atol=1e-6)


def test_scoring_makes_no_logits_for_the_prompt():
    model, widths = tiny("Qwen3", char), []
    model.lm_head.register_forward_hook(lambda m, args, out: widths.append(out.shape[1]))
    check_model(model), reads_by_rows(model)   # ask the model, once
    widths.clear()
    tree_logprobs(model, line(5)); generate(model, char, ["1+" * 40 + "1?"], DecodeConfig(limits=Limits(max_tokens=1)))
    assert widths == [4, 1]
