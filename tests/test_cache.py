"""The flat cache, the book of slots, the lanes: against loops and a tree climbed token by token."""
import random

import pytest
import torch
from helpers import rngs

from threadweaver_ref.cache import FlatCache, Lanes, SlotBook
from threadweaver_ref.course import random_tree
from threadweaver_ref.tree import SpanTree

# ---- keys in any slot

def test_cache_grows_and_moves():
    cache, where = FlatCache(2, 4), torch.tensor([[0, 1], [1, 0]])
    k = torch.arange(2 * 3 * 2 * 5.).reshape(2, 3, 2, 5)         # (r, H, q, D)
    cache.aim(slice(2), where, 2)
    keys, values = cache.update(k, -k, 0)
    assert keys.shape == (2, 3, 2, 5) and torch.equal(keys[0], k[0]) and torch.equal(keys[1], k[1].flip(1)) and torch.equal(values, -keys)
    cache.grow(16)
    cache.aim(torch.tensor([1]), torch.tensor([[9]]), 10)
    grown, _ = cache.update(k[:1, :, :1] + 100, k[:1, :, :1], 0)
    assert grown.shape == (1, 3, 10, 5) and torch.equal(grown[0, :, :2], k[1].flip(1)) and torch.equal(grown[0, :, 9], k[0, :, 0] + 100)
    first, second = cache.keys[0][0, :, :10].clone(), cache.keys[0][1, :, :10].clone()
    assert not torch.equal(first, second)
    cache.move(1, 0, 10)
    assert torch.equal(cache.keys[0][0], cache.keys[0][1]) and torch.equal(cache.keys[0][0, :, :10], second) and cache.get_seq_length() == 10


@pytest.mark.parametrize("rows", [slice(4), torch.tensor([2, 0]), torch.tensor([3])], ids=str)
def test_new_keys_go_where_they_are_told(rows):
    "Token by token; rows, heads and layers are kept apart, and nothing else changes. Latent attention: values of another shape."
    at, H, S, N = torch.arange(4)[rows].tolist(), 3, 9, 4
    torch.manual_seed(0)
    cache, expected = FlatCache(4, S), {}
    for layer in range(2):
        for _ in range(3):
            where = torch.stack([torch.randperm(S)[:N] for _ in at])
            k, v = torch.randn(len(at), H, N, 5), torch.randn(len(at), 1, N, 7)
            cache.aim(rows, where, S)
            keys, values = cache.update(k, v, layer)
            for p, row in enumerate(at):
                for n in range(N): expected[layer, row, int(where[p, n])] = k[p, :, n], v[p, :, n]
            for (i, row, s), (key, value) in expected.items():
                assert torch.equal(cache.keys[i][row, :, s], key) and torch.equal(cache.values[i][row, :, s], value)
            assert torch.equal(keys, cache.keys[layer][at]) and torch.equal(values, cache.values[layer][at])
    written = torch.zeros(2, 4, S, dtype=torch.bool)
    for key in expected: written[key] = True
    for layer in range(2): assert not cache.keys[layer].transpose(1, 2)[~written[layer]].any()
    assert cache.nbytes == 4 * 2 * 4 * S * (H * 5 + 7)


# ---- the book of slots

def fill(tree, rng):
    "A book in which the spans of a tree lie in slots drawn at random, their tokens entered a few at a time."
    book, order = SlotBook(), list(range(sum(map(len, tree.ids))))
    rng.shuffle(order)
    book.take(len(order))
    for s, ids in enumerate(tree.ids):
        left = len(ids)
        while left:
            n = rng.randint(1, left)
            book.keep(s, [order.pop() for _ in range(n)])
            left -= n
    return book


@pytest.mark.parametrize("rng", rngs(15, "book"), ids=range(15))
def test_a_token_sees_the_slots_of_its_ancestors(rng):
    tree = random_tree(rng, spans=rng.randint(2, 20), tokens=rng.randint(1, 9))
    book = fill(tree, rng)
    for s in range(len(tree)):
        above = {j for t in tree.path(s) if t != s for j in book.slots[t]}
        mask = book.mask(torch.full((len(tree.ids[s]),), s), torch.tensor(book.slots[s]), tree.ancestors)
        for place, row in enumerate(mask): assert set(row.nonzero()[:, 0].tolist()) == above | set(book.slots[s][:place + 1])
        assert set(book.sees(torch.tensor([s]), tree.ancestors)[0].nonzero()[:, 0].tolist()) == above | set(book.slots[s])


@pytest.mark.parametrize("rng", rngs(15, "release"), ids=range(15))
def test_slots_are_given_back_and_used_again(rng):
    "No slot is held twice, none is lost; what is missing is what a wanted span has and the book lacks."
    tree, book = random_tree(rng, spans=12), SlotBook()
    for s, ids in enumerate(tree.ids):
        some = rng.randint(0, len(ids))
        if some: book.keep(s, book.take(some))
    wanted = torch.tensor([rng.random() < .5 for _ in tree.ids])
    missing = dict(book.missing(wanted, tree))
    assert missing == {s: len(book.slots.get(s, [])) for s in range(12) if wanted[s] and len(book.slots.get(s, [])) < len(tree.ids[s])}
    book.release(wanted)
    assert {s for s in range(12) if s in book.slots} <= set(wanted.nonzero()[:, 0].tolist())
    used, free = book.used, len(book.free)
    taken = book.take(free + 100)
    held = [j for slots in book.slots.values() for j in slots]
    assert book.used == used + 100 and not book.free and sorted(taken + held) == list(range(book.used))
    assert (book.span_of[taken] == -1).all()


def test_a_slot_in_no_span_is_seen_by_nobody():
    tree, book = SpanTree(), SlotBook()
    tree.add([1], [tree.add([1, 2])])
    book.keep(0, book.take(2))
    book.take(3)   # a branch is writing there
    book.keep(1, book.take(1))
    assert book.sees(torch.tensor([0, 1]), tree.ancestors).int().tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1]]


# ---- lanes

def test_lanes_open_close_grow_and_move():
    "Against a dictionary of sets."
    rng, lanes, truth = random.Random(0), Lanes(3, 8, torch.float32, "cpu"), {}
    lanes.grow(2, 16)
    for _ in range(60):
        row, lane = rng.randrange(3), rng.randrange(2)
        kind = rng.choice(["open", "close", "move"])
        if kind == "open":
            seen = torch.rand(rng.randint(1, 16)) < .5
            lanes.open(row, lane, seen)
            truth[row, lane] = set(seen.nonzero()[:, 0].tolist())
        elif kind == "close":
            lanes.close(row, lane, 1)
            truth[row, lane] = truth.get((row, 1), set())
        else:
            lanes.move(row, (row + 1) % 3)
            for k in range(2): truth[(row + 1) % 3, k] = truth.get((row, k), set())
        assert all(set((lanes.mask[r, k] == 0).nonzero()[:, 0].tolist()) == truth.get((r, k), set()) for r in range(3) for k in range(2))
    assert set(lanes.mask.unique().tolist()) == {0., torch.finfo(torch.float32).min}
