"The format: round trips, named rules, random soups, an independent recogniser, token latency against a clock."
import inspect
import pickle
import random
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threadweaver_ref.course import example, random_trajectory
from threadweaver_ref.format import (CONTROL_TOKENS, MAX_NESTING, RULES, Fork, FormatError, Text, Thread, check_format, parse, parse_outlines, render,
                                     split_tags, token_counts)
from threadweaver_ref.tokenizer import char_tokenizer

BLOCK = ("<Parallel><Outlines><Outline>1:a</Outline><Outline>2:b</Outline></Outlines>"
         "<Thread>1:x</Thread><Thread>2:y</Thread></Parallel>")
OUTLINES = BLOCK[:BLOCK.index("<Thread>")]


def rules(text): return [e.rule for e in check_format(text)]


# ---- round trips over random trajectories

def free_of_tags(text): return not any(t in text for t in CONTROL_TOKENS)


plain = st.text(st.sampled_from("ab12<>/:=; \n⑤é"), max_size=6).filter(free_of_tags)


def normal(nodes):
    "No empty texts, no two texts side by side: what `parse` returns."
    out = []
    for n in nodes:
        if isinstance(n, Text) and not n.text: continue
        if isinstance(n, Text) and out and isinstance(out[-1], Text): out[-1] = Text(out[-1].text + n.text)
        else: out.append(n)
    return out


def bodies(inner): return st.lists(st.one_of(plain.map(Text), inner), max_size=3).map(normal)


def forks(inner):
    thread = st.builds(Thread, bodies(inner), st.one_of(st.none(), plain))
    return st.integers(2, 3).flatmap(lambda n: st.builds(
        Fork, st.lists(plain, min_size=n, max_size=n), st.lists(thread, min_size=n, max_size=n)))


trajectories = bodies(st.recursive(forks(st.nothing()), forks, max_leaves=6))


@settings(max_examples=150, deadline=None)
@given(trajectories)
def test_render_then_parse_gives_the_same_trajectory(trajectory):
    text = render(trajectory)
    assert check_format(text) == [] and parse(text) == trajectory
    assert render(parse(text)) == text


def spaced(nodes, space):
    "A renderer of its own that puts white space wherever only tags meet."
    text = ""
    for n in nodes:
        if isinstance(n, Text):
            text += n.text
            continue
        outlines = (f"<Outline>{space()}{i}:{o}</Outline>" for i, o in enumerate(n.outlines, 1))
        threads = (spaced_thread(i, t, space) for i, t in enumerate(n.threads, 1))
        text += space().join(["<Parallel>", "<Outlines>", *outlines, "</Outlines>", *threads, "</Parallel>"])
    return text


def spaced_thread(i, t, space):
    end = "" if t.conclusion is None else f"<Conclusion>{t.conclusion}</Conclusion>{space()}"
    return f"<Thread>{space()}{i}:{spaced(t.body, space)}{end}</Thread>"


@settings(max_examples=80, deadline=None)
@given(trajectories, st.data())
def test_any_white_space_between_tags_is_accepted(trajectory, data):
    text = spaced(trajectory, lambda: data.draw(st.sampled_from(["", " ", "\n", "\n\n", "\t ", "\r\n"])))
    assert parse(text) == trajectory


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*CONTROL_TOKENS, "1:", "2:", "x", " ", "3", "<", "<Thread", "99999:"]), max_size=40).map("".join))
def test_check_format_never_raises_and_agrees_with_parse(soup):
    errors = check_format(soup)
    assert all(isinstance(e, FormatError) and e.rule in RULES and 0 <= e.offset <= len(soup) for e in errors)
    assert [e.offset for e in errors] == sorted(e.offset for e in errors)
    if errors:
        with pytest.raises(FormatError, match=errors[0].rule): parse(soup)
    else: assert render(parse(soup)).replace(" ", "") == soup.replace(" ", "")


# ---- an independent recogniser: every tag becomes one letter, and innermost forks are replaced until nothing changes

LETTER = dict(zip(CONTROL_TOKENS, "\ue000\ue001\ue002\ue003\ue004\ue005\ue006\ue007\ue008\ue009"))
P, P_, OS, OS_, O, O_, T, T_, C, C_ = LETTER.values()
DONE = "\ue00a"   # a fork that has been replaced
NO_TAG, PLAIN = f"[^{P}-{C_}]*", f"[^{P}-{DONE}]*"
INNERMOST = re.compile(rf"{P}\s*{OS}((?:\s*{O}{PLAIN}{O_})+)\s*{OS_}((?:\s*{T}{NO_TAG}(?:{C}{PLAIN}{C_}\s*)?{T_})+)\s*{P_}")


def numbered(parts, opening, closing):
    "How many parts, numbered 1 to n; -1 if they are not."
    parts = [p for p in parts.split(closing) if opening in p]
    numbers = [re.match(r"\s*(\d+):", p[p.index(opening) + 1:]) for p in parts]
    return len(parts) if [n and n[1] for n in numbers] == [str(i + 1) for i in range(len(parts))] else -1


def replaced(fork):
    outlines, threads = numbered(fork[1], O, O_), numbered(fork[2], T, T_)
    return DONE if outlines == threads >= 2 else fork[0]


def recognised(text):
    "Is a text (nested less than `MAX_NESTING` deep) well-formed?"
    for tag, letter in LETTER.items(): text = text.replace(tag, letter)
    before = None
    while text != before: before, text = text, INNERMOST.sub(replaced, text)
    return not re.search(f"[{P}-{C_}]", text)


@st.composite
def nearly(draw):
    "A well-formed text with up to two pieces taken out or put in."
    pieces = [piece for _, piece in split_tags(spaced(draw(trajectories), lambda: draw(st.sampled_from(["", " ", "\n"]))))]
    for _ in range(draw(st.integers(0, 2))):
        at, put = draw(st.integers(0, len(pieces))), draw(st.sampled_from([*CONTROL_TOKENS, "", "x", " ", "1:"]))
        pieces[at:at + draw(st.integers(0, 1))] = [put]
    return "".join(pieces)


@settings(max_examples=200, deadline=None)
@given(nearly())
def test_check_format_accepts_what_an_independent_recogniser_does(text): assert (check_format(text) == []) == recognised(text)


@pytest.mark.parametrize("n", [300])
def test_time_is_linear(n):
    "Operations of the interpreter, not seconds: twice the text, twice the lines."
    def lines(text):
        count = 0
        def trace(*_):
            nonlocal count
            count += 1
            return trace
        sys.settrace(trace)
        try: check_format(text)
        finally: sys.settrace(None)
        return count
    for text in (BLOCK, "<Parallel>", "</Thread>", "<Thread>1:" + OUTLINES, "<Outline>", "x"):
        assert lines(text * 2 * n) < 2.2 * lines(text * n) + 1000


@pytest.mark.parametrize("text", [
    "<Parallel>" * 5000, "<Parallel><Thread>" * 5000, ("<Thread>1:" + OUTLINES) * 3000, "</Thread>" * 5000, "<Thread><Conclusion>" * 3000,
    "<Parallel><Outlines><Outline>" + "9" * 6000 + ":x</Outline>", BLOCK * 500, "", "<", "<Parallel", "\x00", "\ud800",
], ids=range(12))
def test_check_format_never_raises_on_extremes(text): check_format(text)


def test_check_format_far_down_the_stack():
    "The parser recurses, at most so far; a caller that is far down already must not notice."
    def down(frames): return check_format(nested(MAX_NESTING)) if not frames else down(frames - 1)
    assert down(sys.getrecursionlimit() - len(inspect.stack()) - 100) == []


def test_a_trajectory_too_deep_to_write():
    trajectory = [Text("x")]
    for _ in range(1000): trajectory = [Fork(["a", "b"], [Thread(trajectory), Thread([])])]
    with pytest.raises(ValueError, match="nested too deep"): render(trajectory)


# ---- every rule by name

BROKEN = {
    "text between threads": (BLOCK.replace("</Thread><Thread>", "</Thread> and <Thread>"), "text_between_tags"),
    "text between outlines": (BLOCK.replace("</Outline><Outline>", "</Outline>,<Outline>"), "text_between_tags"),
    "text before the outlines": (BLOCK.replace("<Parallel>", "<Parallel>so"), "text_between_tags"),
    "text after the threads": (BLOCK.replace("</Parallel>", "so</Parallel>"), "text_between_tags"),
    "join before fork": ("</Parallel>x<Parallel>", "close_without_open"),
    "closing twice": (BLOCK + "</Parallel>", "close_without_open"),
    "a thread outside a block": ("<Thread>1:x</Thread>", "tag_outside_block"),
    "a conclusion outside a thread": ("<Conclusion>x</Conclusion>", "tag_outside_block"),
    "outlines outside a block": ("<Outlines></Outlines>", "tag_outside_block"),
    "a thread in a thread": (BLOCK.replace("1:x", "1:<Thread>1:x</Thread>"), "tag_outside_block"),
    "a fork in an outline": (BLOCK.replace("1:a", "1:" + BLOCK), "tag_outside_block"),
    "outlines after a thread": ("<Parallel><Thread>1:x</Thread>" + OUTLINES[10:] + "</Parallel>", "missing_outlines"),
    "outlines twice": (BLOCK.replace("<Thread>1", OUTLINES[10:] + "<Thread>1"), "tag_outside_block"),
    "an unclosed block": (BLOCK.replace("</Parallel>", ""), "unclosed_block"),
    "an unclosed thread": (BLOCK.replace("y</Thread>", "y"), "unclosed_block"),
    "unclosed outlines": (BLOCK.replace("</Outlines>", ""), "unclosed_block"),
    "an unclosed outline": (BLOCK.replace("b</Outline>", "b"), "unclosed_block"),
    "an unclosed conclusion": (BLOCK.replace("1:x", "1:<Conclusion>x"), "unclosed_block"),
    "no outlines": ("<Parallel><Thread>1:x</Thread><Thread>2:y</Thread></Parallel>", "missing_outlines"),
    "an empty block": ("<Parallel></Parallel>", "missing_outlines"),
    "empty outlines": ("<Parallel><Outlines></Outlines></Parallel>", "too_few_outlines"),
    "one outline": ("<Parallel><Outlines><Outline>1:a</Outline></Outlines><Thread>1:x</Thread></Parallel>", "too_few_outlines"),
    "outlines 1, 1, 3": (BLOCK.replace("e>2:b", "e>1:b").replace("</Outlines>", "<Outline>3:c</Outline></Outlines>")
                         .replace("</Parallel>", "<Thread>3:z</Thread></Parallel>"), "outline_numbering"),
    "outlines from 0": (BLOCK.replace("1:a", "0:a").replace("2:b", "1:b"), "outline_numbering"),
    "an outline without a number": (BLOCK.replace("1:a", "a"), "outline_numbering"),
    "an outline numbered 01": (BLOCK.replace("1:a", "01:a"), "outline_numbering"),
    "threads 2, 1": (BLOCK.replace("1:x", "2:x").replace("2:y", "1:y"), "thread_numbering"),
    "a thread without a number": (BLOCK.replace("1:x", "x"), "thread_numbering"),
    "a thread too few": (BLOCK.replace("<Thread>2:y</Thread>", ""), "thread_count"),
    "a thread too many": (BLOCK.replace("</Parallel>", "<Thread>3:z</Thread></Parallel>"), "thread_count"),
    "text after a conclusion": (BLOCK.replace("1:x", "1:<Conclusion>x</Conclusion> more"), "conclusion_not_last"),
    "a fork after a conclusion": (BLOCK.replace("1:x", "1:<Conclusion>x</Conclusion>" + BLOCK), "conclusion_not_last"),
    "two conclusions": (BLOCK.replace("1:x", "1:<Conclusion>x</Conclusion><Conclusion>y</Conclusion>"), "conclusion_not_last"),
}


def nested(depth): return BLOCK if depth == 1 else BLOCK.replace("1:x", "1:" + nested(depth - 1))


BROKEN["a block too deep"] = (nested(MAX_NESTING + 1), "nested_too_deep")


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rule_is_the_first_error(name):
    text, rule = BROKEN[name]
    assert rules(text)[0] == rule
    with pytest.raises(FormatError, match=rule) as error: parse(text)
    assert error.value.rule == rule and 0 <= error.value.offset <= len(text)


LIMITS = {"max_threads", "max_depth", "max_forks", "max_tokens"}   # rules of the state machine: see test_forkjoin.py


def test_every_rule_has_a_test():
    assert {rule for _, rule in BROKEN.values()} == set(RULES) - LIMITS and set(RULES) > LIMITS


@pytest.mark.parametrize("rule", RULES)
def test_format_errors_say_the_rule_and_can_be_pickled(rule):
    error = FormatError(rule, 36, "some detail")
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is FormatError and str(copied) == str(error) == f"{rule} at character 36: {RULES[rule]} (some detail)"
    assert (copied.rule, copied.offset, copied.detail) == (rule, 36, "some detail")


def test_one_fault_is_reported_once():
    for name, rule in [("unclosed outlines", "unclosed_block"), ("no outlines", "missing_outlines"), ("an unclosed thread", "unclosed_block"),
                       ("a thread in a thread", "tag_outside_block"), ("two conclusions", "conclusion_not_last")]:
        assert rules(BROKEN[name][0])[:1] == [rule] and rules(BROKEN[name][0]).count(rule) == 1, name
    assert rules(BROKEN["unclosed outlines"][0]) == ["unclosed_block"] and rules(BROKEN["no outlines"][0]) == ["missing_outlines"]


def test_one_pass_finds_all():
    text = BLOCK.replace("2:b", "3:b").replace("</Thread><Thread>", "</Thread>!<Thread>").replace("2:y", "y")
    assert rules(text) == ["outline_numbering", "text_between_tags", "thread_numbering"]


@pytest.mark.parametrize("text", ["a<b", "a<b and c>d", "1 < 2", "<think>x</think>", "<parallel>", "< Parallel >", BLOCK + BLOCK,
                                  nested(MAX_NESTING)])
def test_well_formed(text):
    assert check_format(text) == [] and render(parse(text)) == text


def test_offset_points_at_the_fault():
    text = BLOCK.replace("</Thread><Thread>", "</Thread>and<Thread>")
    assert check_format(text)[0].offset == text.index("and")


def test_parse_outlines():
    assert parse_outlines(OUTLINES) == parse_outlines(OUTLINES.replace("><", ">\n<")) == ["a", "b"]
    for text, rule in [(OUTLINES.replace("2:b", "3:b"), "outline_numbering"), (OUTLINES.replace("</Outlines>", ""), "unclosed_block"),
                       ("<Parallel><Outlines></Outlines>", "too_few_outlines"), ("x" + OUTLINES, "tag_outside_block"),
                       (BLOCK[:-len("</Parallel>")], "tag_outside_block")]:
        with pytest.raises(FormatError, match=rule): parse_outlines(text)


# ---- token latency

CHAR = char_tokenizer()


def length(text): return len(CHAR.encode(text))


def written(text): yield from [None] * length(text)


def branch(nodes):
    "Yields once for each tick of a clock; in a tick every live thread writes one token."
    for node in nodes:
        if isinstance(node, Text): yield from written(node.text)
        else:
            yield from written(render([Fork(node.outlines, [])]).removesuffix("</Parallel>"))
            live = [written_thread(i, t) for i, t in enumerate(node.threads, 1)]
            while live := [thread for thread in live if next(thread, "done") != "done"]: yield
            yield   # </Parallel>


def written_thread(i, thread):
    yield from written(f"<Thread>{i}:")
    yield from branch(thread.body)
    yield from written("" if thread.conclusion is None else f"<Conclusion>{thread.conclusion}</Conclusion>")
    yield   # </Thread>


@pytest.mark.parametrize("seed", range(60))
def test_token_latency_is_the_time_of_a_clock(seed):
    trajectory = random_trajectory(random.Random(seed), depth=3, conclusions=True)
    ticks, total = sum(1 for _ in branch(trajectory)), length(render(trajectory))
    assert token_counts(trajectory, length, end=False) == (ticks, total) and token_counts(trajectory, length) == (ticks + 1, total + 1)


def test_token_counts_of_the_running_example():
    assert token_counts(example(), length) == (92, 132)
    assert token_counts(example(fork=False), length) == (98, 98)
    assert token_counts(example(conclude=True), length) == (94, 136)
    assert token_counts([], length) == (1, 1) and token_counts([], length, end=False) == (0, 0)


def test_what_was_decoded_is_counted_by_its_ids():
    "A thread whose ids do not end in `</Thread>` was closed by force: one token more."
    close, end = 10, 1
    a, b = Thread([Text("aa", ids=(5,))], ids=(close,)), Thread([Text("bb", ids=(5, 6, 7))], ids=(end,))
    fork = Fork(["x", "y"], [a, b], ids=(1, 2, 3, 4, 5))
    a_tokens, b_tokens = 3 + 1 + 1, 3 + 3 + 2
    assert token_counts([fork, Text("z", ids=(8, 9))], length, close=close) == (5 + b_tokens + 1 + 2 + 1, 5 + a_tokens + b_tokens + 1 + 2 + 1)
    assert token_counts([Fork(["x", "y"], [], ids=(1, 2))], length) == (3, 3)   # its threads have not begun
