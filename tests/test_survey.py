"What a file offers before any training, against slow counts."
import itertools
import random

import pytest
from helpers import TOKENIZERS, random_forks

from threadweaver_ref.course import random_problem
from threadweaver_ref.domains import Problem, RandomForks, Sequential, Step, WheneverReady, char_length
from threadweaver_ref.format import CONTROL_TOKENS, parse, render, token_counts
from threadweaver_ref.forkjoin import ForkJoin, Limits
from threadweaver_ref.replay import play, replay
from threadweaver_ref.report import text_length
from threadweaver_ref.survey import (could_fork, few_orders, fork_sizes, join_faults, least_budget, split_blanks, survey, token_faults,
                                     training_items, without_forks)
from threadweaver_ref.tokenizer import encode_prompt
from threadweaver_ref.yourdata import Row

PROBLEMS = [random_problem(random.Random(s), s % 7) for s in range(60)]


def forks_somewhere(problem):
    "Is there a set of finished steps, of all sets, at which two steps with outlines are ready?"
    for n in range(len(problem.steps) + 1):
        for done in map(set, itertools.combinations([s.name for s in problem.steps], n)):
            if not all(done.issuperset(s.needs) for s in problem.steps if s.name in done): continue
            if sum(s.name not in done and done.issuperset(s.needs) and bool(s.outline) for s in problem.steps) > 1: return True
    return False


def orders(problem):
    "Sets of steps that can be finished while all others are not."
    sets = [set(c) for n in range(len(problem.steps) + 1) for c in itertools.combinations([s.name for s in problem.steps], n)]
    return sum(all(done.issuperset(s.needs) for s in problem.steps if s.name in done) for done in sets)


def test_which_problems_could_fork():
    found = [could_fork(p) for p in PROBLEMS]
    assert found == [forks_somewhere(p) for p in PROBLEMS] and 10 < sum(found) < 55


def test_sets_of_finished_steps_are_counted():
    for p in PROBLEMS:
        n = orders(p)
        assert few_orders(p, n) and not few_orders(p, n - 1)


def test_too_many_orders_take_no_time():
    steps = [Step(f"{i}.{k}", (f"{i}.{k - 1}",) if k else (), "o", "....") for i in range(15) for k in range(4)]
    chains = Problem("?", "b", "yours", steps, closing="\\boxed{b}")
    assert not few_orders(chains) and survey([Row(1, chains)], char_length)["not_measured"] == 1


def test_long_rows_and_wide_ones_are_left_unmeasured():
    "A chain of 400 beside a step that needs nothing: the search would go 400 deep. 5,000 steps side by side: two of them have 12 million sets."
    chain = [Step(f"{i}", (f"{i - 1}",) if i else (), "o", "....") for i in range(400)] + [Step("x", (), "o", "....")]
    wide = [Step(f"{i}", (), "o", "....") for i in range(5000)]
    for steps in (chain, wide, wide[:140]):
        p = Problem("?", "b", "yours", steps, closing="\\boxed{b}")
        assert not few_orders(p) and survey([Row(1, p)], char_length)["not_measured"] == 1


def test_a_survey_by_hand():
    a, b = Step("a", (), "a", "x" * 50), Step("b", (), "b", "y" * 40)
    wide = Problem("w?", "1", "yours", [a, b], closing="\\boxed{1}")
    chain = Problem("c?", "1", "yours", [a, Step("b", ("a",), "b", "y")], closing="\\boxed{1}")
    text = render(WheneverReady().arrange(wide))
    alone = [Problem(q, "1", "yours") for q in ("t?", "u?", "q?")]
    rows = [Row(1, wide), Row(2, chain), Row(3, alone[0], text), Row(4, alone[1], "\\boxed{1}"), Row(5, alone[2])]
    found = survey(rows, char_length)
    never = 50 + 40 + 9 + 1                                # two steps, the box, the end of sequence
    forked = 2 + 2 * 5 + 1 + (3 + 50 + 1) + 1 + 9 + 1      # <Parallel><Outlines>, two outlines, </Outlines>, the longer thread, </Parallel>
    assert token_counts(parse(text), char_length)[0] == forked
    assert (found["rows"], found["steps"], found["text"], found["question"], found["could_fork"], found["texts_with_forks"]) == (5, 2, 2, 1, 1, 1)
    assert found["best_flat"] == found["largest"] == found["whenever_ready"] == never / forked and found["pays"] == 1 and found["never"] == never
    assert found["train"] + found["dev"] + found["test"] == 5 and "best_flat" not in survey(rows[1:], char_length)


def test_blanks_that_a_fork_would_cut_off():
    def row(*texts, needs=(), opening="", text=""):
        steps = [Step(f"{i}", needs if i else (), "o", t) for i, t in enumerate(texts)]
        return Row(1, Problem("?", "1", "yours", steps, opening, "\\boxed{1}" if steps else ""), text)
    fork = "<Parallel><Outlines><Outline>1:a</Outline></Outlines><Thread>1:b </Thread></Parallel>"
    kinds = {"behind": row("one. ", "two. "), "in front": row(" one.", " two."), "lines": row("one.\n", "two.\n"),
             "chain": row("one. ", "two. ", needs=("0",)),
             "opening": row(" one.", " two.", opening="So: "),
             "text": row(text=f"one. {fork} \\boxed{{1}}"), "text in front": row(text=f"one.{fork} \\boxed{{1}}")}
    found = {name: split_blanks(r, TOKENIZERS["bpe"]()) for name, r in kinds.items()}
    assert [name for name, cut in found.items() if cut] == ["behind", "opening", "text"]
    assert not any(split_blanks(r, TOKENIZERS["char"]()) for r in kinds.values())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_is_shown_as_it_stands_or_without_forks(name):
    tokenizer = TOKENIZERS[name]()
    p = Problem("w?", "1", "yours", [Step("a", (), "a", "A: 12; "), Step("b", (), "b", "B: 34; ", "5. ")], closing="\\boxed{1}")
    trajectory = WheneverReady(conclude=True).arrange(p)
    rows = [Row(1, p), Row(2, Problem("w?", "1", "yours"), render(trajectory)), Row(3, Problem("q?", "1", "yours"))]
    prompt = encode_prompt(tokenizer, "w?")
    whole, flat = (training_items(rows, tokenizer, "concat", share) for share in (0, 1))
    assert whole[0] is flat[0] is p and len(whole) == len(flat) == 2
    assert whole[1].ids == replay(trajectory, prompt, tokenizer).ids and len(whole[1]) > 5
    assert flat[1].ids == replay(Sequential().arrange(p), prompt, tokenizer).ids and len(flat[1]) == 2
    assert not any(t in without_forks(trajectory)[0].text for t in CONTROL_TOKENS)
    some = [len(t) for t in training_items(rows[1:2] * 300, tokenizer, share=.1)]
    assert 15 < some.count(2) < 50


def test_what_a_tokenizer_and_a_window_cannot_take():
    char = TOKENIZERS["char"]()
    row = Row(1, Problem("Schön?", "1", "yours", [Step("a", (), "ß", "x" * 10)], closing="\\boxed{1}"))
    assert token_faults(row, char) == ["the tokenizer does not know 'ö', 'ß'"] and token_faults(row, TOKENIZERS["bpe"]()) == []
    plain = Row(1, Problem("w?", "1", "yours"), "x" * 20 + "\\boxed{1}")
    assert token_faults(plain, char, window=2 + 29 + 1) == []
    assert "32 tokens with its answer, more than the 31" in token_faults(plain, char, window=31)[0]
    steps = [Step("a", (), "a", "x" * 9), Step("b", (), "b", "y" * 9), Step("c", ("a",), "c", "z")]
    problem = Problem("w?", "1", "yours", steps, closing="\\boxed{1}")
    most = max(int(replay(RandomForks(p, whole=p).arrange(problem), encode_prompt(char, "w?"), char).pack().position_ids.max()) for p in (0, 1))
    assert token_faults(Row(1, problem), char, window=most + 1) == [] != token_faults(Row(1, problem), char, window=most)   # forked, with all tags


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_special_token_in_an_answer_is_said(name):
    "In `replay` it would end the text in the middle, and with it the training."
    tokenizer = TOKENIZERS[name]()
    said = f"a {tokenizer.eos_token} b \\boxed{{1}}"
    fault = [f"its answer holds {tokenizer.eos_token}, which this tokenizer reads as a special token"]
    bare, step = Problem("w?", "1", "yours"), Step("a", (), "a", f"x {tokenizer.eos_token} ")
    row = Row(1, bare, said)
    with pytest.raises(ValueError, match="which this tokenizer reads as a special token"): training_items([row], tokenizer, share=0)
    for bad in (row, Row(1, Problem("w?", "1", "yours", [step], closing="\\boxed{1}")),
                Row(1, Problem("w?", "1", "yours", [Step("a", (), "a", "x")], closing=said)), Row(1, Problem("w?", tokenizer.eos_token, "yours"))):
        assert token_faults(bad, tokenizer) == fault
    forked = render(WheneverReady().arrange(Problem("w?", "1", "yours", [Step("a", (), "a", "A"), Step("b", (), "b", "B")], closing="\\boxed{1}")))
    assert token_faults(Row(1, bare, forked), tokenizer) == token_faults(Row(1, Problem(said, "1", "yours")), tokenizer) == []


def test_a_special_token_that_no_list_names():
    "As the end of a turn in Llama 3: special, and neither the end of sequence nor one of the further ones."
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS["bpe"]().backend_tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|turn|>", special=True)])
    assert "<|turn|>" not in tokenizer.all_special_tokens
    assert "<|turn|>, which" in token_faults(Row(1, Problem("w?", "1", "yours"), "<|turn|>\\boxed{1}"), tokenizer)[0]


def test_a_join_that_hands_back_results_wants_them():
    a, b, c = Step("a", (), "a", "A: 12; "), Step("b", (), "b", "B: 34; ", "5. "), Step("c", ("a", "b"), "c", "C. ")
    row = Row(1, Problem("w?", "1", "yours", [a, b, c], closing="\\boxed{1}"))
    assert join_faults(row) == join_faults(row, "kv") == []
    assert join_faults(row, "result") == [f"step {n!r} has no result, which join 'result' hands back" for n in "ac"]
    assert join_faults(Row(1, Problem("w?", "1", "yours", [a, Step("b", ("a",), "b", "B")], closing="\\boxed{1}")), "result") == []   # it never forks
    text = render(WheneverReady(conclude=True).arrange(Problem("w?", "1", "yours", [b, Step("d", (), "d", "D", " ")], closing="\\boxed{1}")))
    assert join_faults(Row(1, Problem("w?", "1", "yours"), text), "result") == ["thread 2 of fork 1 has no result, which join 'result' hands back"]
    assert join_faults(Row(1, Problem("w?", "1", "yours"), "\\boxed{1}"), "result") == []


def driven(trajectory, tokenizer, budget, threads=100, forks=100, depth=100):
    "The text that comes out where the machine, with a budget, is fed what a trajectory says."
    machine = ForkJoin([1], tokenizer, limits=Limits(threads, forks, depth, budget, budget))
    for _, branch, ids in play(trajectory, [1], tokenizer):
        mine = next(b for b in machine.ready if b.path == branch.path)
        machine.feed(mine, ids)
    return machine.text if machine.finish_reason == "stop" and not machine.errors else None


def test_how_wide_how_many_how_deep():
    def fork(*threads): return "<Parallel><Outlines>" + "".join(f"<Outline>{i}:o</Outline>" for i in range(1, 1 + len(threads))) + "</Outlines>" \
        + "".join(f"<Thread>{i}:{t}</Thread>" for i, t in enumerate(threads, 1)) + "</Parallel>"
    inner = fork("a", "b", "c") + fork("d", "e")
    for text, sizes in [("x", (0, 0, 0)), (fork("a", "b"), (2, 1, 1)), (inner, (3, 2, 1)), (fork("a", inner + "x"), (3, 2, 2)),
                        (fork("a", "b") * 3 + fork("a", fork("b", fork("c", "d"))), (2, 4, 3))]:
        assert fork_sizes(parse(text)) == sizes
        assert driven(parse(text), TOKENIZERS["char"](), 4096, *(max(1, n) for n in sizes)) == text
        for i in (i for i, n in enumerate(sizes) if n > 1):   # with one less, a fork is refused, and its threads are missing
            with pytest.raises(StopIteration): driven(parse(text), TOKENIZERS["char"](), 4096, *(n - (k == i) for k, n in enumerate(sizes)))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_least_budget_is_the_least(name):
    tokenizer = TOKENIZERS[name]()
    length, deep = text_length(tokenizer), 0
    trajectories = [random_forks(random.Random(seed)) for seed in range(40)] + [WheneverReady().arrange(p) for p in PROBLEMS[:20] if p.steps]
    for trajectory in trajectories:
        written, least = least_budget(trajectory, length)
        machine_writes = replay(trajectory, [1], tokenizer)
        assert written == sum(len(ids) for ids, sampled in zip(machine_writes.ids, machine_writes.sampled) if sampled)
        assert driven(trajectory, tokenizer, least) == render(trajectory)
        try: assert driven(trajectory, tokenizer, least - 1) is None
        except ValueError as error: assert "more than the budget" in str(error)
        deep += least > written
    assert deep > 30
