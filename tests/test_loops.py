"""Loops of a grid: as many, as long as said, each its own; training draws from all sizes, and from the training split alone."""
import random

import pytest

from threadweaver_ref.domains import Sequential, WheneverReady, draw_split, families_of, grade, split_of
from threadweaver_ref.format import render
from threadweaver_ref.loops import GRID, LENGTHS, PARTS, broad, loops_problem, turns_of
from threadweaver_ref.programs import MANY_NAMES, parse


def test_a_family_is_a_point_of_the_grid():
    assert families_of("loops") == [f"{k} of {n}" for k in PARTS for n in LENGTHS]
    assert (min(PARTS), max(PARTS), LENGTHS[0], LENGTHS[-1]) == (1, 32, 20, 500)
    for family, (k, n) in GRID.items():
        p, = draw_split("loops", "dev", 1, family)
        assert p.family == family and len(p.steps) == k and not any(s.needs for s in p.steps) and split_of(p.question) == "dev"
        assert all(abs(len(s.text) - n) <= max(5, .02 * n) for s in p.steps)
        assert p == parse(p.question, family) and grade(render(WheneverReady().arrange(p)), p) and grade(render(Sequential().arrange(p)), p)


def test_there_are_problems_enough_even_of_one_short_loop():
    for split in ("dev", "test"): assert len({p.question for p in draw_split("loops", split, 25, "1 of 20")}) == 25


def test_turns_by_hand():
    assert len("a=7+3x2: 2)7+3=0 1)0+3=3 a3;") == 28 and turns_of(28) == 2 and turns_of(23) == 1 and turns_of(25) == 2 and turns_of(10 ** 6) == 99


@pytest.mark.parametrize("parts", [1, 25, 32, 50])
def test_names_are_of_any_place_and_in_order(parts):
    drawn = {"".join(s.name for s in loops_problem(random.Random(i), parts, 1).steps) for i in range(60)}
    assert all(len(names) == parts and names in MANY_NAMES for names in drawn) and (len(drawn) > 5 or parts == 50)


def test_training_sees_all_sizes_and_no_held_out_question():
    rng = random.Random(0)
    drawn = [broad(rng, parts=32, turns=57, most=7000) for _ in range(400)]
    sizes = {(len(p.steps), p.steps[0].work.count(")")) for p in drawn}
    assert {k for k, _ in sizes} == set(range(1, 33)) and min(t for _, t in sizes) == 1 and max(t for _, t in sizes) > 50
    assert all(split_of(p.question) == "train" for p in drawn) and max(sum(len(s.text) for s in p.steps) for p in drawn) <= 7000
    assert max(sum(len(s.text) for s in broad(rng, parts=4, turns=10, most=200).steps) for _ in range(50)) <= 250
