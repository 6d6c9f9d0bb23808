"""The three joins: on a tree written by hand, on random trees, and against the rendered text."""

import pytest
from helpers import TOKENIZERS, random_forks, rngs

from threadweaver_ref.course import random_tree
from threadweaver_ref.format import Text, render, render_outlines
from threadweaver_ref.joins import JOINS, KV, Concat, Result, conclusion_at, get_join
from threadweaver_ref.tokenizer import control_ids, encode_text
from threadweaver_ref.tree import SpanTree, tree_mask

END, SAY, SAID, CLOSE = 90, 91, 92, 93
CONTROL = {"</Parallel>": END, "<Conclusion>": SAY, "</Conclusion>": SAID, "</Thread>": CLOSE, "<Parallel>": 94}


def forked(*threads):
    "A prompt, a fork, and threads of one seed (80, 81, ...) and one sampled span each."
    tree = SpanTree()
    fork = tree.add([3, 4], [tree.add([1, 2])], True)
    seeds = [tree.add([80 + i], [fork]) for i in range(len(threads))]
    return tree, fork, [tree.add(ids, [s], True) for s, ids in zip(seeds, threads)]


# ---- by hand

def test_concat_by_hand():
    tree, fork, ends = forked([10, CLOSE], [20, 21, CLOSE], [30, CLOSE])
    span = Concat()(tree, fork, ends, CONTROL)
    assert tree.ids[span] == [81, 20, 21, CLOSE, 82, 30, CLOSE, END] and tree.parents[span] == (ends[0],) and not tree.sampled[span]
    assert tree.path_ids(span) == [1, 2, 3, 4, 80, 10, CLOSE, 81, 20, 21, CLOSE, 82, 30, CLOSE, END]
    assert tree.start[span] == 7


def test_result_by_hand():
    tree, fork, ends = forked([10, SAY, 11, SAID, CLOSE], [20, CLOSE], [30, SAY, SAID, CLOSE])
    span = Result()(tree, fork, ends, CONTROL)
    assert tree.ids[span] == [SAY, 11, SAID, SAY, SAID, SAY, SAID, END] and tree.parents[span] == (fork,) and not tree.sampled[span]
    assert tree.start[span] == 4 and not tree.ancestors[span][ends].any()


def test_kv_by_hand():
    tree, fork, ends = forked([10, CLOSE], [20, 21, CLOSE], [30, CLOSE])
    span = KV()(tree, fork, ends, CONTROL)
    packed = tree.pack()
    assert tree.ids[span] == [END] and tree.parents[span] == tuple(ends) and not tree.sampled[span]
    assert tree.start[span] == 8                                          # behind the longest thread
    assert int(packed.parent_index[-1]) == packed.input_ids.tolist().index(21) + 1   # whose end stands before it
    assert tree_mask(packed)[-1].all()


@pytest.mark.parametrize("ids, at", [
    ([], 0), ([10], 1), ([10, SAY, 11, SAID], 1), ([SAY, SAID], 0), ([10, SAY, 11], 3), ([10, SAY, 11, SAID, 12], 5),
    ([SAY, 10, SAID, END, 11], 5),                  # an inner thread's conclusion is not this one's
    ([SAY, 10, SAID, END, SAY, 11, SAID], 4),       # the one behind the last join is
    ([SAY, 10, SAY, 11, SAID], 5), ([10, SAID], 2), ([SAY, 10, SAID, SAY, 11, SAID], 6),   # two: none
])
def test_conclusion_at(ids, at):
    assert conclusion_at(ids, CONTROL) == at


# ---- on random trees

def cases(name):
    "Random trees whose root forks; the leaves are the threads' ends."
    for rng in rngs(40, name):
        tree = random_tree(rng, spans=rng.randint(3, 14), vocab=80, merges=False)
        yield tree, 0, [s for s in range(len(tree)) if not any(s in parents for parents in tree.parents)]


@pytest.mark.parametrize("name", JOINS)
def test_a_join_adds_one_forced_span(name):
    for tree, fork, ends in cases(name):
        before = tree.keep(range(len(tree)))
        span = get_join(name)(tree, fork, ends, CONTROL)
        assert span == len(before) == len(tree) - 1 and tree.ids[span][-1] == END and not tree.sampled[span]
        assert tree.keep(range(span)) == before


def test_what_the_line_sees():
    "`concat` sees the first thread and copies; `result` none; `kv` all, and as much as `concat` where threads share nothing but the fork."
    for tree, fork, ends in cases("sees"):
        grown = {name: tree.keep(range(len(tree))) for name in JOINS}
        spans = {name: get_join(name)(t, fork, ends, CONTROL) for name, t in grown.items()}
        assert [bool(grown["concat"].ancestors[spans["concat"], e]) for e in ends] == [True] + [False] * (len(ends) - 1)
        assert not grown["result"].ancestors[spans["result"]][ends].any() and grown["kv"].ancestors[spans["kv"]][ends].all()
        assert grown["kv"].start[spans["kv"]] == max(map(tree.end, ends))
        assert grown["concat"].start[spans["concat"]] == tree.end(ends[0]) and grown["result"].start[spans["result"]] == tree.end(fork)


def grown(tree, span, nodes, join, tokenizer, control):
    "A trajectory below `span`, every fork joined as soon as its threads stand; returns the last span."
    ids = lambda text: encode_text(tokenizer, text)
    for node in nodes:
        if isinstance(node, Text): span = tree.add(ids(node.text), [span], True); continue
        fork = tree.add(ids(render_outlines(node.outlines)), [span], True)
        seeds = [tree.add(ids(f"<Thread>{i}:"), [fork]) for i in range(1, len(node.threads) + 1)]
        last = [grown(tree, s, t.body, join, tokenizer, control) for s, t in zip(seeds, node.threads)]
        said = ["" if t.conclusion is None else f"<Conclusion>{t.conclusion}</Conclusion>" for t in node.threads]
        span = join(tree, fork, [tree.add(ids(c + "</Thread>"), [s], True) for s, c in zip(last, said)], control)
    return span


def test_concat_and_kv_read_as_the_rendered_text():
    "Joins in joins to depth 3: the line's tokens are the text itself, copied or in place."
    tokenizer = TOKENIZERS["char"]()
    for rng in rngs(20, "text"):
        trajectory = random_forks(rng, 3, conclusions=True)
        for name in ("concat", "kv"):
            tree = SpanTree()
            span = grown(tree, tree.add(encode_text(tokenizer, "7?")), trajectory, get_join(name), tokenizer, control_ids(tokenizer))
            assert tree.path_ids(span) == encode_text(tokenizer, "7?" + render(trajectory))


def test_result_reads_as_the_text_with_its_work_left_out():
    tokenizer = TOKENIZERS["char"]()

    def line(nodes):
        for node in nodes:
            if isinstance(node, Text): yield node.text; continue
            yield render_outlines(node.outlines)
            yield "".join(f"<Conclusion>{t.conclusion or ''}</Conclusion>" for t in node.threads) + "</Parallel>"
    for rng in rngs(20, "work"):
        trajectory, tree = random_forks(rng, 3, conclusions=True), SpanTree()
        span = grown(tree, tree.add(encode_text(tokenizer, "7?")), trajectory, get_join("result"), tokenizer, control_ids(tokenizer))
        assert tree.path_ids(span) == encode_text(tokenizer, "7?" + "".join(line(trajectory)))


# ---- names

def test_names():
    assert [*JOINS] == ["concat", "result", "kv"] and [j.concludes for j in JOINS.values()] == [False, True, False]
    assert get_join("kv") is JOINS["kv"] and get_join(print) is print
    with pytest.raises(ValueError, match="unknown join 'vote': choose one of concat, result, kv"): get_join("vote")
