"""Choosing a token: against the definitions, one row and one number at a time."""
import pytest
import torch
from helpers import rngs

from threadweaver_ref.sampling import choose, default_seeds, filter_logits, stream_key, uniforms

SAMPLING = [dict(), dict(top_p=.8), dict(top_k=5), dict(temperature=.7, top_p=.95, top_k=20)]


def slow_filter(row, temperature, top_k, top_p):
    "By the definition, one row of numbers at a time."
    row = row.double() / temperature
    kept = set(range(len(row)))
    if top_k: kept = {i for i in kept if sum(x > row[i] for x in row) < top_k}
    if top_p < 1:
        p = {i: row[i].exp().item() for i in kept}
        total, mass, chosen = sum(p.values()), 0., set()
        for i in sorted(p, key=p.get, reverse=True):
            if mass / total >= top_p: break
            chosen.add(i)
            mass += p[i]
        kept = chosen
    return kept


def test_filter_logits():
    for rng in rngs(60, "filter"):
        logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(rng.randrange(10 ** 6))) * 2
        t, k, p = rng.choice([.3, 1., 2.]), rng.choice([0, 1, 3, 12, 50]), rng.choice([1., .95, .6, .1, 1e-6])
        for row, out in zip(logits, filter_logits(logits, t, k, p), strict=True):
            kept = slow_filter(row, t, k, p)
            assert {i for i in range(12) if out[i] > -torch.inf} == kept and kept
            assert all(torch.isclose(out[i], row[i] / t) for i in kept)


def test_a_nucleus_that_has_just_enough_takes_no_more():
    assert filter_logits(torch.zeros(1, 4), top_p=.5).isfinite().sum() == 2 and filter_logits(torch.zeros(1, 4), top_p=.51).isfinite().sum() == 3


def test_uniforms_are_uniform():
    keys, steps = torch.arange(1, 513) * 1_000_003, torch.arange(200)
    u = uniforms(keys.repeat_interleave(200), steps.repeat(512)).view(512, 200)
    assert 0 <= u.min() and u.max() < 1 and len(u.unique()) == u.numel()
    for x in (.01, .25, .5, .75, .99): assert abs((u < x).double().mean() - x) < 4 * (x * (1 - x) / u.numel()) ** .5
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])): assert abs(torch.stack([a.flatten(), b.flatten()]).corrcoef()[0, 1]) < .015


def test_uniforms_do_not_depend_on_the_batch():
    keys, steps = torch.tensor([3, 99, 2 ** 61]), torch.tensor([0, 7, 7])
    for i in range(3): assert uniforms(keys, steps)[i] == uniforms(keys[i:i + 1], steps[i:i + 1])


@pytest.mark.parametrize("level", [0., 1 - 2 ** -40])
def test_what_was_left_out_is_never_drawn(level):
    "At either end of the cumulative distribution."
    logits = torch.tensor([[-torch.inf, 0., -torch.inf, 1., -torch.inf]])
    assert choose(logits, torch.tensor([level], dtype=torch.float64), temperature=1.).tolist() == [1 if level == 0 else 3]


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_frequencies(options):
    n, options = 40_000, {"temperature": 1., **options}
    logits = torch.tensor([2., 1.5, 1., 0., 0., -1., -2., -4.])
    drawn = choose(logits.expand(n, -1), uniforms(torch.arange(n) * 7_777_777 + 1, torch.arange(n) % 31), **options)
    p = filter_logits(logits[None], **options)[0].softmax(-1)
    counts = torch.bincount(drawn, minlength=8)
    assert (counts[p == 0] == 0).all()
    some = p > 0
    chi2 = ((counts[some] - n * p[some]) ** 2 / (n * p[some])).sum()
    assert chi2 < 30     # at most 7 degrees of freedom: one run in 10,000 is above 30


def test_greedy_takes_the_likeliest():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose(logits), logits.argmax(-1))
    levels = uniforms(torch.arange(5), torch.arange(5))
    for options in (dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-3)):
        assert torch.equal(choose(logits, levels, **{"temperature": 1., **options}), logits.argmax(-1))


def test_a_token_is_where_its_number_falls():
    "Against a running sum, one number at a time."
    rows = torch.randn(200, 9, generator=torch.Generator().manual_seed(1))
    levels = uniforms(torch.arange(200), torch.arange(200))
    def slow(p, u):
        total = 0.
        for v, mass in enumerate(p):
            total += mass
            if total > u: return v
    expected = [slow(row.softmax(-1).double().tolist(), u) for row, u in zip(rows, levels.tolist(), strict=True)]
    assert choose(rows, levels, temperature=1.).tolist() == expected and len(set(expected)) == 9


def test_a_stream_belongs_to_seed_and_path():
    seeds, paths = (0, "0", (0, "1+1?", 0), (0, "1+1?", 1)), ((), ((1, 1),), ((1, 2),), ((2, 1),), ((1, 1), (1, 1)))
    keys = {stream_key(s, p) for s in seeds for p in paths}
    assert len(keys) == len(seeds) * len(paths) and all(0 <= k < 2 ** 62 for k in keys)
    # pinned: rollouts of earlier versions can be drawn again
    assert stream_key((0, "1+1?", 0), ((1, 2),)) == 2484729192234318056


def test_copies_of_a_question_have_seeds_of_their_own():
    assert default_seeds(3, ["a", "b", "a"]) == [(3, "a", 0), (3, "b", 0), (3, "a", 1)]
