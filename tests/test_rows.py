"""A pass without padding: every token attends over the row of its own problem, and models that cannot be asked so are found out."""
import random

import pytest
import torch
import transformers
from helpers import ARCHITECTURES, TOKENIZERS, tiny

from threadweaver_ref import rows as room
from threadweaver_ref.cache import FlatCache
from threadweaver_ref.rows import Part, by_products, by_rows, flat_pass, product_attention, reads_by_rows
from threadweaver_ref.scoring import additive

char = TOKENIZERS["char"]()


def random_pass(rng, problems=4, slots=32):
    "What every problem reads: (row, its slots in use before, ids, positions, slots, what each token sees)."
    found = []
    for row in rng.sample(range(problems + 2), problems):
        n, before = rng.randint(1, 5), rng.randint(0, 9)
        places = rng.sample(range(before, before + n), n)
        sees = torch.rand(n, before + n, generator=torch.Generator().manual_seed(rng.randrange(10 ** 6))) < .6
        sees[range(n), places] = True
        found.append((row, before, [rng.randrange(3, 90) for _ in range(n)], [rng.randrange(30) for _ in range(n)], places, sees))
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_pass_is_that_of_every_problem_alone(arch):
    "Random slots, positions and masks over a cache that is full of something: logits, and all that is written, row by row through the same cache."
    model, rng = tiny(arch, char), random.Random(arch)
    assert reads_by_rows(model)
    for _ in range(5):
        passes, one, other = random_pass(rng), FlatCache(6, 32), FlatCache(6, 32)
        with torch.no_grad():
            for cache in (one, other):   # something to see
                cache.aim(slice(6), torch.arange(14).repeat(6, 1), 14)
                ids = torch.arange(84).view(6, 14) + 3
                triangle = additive(torch.ones(14, 14).tril().bool())[None, None].repeat(6, 1, 1, 1)
                model(input_ids=ids, position_ids=torch.arange(14).repeat(6, 1), attention_mask=triangle, past_key_values=cache, use_cache=True)
            alone = []
            for row, _, ids, positions, slots, sees in passes:
                one.aim(torch.tensor([row]), torch.tensor([slots]), sees.shape[1])
                alone.append(model(input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]), attention_mask=additive(sees)[None, None],
                                   past_key_values=one, use_cache=True).logits[0])
            parts, at = [], 0
            for row, _, ids, *_, sees in passes:
                parts.append(Part(row, at, len(ids), sees.shape[1]))
                at += len(ids)
            mask = torch.zeros(len(passes), max(p.n for p in parts), max(p.used for p in parts), dtype=torch.bool)
            for i, (*_, sees) in enumerate(passes): mask[i, :len(sees), :sees.shape[1]] = sees
            flat = [torch.tensor([[x for p in passes for x in p[k]]]) for k in (2, 3, 4)]
            keep = torch.tensor(sorted(rng.sample(range(at), min(at, 3))))
            together = flat_pass(model, other, parts, *flat, additive(mask))
            assert torch.allclose(together, torch.cat(alone), atol=1e-4)
            assert torch.allclose(flat_pass(model, other, parts, *flat, additive(mask), keep), together[keep], atol=1e-5)
        for a, b in zip((*one.keys, *one.values), (*other.keys, *other.values)): assert torch.allclose(a, b, atol=1e-4)


def test_the_models_own_attention_comes_back():
    model = tiny("Qwen3", char)
    with pytest.raises(KeyError), by_rows(model):
        assert model.config._attn_implementation == "row_by_row"
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
    with by_rows(model), torch.no_grad(): inside = model(torch.arange(9)[None]).logits   # keys without a note
    with torch.no_grad(): assert torch.equal(inside, model(torch.arange(9)[None]).logits)


def test_who_cannot_is_found_out():
    "Another attention than sdpa; one that does not ask for its attention by name; one whose numbers differ."
    model = tiny("Qwen3", char)
    model.set_attn_implementation("eager")
    assert not reads_by_rows(model)
    shape = dict(vocab_size=150, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global"], 2]], max_position_embeddings=64)
    assert not reads_by_rows(transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**shape)).eval())
    sdpa = room.AttentionInterface()["sdpa"]
    forgets = lambda module, query, key, value, mask, **options: sdpa(module, query, key[:1], value[:1], mask[:1, :, :1], **options)
    room.AttentionInterface.register("row_by_row", forgets)
    try: assert not reads_by_rows(tiny("Llama", char))
    finally: room.AttentionInterface.register("row_by_row", room.row_attention)


def test_a_model_is_asked_once():
    model, calls = tiny("Qwen3", char), []
    handle = model.register_forward_pre_hook(lambda *a: calls.append(1))
    assert reads_by_rows(model) and (first := len(calls)) and reads_by_rows(model) and len(calls) == first
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_formats(dtype): assert reads_by_rows(tiny("Qwen3", char).to(dtype))


# ---- whole products

def attended(query, key, value, mask, scaling):
    "(P, N, H, D): query by query, head by head."
    out = torch.zeros(len(query), query.shape[2], query.shape[1], value.shape[3], dtype=query.dtype)
    for p, n, h in ((p, n, h) for p in range(len(query)) for n in range(query.shape[2]) for h in range(query.shape[1])):
        k = h // (query.shape[1] // key.shape[1])   # head h of queries has head k of keys
        weights = (key[p, k] @ query[p, h, n] * scaling + mask[p, 0, n]).softmax(0)
        out[p, n, h] = weights @ value[p, k]
    return out


@pytest.mark.parametrize("heads, groups", [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("scaling", [None, .3])
def test_whole_products_are_attention(heads, groups, scaling):
    g = torch.Generator().manual_seed(0)
    shapes = (heads, 5), (groups, 7), (groups, 7)
    query, key, value = (torch.randn(2, h, n, 8, generator=g, dtype=torch.float64, requires_grad=True) for h, n in shapes)
    sees = torch.rand(2, 1, 5, 7, generator=g) < .5
    sees[..., 0] = True
    mask = additive(sees)   # float32, as `collate` makes it
    out, weights = product_attention(None, query, key, value, mask, scaling=scaling)
    expected = attended(query, key, value, mask, scaling or 8 ** -.5)
    assert weights is None
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad((o * o).sum(), (query, key, value)) for o in (out, expected)]
    for a, b in zip(*grads): torch.testing.assert_close(a, b)


def test_what_products_do_not_do_is_left_to_sdpa(monkeypatch):
    "No mask, dropout, more weights than may be kept."
    asked, layer = [], tiny("Qwen3", char).model.layers[0].self_attn
    monkeypatch.setattr(room, "AttentionInterface", lambda: {"sdpa": lambda *args, **options: asked.append(options) or ("sdpa", None)})
    query, mask = torch.randn(1, 2, 3, 4), torch.zeros(1, 1, 3, 3)
    assert product_attention(layer, query, query, query, mask)[0].shape == (1, 3, 2, 4) and asked == []
    for options in (dict(attention_mask=None), dict(attention_mask=mask, dropout=.1)):
        assert product_attention(layer, query, query, query, **options)[0] == "sdpa"
    monkeypatch.setattr(room, "LARGEST_WEIGHTS", 17)   # 2 heads x 3 x 3
    assert product_attention(layer, query, query, query, mask, scaling=.5)[0] == "sdpa"
    assert [(o["dropout"], o["scaling"]) for o in asked] == [(0, None), (.1, None), (0, .5)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_model_says_the_same_by_products(arch):
    model = tiny(arch, char)
    ids, mask = torch.arange(24).view(2, 12) + 3, additive(torch.ones(2, 12, 12).tril().bool())[:, None]
    plain = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    with by_products(model, on=False): assert model.config._attn_implementation == "sdpa"
    with by_products(model):
        assert model.config._attn_implementation == "products"
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, plain, atol=1e-5, rtol=1e-5)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with by_products(model): assert model.config._attn_implementation == "eager"
