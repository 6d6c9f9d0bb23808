"""The race: what is seen is what was written, whoever looks; both sides end as plain decoding does; terminal, pipe and picture."""
import io
import re

import pytest
from helpers import tiny
from rich.console import Console
from test_decode import Script, block, deep_plan, random_plan

from threadweaver_ref.decode import DecodeConfig, generate
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.race import Side, panes, picture, race, seen, starters
from threadweaver_ref.tokenizer import char_tokenizer, encode_text

CHAR = char_tokenizer()
MODEL = tiny("Qwen3", CHAR)
CONFIG = DecodeConfig(hook=Script(CHAR, deep_plan), limits=Limits(max_tokens=400, max_thread_tokens=60))
QUESTION = "a=7+3x4;b=2+5x3;c=a+b;c?"


def screen(width=100, **kind):
    kind = {"force_terminal": False, **kind}
    return Console(width=width, file=io.StringIO(), force_jupyter=False, color_system="standard" if kind["force_terminal"] else None, **kind)


def finished(side):
    while not side.rollout: side.step()
    return side


@pytest.mark.parametrize("plan", [deep_plan, random_plan])
def test_a_side_ends_as_plain_decoding_and_its_lines_only_grow(plan):
    config = DecodeConfig(hook=Script(CHAR, plan), limits=CONFIG.limits)
    for question in [QUESTION, *map(str, range(8))]:
        side, before = Side("x", MODEL, CHAR, question, config), {}
        while not side.rollout:
            side.step()
            now = {}
            for line in seen(side):
                if not line.live: now.setdefault(line.name, []).append(line.text)
            assert all(now[name][:len(texts)] == texts for name, texts in before.items())
            before = now
        plain, = generate(MODEL, CHAR, [question], config)
        assert side.rollout.text == plain.text and side.seconds > 0 and not any(line.live for line in seen(side))
        assert {line.name for line in seen(side)} - {""} <= {i.branch for i in plain.timeline}


def test_a_thread_that_only_concludes_is_seen():
    def plan(branch, tokenizer):
        if branch.path: return encode_text(tokenizer, "<Conclusion>7</Conclusion></Thread>")
        return [tokenizer.eos_token_id] if branch.forks else encode_text(tokenizer, block("1:p", "2:q"))
    side = finished(Side("x", MODEL, CHAR, QUESTION, DecodeConfig(hook=Script(CHAR, plan), join="result")))
    assert [(line.name, line.text) for line in seen(side)] == [("", "fork: 1:p 2:q"), ("1", "=> 7"), ("2", "=> 7")]


def test_what_live_branches_write_is_seen_at_once():
    "Word for word; outlines that are being written, without their tags."
    side = Side("x", MODEL, CHAR, QUESTION, CONFIG)
    for _ in range(12):
        side.step()
        row = side.decoder.rows[0]
        lines = {line.name: line.text for line in seen(side) if line.live}
        assert set(lines) == {branch.name.replace("main", "") for branch in row.machine.ready}
        for live in row.live:
            shown, text = lines[live.branch.name.replace("main", "")], CHAR.decode(live.ids)
            assert shown == text if "<" not in text else shown.startswith(text.partition("<")[0]) and "<" not in shown


def test_the_clocks_run_together(monkeypatch):
    "Whose clock shows less goes next; who is finished waits."
    both, order = starters(MODEL, CHAR, QUESTION, CONFIG), []
    for side, cost in zip(both, (2.0, 3.0)):
        def step(side=side, cost=cost):
            order.append(side.name)
            side.seconds += cost
            if side.seconds > 11: side.rollout = finished(Side("y", MODEL, CHAR, "1?", CONFIG)).rollout
        monkeypatch.setattr(side, "step", step)
    from threadweaver_ref import race as room
    for _ in room._turns(both): assert abs(both[0].seconds - both[1].seconds) <= 3 or any(s.rollout for s in both)
    assert [s.seconds for s in both] == [12, 12] and order[:4] == ["without forks", "with forks", "without forks", "with forks"]


@pytest.mark.parametrize("width", [80, 120])
def test_in_a_pipe_each_line_comes_once_and_plain(width):
    console = screen(width)
    both = race(MODEL, CHAR, QUESTION, console, CONFIG)
    text = console.file.getvalue()
    assert "\x1b" not in text and text.startswith(QUESTION)
    for side in both:
        plain, = generate(MODEL, CHAR, [QUESTION], CONFIG if side.name == "with forks" else DecodeConfig("sequential", limits=CONFIG.limits))
        assert side.rollout.text == plain.text
        for line in seen(side):
            label = f"|{line.name}> " if line.name else ""
            if line.text.strip(): assert re.search(rf"\d\.\d\d s  {side.name} *  {re.escape(label)}{re.escape(line.text[:20])}", text)
    threads = [line.name for line in seen(both[1]) if line.name and line.text == "fork: 1:p 2:q"]
    for name in threads: assert len(re.findall(rf"\|{re.escape(name)}> fork: 1:p 2:q\n", text)) == 1


def test_in_a_terminal_of_80_columns_nothing_is_wider():
    console = screen(80, force_terminal=True)
    race(MODEL, CHAR, QUESTION, console, CONFIG)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).replace("\r", "\n").splitlines()
    assert any("without forks" in line and "with forks" in line for line in lines) and max(map(len, lines)) <= 80
    plain = screen(80)
    plain.print(panes(starters(MODEL, CHAR, QUESTION, CONFIG), 80))
    assert max(map(len, plain.file.getvalue().splitlines())) <= 80


def test_markup_in_a_question_is_text():
    question = "[red]a[/red]=1+2;a?"
    for console in (screen(), screen(force_terminal=True)):
        race(MODEL, CHAR, question, console, DecodeConfig(limits=Limits(max_tokens=5)))
        assert "[red]a[/red]" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


@pytest.mark.parametrize("terminal", [False, True])
def test_a_picture_of_the_moment_when_the_first_has_finished(tmp_path, terminal):
    moments = []
    def take(both):
        moments.append([bool(s.rollout) for s in both])
        picture(both, tmp_path / "race.svg")
        return both   # whatever it gives back, it is called once
    race(MODEL, CHAR, QUESTION, screen(force_terminal=terminal), CONFIG, on_first=take)
    assert len(moments) == 1 and sorted(moments[0]) == [False, True]
    svg = (tmp_path / "race.svg").read_text()
    assert svg.startswith("<svg") and "without" in svg
