"""Pictures: where things stand, what is labelled, what is in the legend, and that no text is too small to read."""
import warnings
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from helpers import random_forks, rngs

from threadweaver_ref import draw
from threadweaver_ref.course import example, random_tree
from threadweaver_ref.draw import (compare_schedules, draw_steps, draw_trajectory, live_plot, mask_explorer, show_log, show_mask, show_span_mask,
                                   show_timeline, show_tree, span_colors, timeline_html, timeline_player, token_labels)
from threadweaver_ref.format import CONTROL_TOKENS, Fork, Text, Thread, token_counts
from threadweaver_ref.layout import place_tokens, span_lanes, span_names, tag_style
from threadweaver_ref.tokenizer import char_tokenizer, encode_text
from threadweaver_ref.tree import SpanTree, tree_mask
from threadweaver_ref.widgets import branch_names

matplotlib.use("Agg")
TOKENIZER = char_tokenizer()


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def small_tree():
    "A prompt, two threads, a copy of the second behind the first."
    tree = SpanTree()
    prompt = tree.add(encode_text(TOKENIZER, "7?"))
    one, two = (tree.add(encode_text(TOKENIZER, f"{t}</Thread>"), [prompt], True) for t in ("a9;", "b7;"))
    tree.add(encode_text(TOKENIZER, "b7;"), [one])
    return tree


def rollout(*stretches, steps=20, total=30):
    "A rollout with these (branch, start, end, forced) intervals."
    made = [SimpleNamespace(branch=b, start=s, end=e, forced=f, ids=tuple(encode_text(TOKENIZER, "~" * (e - s + 1)))) for b, s, e, f in stretches]
    return SimpleNamespace(timeline=made, decode_steps=steps, total_tokens=total)


def texts(figure):
    "Every text of a figure that is drawn."
    with warnings.catch_warnings():
        warnings.simplefilter("error")   # a layout that does not fit warns
        figure.canvas.draw()
    return [t for t in figure.findobj(matplotlib.text.Text) if t.get_text().strip() and t.get_visible()]


# ---- where things stand

def length(text): return len(encode_text(TOKENIZER, text))


def test_columns_are_the_token_latency():
    for rng in rngs(40, "columns"):
        trajectory = random_forks(rng, 3, conclusions=True)
        cells, latency, rows = place_tokens(trajectory)
        assert (latency, len(cells)) == token_counts(trajectory, length)
        assert len({(c.x, c.row) for c in cells}) == len(cells) and max(c.row for c in cells) == rows - 1
        assert (cells[-1].token, cells[-1].x, cells[-1].row) == ("<eos>", latency - 1, 0)


def test_rows_of_threads():
    inner = Fork(["p", "q"], [Thread([Text("r")]), Thread([Text("s")])])
    cells, _, rows = place_tokens([Fork(["a", "b"], [Thread([inner]), Thread([Text("u")])]), Text("v")])
    assert {c.branch: c.row for c in cells} == {"main": 0, "1": 1, "1.1": 2, "1.2": 3, "2": 4} and rows == 5
    ends = {c.branch: c.x for c in cells}   # the last column of each
    assert next(c.x for c in cells if c.token == "</Parallel>" and c.row == 0) == 1 + max(ends[b] for b in ("1", "2"))


def test_lanes():
    packed = small_tree().pack()
    assert span_lanes(packed) == [0, 0, 1, 0]
    for rng in rngs(40, "lanes"):
        packed = random_tree(rng).pack()
        rows = span_lanes(packed)
        places = [(rows[s], x) for s, x in zip(packed.span_ids.tolist(), packed.position_ids.tolist())]
        assert len(set(places)) == len(places)   # no two tokens in one place


def test_a_tag_reads_as_no_letter_or_digit():
    assert not any(tag_style(t)[0].isalnum() for t in [*CONTROL_TOKENS, "<eos>"])
    assert all(tag_style(t) is None for t in ("O", "", "a", "<think>"))
    labels = [t.get_text() for t in draw_trajectory([Fork(["x", "y"], [Thread([]), Thread([])])]).texts]
    assert "".join(t for t in labels if t.isalnum()) == "1x2y12"


def test_span_names():
    assert span_names((), 2) == ["span 0", "span 1"] and span_names(("a", "b"), 2) == ["a", "b"]
    for show in (lambda names: show_mask(small_tree().pack(), names=names), lambda names: show_tree(small_tree().pack(), names=names),
                 lambda names: show_span_mask(small_tree(), names)):
        with pytest.raises(ValueError, match="2 names for 4 spans"): show(["a", "b"])


# ---- pictures

def pictures():
    "Every picture once, by name."
    packed = small_tree().pack()
    names = ["prompt", "thread 1", "thread 2", "join"]
    steps = [SimpleNamespace(name=n, needs=needs, outline=o) for n, needs, o in (("a", (), "a=7"), ("b", (), "b=2"), ("c", ("a", "b"), "c=a+b"))]
    turns = rollout(("main", 0, 4, 9), ("1", 4, 12, 3), ("2", 4, 9, 3), ("main", 12, 19, 8))
    return {"trajectory": draw_trajectory(example()), "concluding": draw_trajectory(example(conclude=True)), "tree": show_tree(packed, TOKENIZER),
            "named tree": show_tree(packed, names=names, token=3), "mask": show_mask(packed, TOKENIZER), "named mask": show_mask(packed, names=names),
            "positions": show_mask(packed, TOKENIZER, positions=True), "span mask": show_span_mask(small_tree(), names), "graph": draw_steps(steps),
            "timeline": show_timeline(turns), "schedules": compare_schedules({"one": example(fork=False), "two": example()})[0],
            "log": show_log([{"step": s, "accuracy": .5, "token_latency": 90.} for s in range(9)])[0]}


def test_no_text_is_too_small_and_no_picture_too_wide():
    for name, ax in pictures().items():
        found = texts(ax.figure)
        assert found and min(t.get_fontsize() for t in found) >= 7, name
        assert ax.figure.get_size_inches()[0] <= 9, name


def test_legends_and_axis_labels():
    for name, ax in pictures().items():
        assert name == "graph" or ax.get_legend() or ax.figure.legends, name
        assert name in ("graph", "schedules") or ax.get_xlabel(), name


def test_trajectory():
    ax = draw_trajectory(example())
    assert ax.get_xlim() == (0, 92) and [t.get_text() for t in ax.get_yticklabels()] == ["main", "thread 1", "thread 2"]
    assert "".join(t.get_text() for t in ax.texts if t.get_text() not in "▸◂■ ") .startswith("1:a=7+3x42:b=2+5x3")
    long = draw_trajectory([Text("x" * 300)])
    assert not long.texts and len(long.patches) == 301   # no room for letters


def test_schedules_share_a_clock():
    axes = compare_schedules({"one line": example(fork=False), "two threads": example()})
    assert axes[0].get_xlim() == axes[1].get_xlim() and axes[0].get_xlim()[1] >= 98
    assert [ax.get_title(loc="left") for ax in axes] == ["one line: token latency 98", "two threads: token latency 92"]


def test_mask_cells():
    packed = small_tree().pack()
    image = torch.as_tensor(show_mask(packed).images[0].get_array().data)
    assert ((image < 1).any(-1) == tree_mask(packed)).all()
    own = packed.span_ids[:, None] == packed.span_ids
    lone = torch.as_tensor(show_mask(packed, mask=torch.eye(len(packed), dtype=torch.bool)).images[0].get_array().data)
    assert ((lone < 1).any(-1) == torch.eye(len(packed), dtype=torch.bool)).all()
    darker = image.sum(-1) < span_colors(packed).sum(-1)[None] - .1
    assert (darker == (own & tree_mask(packed))).all()


def test_mask_labels():
    packed, names = small_tree().pack(), ["prompt", "thread 1", "thread 2", "join"]
    ax = show_mask(packed, TOKENIZER)
    assert [t.get_text() for t in ax.get_yticklabels()] == token_labels(packed, TOKENIZER)
    assert [t.get_color() == "black" for t in ax.get_yticklabels()] == packed.sampled.tolist()
    assert [t.get_text() for t in show_mask(packed, names=names).get_yticklabels()] == names
    tree = SpanTree()
    for size in (60, 80): tree.add([5] * size, [len(tree) - 1] if len(tree) else [])
    big = show_mask(tree.pack(), TOKENIZER, names=["prompt", "answer"])   # no room for 140 tokens
    assert [t.get_text() for t in big.get_yticklabels()] == ["prompt", "answer"]
    twice = show_mask(packed, names=["prompt", "thread", "thread", "join"])   # neighbours of one name share a label
    assert [t.get_text() for t in twice.get_xticklabels()] == ["prompt", "thread", "join"]


def test_span_mask_cells():
    tree = small_tree()
    for shown in (tree, tree.pack()):
        image = torch.as_tensor(show_span_mask(shown).images[0].get_array().data)
        assert ((image < 1).any(-1) == tree.ancestors).all()


def test_forced_tokens_are_hatched():
    packed = small_tree().pack()
    cells = show_tree(packed).patches
    assert [not c.get_hatch() for c in cells] == packed.sampled.tolist()
    faces = [c.get_facecolor()[:3] for c in show_tree(packed, token=len(packed) - 1).patches if c.get_fill()]
    white = [all(v == 1 for v in face) for face in faces[:len(packed)]]
    assert white == (~tree_mask(packed)[-1]).tolist()


def test_graph():
    steps = [SimpleNamespace(name="a", needs=(), outline="count"), SimpleNamespace(name="b", needs=("a",), outline=""),
             SimpleNamespace(name="c", needs=("a", "b", "x"), outline="c=a+b")]   # `x` is not a step
    ax = draw_steps(steps)
    assert {t.get_text(): t.get_position()[0] for t in ax.texts if t.get_text()} == {"count": 0, "b": 1, "c=a+b": 2}
    assert sum(not t.get_text() for t in ax.texts) == 3   # arrows
    assert [t.get_text() for t in draw_steps(steps, label=lambda s: s.name).texts if t.get_text()] == ["a", "b", "c"]


def test_timeline():
    turns = rollout(("main", 5, 9, 24), ("2", 9, 12, 0), ("1", 9, 14, 7), ("1.1", 14, 15, 1), ("main", 15, 19, 41))
    ax = show_timeline(turns)
    assert branch_names(turns) == ["main", "1", "1.1", "2"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["main", "thread 1", "thread 1.1", "thread 2"]
    assert [t.get_text() for t in ax.texts] == ["24", "7", "1", "41"]   # no mark where nothing was forced
    bars = [p for p in ax.patches if not p.get_hatch()]
    assert [(b.get_x(), b.get_width()) for b in bars] == [(0, 5), (4, 4), (4, 6), (9, 2), (10, 5)]


def test_log_panels():
    log = [{"step": s, "accuracy": .5, "regret": float(s)} for s in range(1, 9)]
    assert len(show_log(log)) == 1
    axes = show_log(log, panels=[("accuracy",), ("regret",), ("absent",)])
    assert [ax.get_ylabel() for ax in axes] == ["accuracy", "regret"]
    assert axes[1].lines[0].get_ydata().tolist() == [1, 1.5, 2, 2.5, 3, 4, 5, 6]   # means of up to five


def test_live_plot(monkeypatch):
    "One figure, drawn again every second step; none is left open."
    drawn, before = [], plt.get_fignums()
    monkeypatch.setattr("IPython.display.display", lambda **_: SimpleNamespace(update=drawn.append))
    on_step = live_plot(every=2)
    for step in range(1, 5): on_step(step, {"step": step, "accuracy": .5, "fork_rate": .5, "loss": None, "token_latency": 9.0})
    assert len(drawn) == 2 and [len(ax.lines[0].get_xdata()) for ax in drawn[1].axes] == [4, 4, 4] and plt.get_fignums() == before


# ---- widgets

def test_mask_explorer():
    packed = small_tree().pack()
    title, grid = mask_explorer(packed, TOKENIZER, token=2).children
    assert "<b>a</b> at position 2 sees 3 of" in title.value
    grid.children[6].click()   # thread 2's first token
    shown = [cell.style.button_color != "white" for cell in grid.children]
    assert shown == tree_mask(packed)[6].tolist() and grid.children[6].layout.border_top == "2px solid black"


def test_player():
    turns = rollout(("main", 3, 5, 2), ("1", 5, 7, 1), steps=5)
    player = timeline_player(turns, TOKENIZER)
    controls, table = player.children
    controls.children[1].value = 3
    assert table.value == timeline_html(turns, TOKENIZER, 3)
    assert timeline_html(turns, TOKENIZER, 0).count("~") == 1 and timeline_html(turns, TOKENIZER, 3).count("~") == 3 + 2
    assert timeline_html(turns, TOKENIZER, 0).count("#cfe8cf") == 1


def test_every_plot_can_be_imported_from_draw():
    for name in ("token_labels", "span_colors", "mask_explorer", "timeline_html", "timeline_player", "show_log", "live_plot"):
        assert name in draw.__all__ and hasattr(draw, name)
