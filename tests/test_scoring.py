"""Scores on the tree: against runs of every unit alone, a mask written out token by token, and dense attention."""
import copy
from collections import Counter

import pytest
import torch
import transformers
from helpers import ARCHITECTURES, TOKENIZERS, alone, random_forks, random_text, rngs, thread_paths, tiny
from test_tree import random_tree, slow_mask
from torch.nn.attention.flex_attention import flex_attention

from threadweaver_ref.format import Fork, Text
from threadweaver_ref.joins import JOINS
from threadweaver_ref.replay import play, replay, units
from threadweaver_ref.scoring import block_kinds, collate, collate_blocks, forest, tree_block_mask, tree_logprobs
from threadweaver_ref.tokenizer import encode_prompt, encode_text
from threadweaver_ref.tree import SpanTree, tree_mask

# ---- packed = unpacked (invariant 1) and independence (invariant 5)

@pytest.fixture(scope="module", params=[(a, t) for a in ARCHITECTURES for t in TOKENIZERS], ids=lambda p: "-".join(p))
def setting(request):
    arch, name = request.param
    tokenizer = TOKENIZERS[name]()
    return tiny(arch, tokenizer), tokenizer, "-".join(request.param)


def spans_of(logprobs, packed):
    "Split the log-probabilities of one tree by span: {span: tensor}."
    owner = packed.span_ids[packed.sampled]
    return {s: logprobs[owner == s] for s in owner.unique().tolist()}


def batched(model, trees, size=7):
    "Per tree {span: log-probabilities}, several trees in a padded batch."
    out = []
    packs = [t.pack() for t in trees]
    for i in range(0, len(packs), size):
        group = packs[i:i + size]
        with torch.no_grad(): logprobs = tree_logprobs(model, collate(group))
        out += [spans_of(part, p) for part, p in zip(logprobs.split([int(p.sampled.sum()) for p in group]), group, strict=True)]
    return out


def check_packed(model, tokenizer, made, join, tolerance=1e-4):
    "Every unit of each (trajectory, prompt) scored on the packed tree, and alone."
    trees = [replay(t, prompt, tokenizer, join) for t, prompt in made]
    for (trajectory, prompt), tree, packed in zip(made, trees, batched(model, trees), strict=True):
        expected = {(tuple(c), tuple(w)): alone(model, c, w) for c, w in units(trajectory, prompt, tokenizer, join)}
        found = {(tuple(tree.path_ids(tree.parents[s][0])), tuple(tree.ids[s])): p for s, p in packed.items()}
        assert found.keys() == expected.keys()
        for unit, p in found.items(): assert torch.allclose(p, expected[unit], atol=tolerance)


@pytest.mark.parametrize("join", ["concat", "result"])
def test_packed_is_unpacked(setting, join):
    model, tokenizer, name = setting
    made = [(random_forks(rng, 3, conclusions=join == "result"), encode_prompt(tokenizer, random_text(rng))) for rng in rngs(21, name)]
    check_packed(model, tokenizer, made, join)


class ByHand:
    "The join `kv`, token by token: for each token its id, position, what it sees, what predicts it, and whether it was sampled."
    def __init__(self, tokenizer, prompt, trajectory):
        self.tokenizer, self.tokens = tokenizer, []
        self.line(trajectory, self.write(prompt, (frozenset(), 0, None), False), [tokenizer.eos_token_id])

    def write(self, ids, state, sampled):
        seen, position, last = state
        for i in ids:
            seen = seen | {len(self.tokens)}
            self.tokens.append((i, position, seen, last, sampled))
            position, last = position + 1, len(self.tokens) - 1
        return seen, position, last

    def encode(self, text): return encode_text(self.tokenizer, text)

    def line(self, nodes, state, end):
        for node in nodes:
            if isinstance(node, Text):
                state = self.write(self.encode(node.text), state, True)
                continue
            lines = "".join(f"<Outline>{i}:{o}</Outline>" for i, o in enumerate(node.outlines, 1))
            state = self.write(self.encode(f"<Parallel><Outlines>{lines}</Outlines>"), state, True)
            ends = []
            for i, thread in enumerate(node.threads, 1):
                said = "" if thread.conclusion is None else f"<Conclusion>{thread.conclusion}</Conclusion>"
                ends.append(self.line(thread.body, self.write(self.encode(f"<Thread>{i}:"), state, False), self.encode(said + "</Thread>")))
            longest = max(ends, key=lambda e: e[1])
            state = self.write(self.encode("</Parallel>"), (frozenset().union(*(e[0] for e in ends)), *longest[1:]), False)
        return self.write(end, state, True)

    def logprobs(self, model):
        n = len(self.tokens)
        ids, positions, seen, last, sampled = zip(*self.tokens, strict=True)
        mask = torch.full((1, 1, n, n), torch.finfo(torch.float32).min)
        for row, columns in enumerate(seen): mask[0, 0, row, list(columns)] = 0
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]), attention_mask=mask, use_cache=False).logits[0]
        return [(i, float(logits[p].log_softmax(-1)[i])) for i, p, s in zip(ids, last, sampled, strict=True) if s]


def test_kv_is_its_mask_written_out_by_hand(setting):
    model, tokenizer, name = setting
    for rng in rngs(20, "kv" + name):
        trajectory, prompt = random_forks(rng, 3, conclusions=True), encode_prompt(tokenizer, random_text(rng))
        packed = replay(trajectory, prompt, tokenizer, "kv").pack()
        with torch.no_grad(): found = tree_logprobs(model, collate([packed]))
        expected = ByHand(tokenizer, prompt, trajectory).logprobs(model)
        assert [i for i, _ in expected] == packed.input_ids[packed.sampled].tolist()
        assert torch.allclose(found, torch.tensor([p for _, p in expected]), atol=1e-4)


def played(trajectory, prompt, tokenizer, rng, join="concat"):
    "Play in random order: the tree, and the sampled spans of every path in the order in which it wrote them."
    owners = []
    for machine, branch, ids in play(trajectory, prompt, tokenizer, join, rng=rng):
        owners.append((branch.path, len(machine.tree), ids))
    spans = {}
    for path, span, ids in owners:
        assert machine.tree.ids[span] == ids
        spans.setdefault(path, []).append(span)
    return machine.tree, spans


def body_at(trajectory, path):
    "The nodes of the thread at `path`, ((fork, thread), ...)."
    for fork, i in path: trajectory = [n for n in trajectory if isinstance(n, Fork)][fork - 1].threads[i - 1].body
    return trajectory


def change(trajectory, path):
    "The same trajectory, but one thread begins differently."
    trajectory = copy.deepcopy(trajectory)
    body = body_at(trajectory, path)
    if body and isinstance(body[0], Text): body[0] = Text("#7" + body[0].text)
    else: body.insert(0, Text("#7"))
    return trajectory


@pytest.mark.parametrize("join", JOINS)
def test_siblings_are_independent(setting, join):
    model, tokenizer, name = setting
    made = [(random_forks(rng, 3), encode_prompt(tokenizer, random_text(rng)), rng) for rng in rngs(20, "siblings" + name)]
    check_siblings(model, tokenizer, made, join)


def check_siblings(model, tokenizer, made, join, tolerance=1e-5):
    "In each (trajectory, prompt, rng) one thread is changed: its siblings score as before."
    cases = []
    for trajectory, prompt, rng in made:
        path = rng.choice(list(thread_paths(trajectory)))
        cases.append((path, *(played(t, prompt, tokenizer, rng, join) for t in (trajectory, change(trajectory, path)))))
    before = batched(model, [old[0] for _, old, _ in cases])
    after = batched(model, [new[0] for _, _, new in cases])
    for (path, old, new), a, b in zip(cases, before, after, strict=True):
        probs = lambda case, p, q: [p[s] for s in case[1][q]]
        (fork, thread), above = path[-1], path[:-1]
        siblings = [q for q in old[1] if q[:len(above)] == above and len(q) > len(above) and q[len(above)][0] == fork
                    and q[len(above)][1] != thread]
        assert siblings
        for q in siblings:
            for x, y in zip(probs(old, a, q), probs(new, b, q), strict=True): assert torch.allclose(x, y, atol=tolerance)
        parent = list(zip(probs(old, a, above), probs(new, b, above), strict=True))
        for x, y in parent[:fork]: assert torch.allclose(x, y, atol=tolerance)   # before the fork
        for x, y in parent[fork:]:                                         # after its join: changed, but for `result`, which saw no conclusion
            assert torch.allclose(x, y, atol=tolerance) if join == "result" else (x - y).abs().max() > 1e-4


# ---- what is scored

def test_each_generated_token_once():
    for rng in rngs(20, "once"):
        for tokenizer in (TOKENIZERS["char"](), TOKENIZERS["bpe"]()):
            trajectory, prompt = random_forks(rng, conclusions=True), encode_prompt(tokenizer, "7?")
            tree = replay(trajectory, prompt, tokenizer)
            sampled = Counter(tuple(ids) for ids, s in zip(tree.ids, tree.sampled, strict=True) if s)
            assert sampled == Counter(tuple(w) for _, w in units(trajectory, prompt, tokenizer))


def test_padding_and_forest_change_nothing():
    tokenizer = TOKENIZERS["char"]()
    model = tiny("Qwen3", tokenizer)
    packs = [random_tree(rng, merges=False).pack() for rng in rngs(6, "pad")]
    with torch.no_grad():
        apart = torch.cat([tree_logprobs(model, collate([p])) for p in packs])
        assert torch.allclose(tree_logprobs(model, collate(packs)), apart, atol=1e-5)
        assert torch.allclose(tree_logprobs(model, collate([forest(packs)])), apart, atol=1e-5)
    blocks = collate_blocks(packs, block=16)
    i = torch.arange(sum(map(len, packs)))
    assert (blocks["attention_mask"].mask_mod(0, 0, i[:, None], i[None]) == tree_mask(forest(packs))).all()
    assert blocks["input_ids"].shape == (1, len(i))


def test_nothing_predicts_a_root():
    tokenizer, tree = TOKENIZERS["char"](), SpanTree()
    tree.add([20, 21], sampled=True)
    with pytest.raises(ValueError, match="nothing predicts it"): tree_logprobs(tiny("Qwen3", tokenizer), collate([tree.pack()]))


@pytest.mark.parametrize("arch", ["Mistral", "Gemma3Text"])
def test_longer_than_a_sliding_window_is_refused(arch):
    "The tree mask would let a token see further back than the model's own attention does."
    tokenizer = TOKENIZERS["char"]()
    config = getattr(transformers, f"{arch}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=64,
        vocab_size=len(tokenizer), sliding_window=8, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    pack = lambda text: collate([replay([Text(text)], encode_prompt(tokenizer, "7?"), tokenizer).pack()])
    with pytest.raises(ValueError, match="sliding window .* of 8 tokens"): tree_logprobs(model, pack("123456789"))
    assert len(tree_logprobs(model, pack("12"))) == 3


# ---- blocks

@pytest.mark.parametrize("block", [2, 3, 16, 128])
def test_blocks_are_the_dense_mask(block):
    for rng in rngs(40, "mask"):
        tree = random_tree(rng)
        packed, slow, n = tree.pack(), slow_mask(tree), sum(map(len, tree.ids))
        blocks, i = tree_block_mask(packed, block), torch.arange(n)
        assert (blocks.mask_mod(0, 0, i[:, None], i[None]) == slow).all()
        cells = torch.nn.functional.pad(slow, (0, -n % block, 0, -n % block)).view(-(-n // block), block, -(-n // block), block)
        seen, whole = cells.any(3).any(1), cells.all(3).all(1)
        assert (block_kinds(blocks) == seen.long() + whole.long()).all()
        assert blocks.shape[-2:] == (n, n)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_equals_dense():
    for rng in rngs(5, "flex"):
        packed = random_tree(rng, spans=10, tokens=60).pack()
        q, k, v = torch.randn(3, 1, 2, len(packed), 16, generator=torch.Generator().manual_seed(0))
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=tree_mask(packed))
        assert torch.allclose(flex_attention(q, k, v, block_mask=tree_block_mask(packed)), dense, atol=1e-5)
