"""The span tree and its mask: against a hand-written matrix and a slow loop."""
import pytest
import torch
from helpers import rngs

from threadweaver_ref.draw import show_mask, show_tree, span_lanes
from threadweaver_ref.tree import SpanTree, tree_mask


def random_tree(rng, spans=12, tokens=8, merges=True):
    tree = SpanTree()
    for s in range(rng.randint(1, spans)):
        parents = rng.sample(range(s), min(s, 2 if merges and rng.random() < .25 else 1)) if s == 0 or rng.random() < .95 else []
        tree.add([rng.randrange(20, 118) for _ in range(rng.randint(1, tokens))], parents, bool(parents) and rng.random() < .7)
    return tree


# ---- against a matrix and indices written by hand

def tiny_tree():
    "Prompt a b; threads c d and e; a text join `E J` behind the first; a join with both as parents, K; an answer A."
    tree = SpanTree()
    prompt = tree.add([1, 2])
    one, two = tree.add([3, 4], [prompt], True), tree.add([5], [prompt], True)
    text = tree.add([5, 6], [one])
    tree.add([7], [one, two])
    tree.add([8], [text], True)
    return tree

#         a  b  c  d  e  E  J  K  A
BY_HAND = [[1, 0, 0, 0, 0, 0, 0, 0, 0],   # a
           [1, 1, 0, 0, 0, 0, 0, 0, 0],   # b
           [1, 1, 1, 0, 0, 0, 0, 0, 0],   # c
           [1, 1, 1, 1, 0, 0, 0, 0, 0],   # d
           [1, 1, 0, 0, 1, 0, 0, 0, 0],   # e
           [1, 1, 1, 1, 0, 1, 0, 0, 0],   # E
           [1, 1, 1, 1, 0, 1, 1, 0, 0],   # J
           [1, 1, 1, 1, 1, 0, 0, 1, 0],   # K
           [1, 1, 1, 1, 0, 1, 1, 0, 1]]   # A


def test_by_hand():
    packed = tiny_tree().pack()
    assert tree_mask(packed).int().tolist() == BY_HAND
    assert packed.input_ids.tolist() == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 2, 4, 5, 4, 6]
    assert packed.parent_index.tolist() == [-1, 0, 1, 2, 1, 3, 5, 3, 6]
    assert packed.span_ids.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 5]
    assert packed.sampled.int().tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 1]


def test_bad_spans():
    tree = SpanTree()
    with pytest.raises(ValueError, match="at least one token"): tree.add([])
    with pytest.raises(ValueError, match="parent 0 is not one of the 0 spans"): tree.add([1], [0])
    with pytest.raises(ValueError, match="nothing to pack"): tree.pack()


# ---- three masks

def slow_mask(tree):
    "From the definition, token by token: i sees i and whatever its parents see."
    first = [sum(map(len, tree.ids[:s])) for s in range(len(tree))]
    mask = torch.zeros(sum(map(len, tree.ids)), sum(map(len, tree.ids)), dtype=torch.bool)
    for s, ids in enumerate(tree.ids):
        for k in range(len(ids)):
            i = first[s] + k
            above = [i - 1] if k else [first[p] + len(tree.ids[p]) - 1 for p in tree.parents[s]]
            for j in above: mask[i] |= mask[j]
            mask[i, i] = True
    return mask


def test_mask_is_the_definition():
    for rng in rngs(40, "mask"):
        tree = random_tree(rng)
        assert (tree_mask(tree.pack()) == slow_mask(tree)).all()


def test_positions_are_depths():
    for rng in rngs(30, "depth"):
        tree = random_tree(rng, merges=False)
        packed = tree.pack()
        assert (tree_mask(packed).sum(1) - 1 == packed.position_ids).all()


def test_pictures():
    packed = tiny_tree().pack()
    assert show_tree(packed, token=3) and show_mask(packed)
    assert len(span_lanes(packed)) == 6 and span_lanes(packed)[1] != span_lanes(packed)[2]


# ---- equality

def test_equal_however_grown():
    for rng in rngs(30, "grown"):
        tree = random_tree(rng)
        number, new, left = {}, SpanTree(), set(range(len(tree)))
        ids = [[*ids, 1000 + s] for s, ids in enumerate(tree.ids)]   # siblings differ
        same = SpanTree()
        for s in range(len(tree)): same.add(ids[s], tree.parents[s], tree.sampled[s])
        while left:   # any span whose parents stand; siblings keep their order
            able = [s for s in left if set(tree.parents[s]) <= number.keys()
                    and not any(t in left and t < s and tree.parents[t] and set(tree.parents[t]) & set(tree.parents[s]) for t in left)
                    and (tree.parents[s] or not any(t in left and t < s and not tree.parents[t] for t in left))]
            s = rng.choice(able)
            left.remove(s)
            number[s] = new.add(ids[s], [number[p] for p in tree.parents[s]], tree.sampled[s])
        assert new == same and new.sorted() == same
    assert tiny_tree() != SpanTree() and tiny_tree() != "tree"
