"""The span tree and its mask: against a hand-written matrix and a slow loop."""
import pytest
import torch
from helpers import rngs

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


def above(tree):
    "For every token the tokens right above it, in the order of the parents."
    first = [sum(map(len, tree.ids[:s])) for s in range(len(tree) + 1)]
    return [[first[p + 1] - 1 for p in tree.parents[s]] if k == 0 else [first[s] + k - 1] for s, ids in enumerate(tree.ids) for k in range(len(ids))]


def test_positions_and_predictors_from_their_definitions():
    "pos(i) = 1 + max pos(parents); the furthest parent predicts, the first of several as far."
    for rng in rngs(60, "predictors"):
        tree = random_tree(rng, spans=16)
        packed, pos, predictor = tree.pack(), [], []
        for parents in above(tree):
            pos.append(1 + max((pos[p] for p in parents), default=-1))
            predictor.append(next((p for p in parents if pos[p] == pos[-1] - 1), -1))
        assert packed.position_ids.tolist() == pos and packed.parent_index.tolist() == predictor
        assert tree_mask(packed)[packed.parent_index >= 0, packed.parent_index[packed.parent_index >= 0]].all()   # it is seen, too


def test_a_path_is_what_a_span_sees():
    "Each ancestor once, parents before children; of several parents, the line of the first comes first."
    for rng in rngs(40, "path"):
        tree = random_tree(rng)
        for s in range(len(tree)):
            path = tree.path(s)
            assert sorted(path) == tree.ancestors[s].nonzero()[:, 0].tolist() and path[-1] == s
            assert all(path.index(p) < path.index(t) for t in path for p in tree.parents[t])
            assert tree.path_ids(s) == [i for t in path for i in tree.ids[t]]
    tree = tiny_tree()
    assert tree.path(4) == [0, 1, 2, 4] and tree.path(5, after=0) == [1, 3, 5] and tree.path_ids(4) == [1, 2, 3, 4, 5, 7]


def test_scored_keeps_what_a_sampled_token_sees():
    for rng in rngs(40, "scored"):
        tree = random_tree(rng)
        for s in range(len(tree)): tree.ids[s] = [*tree.ids[s], 1000 + s]   # so that spans can be told apart
        seen = {s for t in range(len(tree)) if tree.sampled[t] for s in tree.path(t)}
        assert [ids[-1] - 1000 for ids in tree.scored().ids] == sorted(seen)


def test_one_class():
    assert [c.__name__ for c in SpanTree.__mro__] == ["SpanTree", "object"] and SpanTree.__doc__


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
