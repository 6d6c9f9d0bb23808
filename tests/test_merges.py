"""The comparison of merges: what it counts, against counts by hand."""
import json

import pytest
from helpers import TOKENIZERS, tiny
from test_decode import ROOMY, Script, block
from typer.testing import CliRunner

from threadweaver_ref import merges
from threadweaver_ref.cli import app
from threadweaver_ref.decode import DecodeConfig, generate, reread
from threadweaver_ref.merges import PARTS, measure, merge_bench, wide_sums
from threadweaver_ref.tasks import held_out
from threadweaver_ref.tokenizer import encode_text

char = TOKENIZERS["char"]()
WRITTEN = {"1": "ab</Thread>", "2": "abc<Conclusion>7</Conclusion></Thread>", "3": "</Thread>"}
EXPECTED = {"concat": len("12:abc1717") + len("13:1"),   # `<Thread>2:abc<Conclusion>7</Conclusion></Thread>`, `<Thread>3:</Thread>`
            "result": 2 + 3 + 2, "kv": 0}                 # conclusions with their tags, empty where there is none


def plan(branch, tokenizer):
    if branch.path: return encode_text(tokenizer, WRITTEN[branch.name])
    return encode_text(tokenizer, "so<eos>" if branch.forks else block("1:p", "2:q", "3:r"))


@pytest.mark.parametrize("join", EXPECTED)
def test_what_is_read_again(join):
    r, = generate(tiny("Qwen3", char), char, ["1+1?"], DecodeConfig(join=join, hook=Script(char, plan), limits=ROOMY))
    assert reread(r, char) == EXPECTED[join]


def test_measured_on_random_weights():
    model, problems = tiny("Qwen3", char), wide_sums(2, 3, 1)
    row = measure(model, char, problems, DecodeConfig(limits=ROOMY, hook=Script(char, plan)), timed=2)
    assert (row["problems"], row["timed"], row["accuracy"], row["forks"], row["reread_tokens"]) == (3, 2, 0, 1, EXPECTED["concat"])
    assert 0 < row["prefill_seconds"] < row["seconds"] and 0 < row["decode_seconds"] < row["seconds"]
    assert "seconds" not in measure(model, char, problems, DecodeConfig(limits=ROOMY, hook=Script(char, plan)))


def test_its_sums_are_always_the_same_and_none_is_held_out():
    assert wide_sums(4, 5, 2) == wide_sums(4, 5, 2) == wide_sums(4, 9, 2)[:5]
    assert not {p.question for n in (2, 32) for p in wide_sums(n, 20, 1)} & held_out()
    assert all(len(p.graph.phases[0]) == 28 for p in wide_sums(28, 2, (3, 2)))


def test_unknown_part():
    with pytest.raises(ValueError, match="unknown part 'flat': choose from joins, flat_and_nested, beyond_the_window, deadlines"):
        merge_bench(["flat"])
    assert set(PARTS) == {"joins", "flat_and_nested", "beyond_the_window", "deadlines"}


def test_parts_measured_before_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(merges, "PARTS", {part: lambda n: [n] for part in PARTS})
    out = tmp_path / "merges.json"
    for part, n in (("joins", 3), ("deadlines", 4), ("joins", 5)):
        assert CliRunner().invoke(app, ["merges", "--part", part, "--problems", str(n), "--out", str(out)]).exit_code == 0
    found = json.loads(out.read_text())
    assert (found["joins"], found["deadlines"]) == ([5], [4]) and set(found["measured"]) == {"joins", "deadlines"}
    assert all(r["commit"] and r["torch"] for r in found["measured"].values())
