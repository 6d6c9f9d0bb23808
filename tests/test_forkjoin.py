"""The state machine, driven by scripts, at random, and with nonsense."""
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from helpers import TOKENIZERS, random_text, rngs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from threadweaver_ref.branch import MODES, Limits
from threadweaver_ref.course import QUESTION, example
from threadweaver_ref.forkjoin import ForkJoin
from threadweaver_ref.format import CONTROL_TOKENS, RULES, Fork, Text, Thread, check_format
from threadweaver_ref.joins import JOINS, Concat, get_join
from threadweaver_ref.replay import replay, units
from threadweaver_ref.tokenizer import add_control_tokens, control_ids, encode_prompt, encode_text
from threadweaver_ref.tree import tree_mask

char = TOKENIZERS["char"]()
tokenizers = pytest.mark.parametrize("tokenizer", [f() for f in TOKENIZERS.values()], ids=TOKENIZERS)


def start(question=QUESTION, tokenizer=char, **options):
    return ForkJoin(encode_prompt(tokenizer, question), tokenizer, **options)


def say(machine, name, text, *rest):
    "Feed the branch of that name; the names of who is ready then."
    machine.feed(next(b for b in machine.ready if b.name == name), encode_text(char, text), *rest)
    return [b.name for b in machine.ready]


def block(*lines): return "<Parallel><Outlines>" + "".join(f"<Outline>{l}</Outline>" for l in lines) + "</Outlines>"
TWO = block("1:p", "2:q")


# ---- the running example

def test_running_example():
    recorded, machine = example(), start()
    one, two = (t.body[0].text + "</Thread>" for t in recorded[0].threads)
    outlines = block("1:a=7+3x4", "2:b=2+5x3")
    assert say(machine, "main", outlines) == ["1", "2"]
    contexts = {b.name: char.decode(b.context_ids) for b in machine.ready}
    assert contexts == {i: f"{QUESTION}{outlines}<Thread>{i}:" for i in "12"}
    assert say(machine, "2", two) == ["1"]
    assert say(machine, "1", one) == ["main"]
    assert char.decode(machine.main.context_ids) == f"{QUESTION}{outlines}<Thread>1:{one}<Thread>2:{two}</Parallel>"
    say(machine, "main", recorded[1].text + "<eos>")
    assert machine.done and machine.finish_reason == "stop" and machine.trajectory == recorded and not machine.errors
    assert machine.tree == replay(recorded, encode_prompt(char, QUESTION), char)


def test_a_join_by_name_or_as_an_object():
    class Loud(Concat):
        "Counts how often it is asked."
        asked = 0
        def __call__(self, *args): self.asked += 1; return super().__call__(*args)
    join, grown = Loud(), []
    for how in ("concat", join):
        machine = start(join=how)
        for step in [("main", TWO), ("1", "x</Thread>"), ("2", "y</Thread>"), ("main", "6<eos>")]: say(machine, *step)
        grown.append(machine.tree)
    assert grown[0] == grown[1] and join.asked == 1


# ---- at random

def soup(rng, branch, tokenizer=char):
    "Random tokens that `branch` might write, control tokens and unknown ones among them, cut at the first stop token."
    write = lambda text: encode_text(tokenizer, text)
    parts = [[rng.randrange(len(tokenizer) + 9)], write(rng.choice(CONTROL_TOKENS)), write(random_text(rng, 4)),
             write(block(*(f"{i}:x" for i in range(1, rng.randint(1, 5))))), [rng.choice(branch.stop_ids)]]
    ids = [i for part in rng.choices(parts, [3, 3, 2, 9, 2], k=rng.randint(1, 6)) for i in part][:branch.budget]
    stop = next((k for k, i in enumerate(ids) if i in branch.stop_ids), None)
    return ids if stop is None else ids[:stop + 1]


def check_state(machine, limits):
    sampled = sum(len(ids) for ids, s in zip(machine.tree.ids, machine.tree.sampled, strict=True) if s)
    assert sampled <= limits.max_tokens
    assert all(1 <= b.budget <= limits.max_tokens and b.depth <= limits.max_depth and b.forks <= limits.max_forks for b in machine.ready)
    assert all(b.used + b.budget <= limits.max_thread_tokens for b in machine.ready if b.path)
    assert sum(b.budget for b in machine.ready) + sampled <= limits.max_tokens
    assert bool(machine.ready) != machine.done
    assert all(i <= limits.max_threads for b in machine.branches for _, i in b.path)
    return sampled


def rollout(rng, tokenizer=char, mode="parallel", join="concat", stops=None):
    "Drive a machine with nonsense in random order until it ends."
    limits = Limits(rng.randint(2, 5), rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 300), rng.randint(1, 100))
    machine, fed, cut = start(tokenizer=tokenizer, limits=limits, mode=mode, join=join, stops=stops), 0, False
    while not machine.done:
        sampled = check_state(machine, limits)
        assert sampled == fed
        branch = rng.choice(machine.ready)
        if rng.random() < .03:
            victim = rng.choice(machine.branches)
            if not victim.closed:
                cut |= victim is machine.main and victim.threads is not None
                machine.cancel(victim)
                continue
        ids = soup(rng, branch, tokenizer)
        ended = bool(ids) and ids[-1] in branch.stop_ids
        if not ended and rng.random() < .7 and branch.budget > len(ids):   # mostly, it goes on to a stop token
            ids, ended = [*ids, rng.choice(branch.stop_ids)], True
        fed += len(ids)
        machine.feed(branch, ids, "stop" if ended else rng.choice(["length", "cancelled", "error"]), [-float(i) for i in ids])
        assert isinstance(machine.text, str)
    assert check_state(machine, limits) == fed
    return machine, cut


@tokenizers
@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("part", range(2))
def test_soup(part, join, tokenizer):
    "3,000 rollouts of random tokens, cancels and errors: no crash, no limit exceeded, an end, a tree that packs, and replays to itself."
    forks, joins, ends, stops = 0, 0, Counter(), [tokenizer.eos_token_id, tokenizer.pad_token_id, 40][:1 + 2 * part]
    for rng in rngs(250, f"soup{part}"):
        machine, cut = rollout(rng, tokenizer, join=join, stops=stops)
        packed = machine.tree.pack()
        assert len(packed) == sum(map(len, machine.tree.ids)) and tree_mask(packed).diagonal().all()
        assert all(isinstance(e.rule, str) for e in machine.errors)
        assert all(probs == [-float(i) for i in machine.tree.ids[s]] for s, probs in machine.logprobs.items())
        assert set(machine.logprobs) == {s for s, sampled in enumerate(machine.tree.sampled) if sampled}
        forks += bool(machine.main.forks)
        ends[machine.end] += 1
        assert (machine.finish_reason == "stop") == (machine.end is not None)
        if cut: continue   # ended while its threads were at work: nothing to replay
        joins += any(isinstance(n, Fork) for n in machine.trajectory)
        options = dict(finish_reason=machine.finish_reason, stops=stops, end=machine.end)
        assert replay(machine.trajectory, machine.tree.ids[0], tokenizer, join, **options) == machine.tree
    assert forks > 75 and joins > 50 and set(ends) - {None} == set(stops)


@pytest.mark.parametrize("mode", MODES[1:])
def test_soup_in_one_line(mode):
    for rng in rngs(100, mode):
        machine, _ = rollout(rng, mode=mode)
        assert len(machine.tree) <= 2 and machine.main.forks == 0


def test_order_does_not_matter():
    "Branches that write what their path tells them, under tight limits, fed in any order: one tree."
    def grown(seed, order):
        limits = Limits(max_tokens=random.Random(seed).randint(20, 250), max_thread_tokens=60, max_threads=3)
        machine, visits = start(limits=limits), Counter()
        while not machine.done:
            branch = order.choice(machine.ready)
            visits[branch.path] += 1
            ids = soup(random.Random(f"{seed} {branch.path} {visits[branch.path]}"), branch)
            machine.feed(branch, ids, "stop" if ids and ids[-1] in branch.stop_ids else "length")
        return machine
    for seed in range(60):
        one, *others = (grown(seed, random.Random(f"{seed} order {k}")) for k in range(4))
        for other in others:
            assert other.tree == one.tree and other.text == one.text and other.finish_reason == one.finish_reason
            assert sorted(map(str, other.errors)) == sorted(map(str, one.errors))


def test_no_barrier():
    machine = start()
    steps = [("main", TWO), ("2", TWO), ("2.1", "u</Thread>"), ("2.2", TWO), ("2.2.2", "</Thread>"), ("2.2.1", "</Thread>"),
             ("2.2", "</Thread>"), ("2", "done</Thread>")]
    assert [say(machine, *s) for s in steps][-1] == ["1"]   # thread 1 has not written a token
    assert say(machine, "1", "</Thread>") == ["main"]


# ---- bad input

BAD_BLOCKS = [
    (block("1:a"), "too_few_outlines"), (block(), "too_few_outlines"), (block("1:a", "1:b", "3:c"), "outline_numbering"),
    (block("1:a", "3:b"), "outline_numbering"), (block("0:a", "1:b"), "outline_numbering"), (block("a", "b"), "outline_numbering"),
    (block("1:a", "2:b").replace("</Outline><", "</Outline>and<"), "text_between_tags"),
    ("<Parallel>so <Outlines><Outline>1:a</Outline><Outline>2:b</Outline></Outlines>", "text_between_tags"),
    ("<Parallel><Outline>1:a</Outline><Outline>2:b</Outline></Outlines>", "missing_outlines"),
    ("</Outlines>", "close_without_open"), ("<Outlines></Outlines>", "close_without_open"), (block(*"12345"), "outline_numbering"),
    (block(*(f"{i}:x" for i in range(1, 6))), "max_threads"), (block("1:a", "2:b</Thread>"), "close_without_open"),
]


@pytest.mark.parametrize("text, rule", BAD_BLOCKS, ids=range(len(BAD_BLOCKS)))
def test_malformed_outlines_stay_text(text, rule):
    machine = start(limits=Limits(max_threads=4))
    assert say(machine, "main", "so " + text) == ["main"]
    say(machine, "main", "56<eos>")
    assert rule in [e.rule for e in machine.errors] and machine.text == f"so {text}56" and machine.finish_reason == "stop"
    inside = start(limits=Limits(max_threads=4))
    say(inside, "main", TWO)
    if "</Thread>" not in text:
        assert say(inside, "2", text) == ["1", "2"]
        say(inside, "2", "</Thread>"); say(inside, "1", "</Thread>"); say(inside, "main", "<eos>")
        assert rule in [e.rule for e in inside.errors] and inside.text == f"{TWO}<Thread>1:</Thread><Thread>2:{text}</Thread></Parallel>"


def test_tags_in_plain_characters_are_no_outlines():
    "Control tokens spelled out, as a question that is quoted would have them, must not pass for control tokens."
    plain = lambda text: encode_prompt(char, text)
    control = lambda text: encode_text(char, text)
    for middle in (plain("1:a</Outline><Outline>2:b"), [*control("1:a</Outline><Outline>2:"), *plain("say </Thread>")]):
        machine = start()
        machine.feed(machine.main, [*control("<Parallel><Outlines><Outline>"), *middle, *control("</Outline></Outlines>")])
        assert machine.ready == [machine.main] and [e.rule for e in machine.errors] == ["tag_outside_block"]


def test_a_good_block_behind_a_bad_one_forks():
    machine = start()
    say(machine, "main", block("1:a"))
    assert say(machine, "main", "no. " + TWO) == ["1", "2"]
    assert [type(n) for n in machine.trajectory] == [Text, Fork] and machine.trajectory[0].text == block("1:a") + "no. "


def test_depth_forks_and_tokens():
    machine = start(limits=Limits(max_depth=1, max_forks=1))
    steps = [("main", TWO), ("1", TWO), ("1", "</Thread>"), ("2", "</Thread>"), ("main", TWO), ("main", "<eos>")]
    for step in steps: say(machine, *step)
    assert [e.rule for e in machine.errors] == ["max_depth", "max_forks"] and machine.finish_reason == "stop"
    short = start(limits=Limits(max_tokens=len(encode_text(char, TWO)) + 1))
    assert say(short, "main", TWO) == ["main"] and short.errors[0].rule == "max_tokens"
    assert all(RULES[e.rule] in str(e) for e in machine.errors + short.errors)
    say(short, "main", "<eos>")
    assert short.finish_reason == "stop"


def test_thread_that_does_not_end():
    machine = start(limits=Limits(max_thread_tokens=5))
    steps = [("main", block("1:a", "2:b", "3:c")), ("1", "xy<eos>", "stop", [-1, -2, -3]), ("2", "12345", "length")]
    for step in steps: say(machine, *step)
    machine.cancel(machine.ready[0])
    say(machine, "main", "56<eos>")
    assert [(e.rule, e.path) for e in machine.errors] == [("end of sequence", "1"), ("length", "2"), ("cancelled", "3")]
    assert machine.text == block("1:a", "2:b", "3:c") + "<Thread>1:xy</Thread><Thread>2:12345</Thread><Thread>3:</Thread></Parallel>56"
    assert machine.finish_reason == "stop"
    stray = next(s for s, ids in enumerate(machine.tree.ids) if ids == [machine.eos])   # scored, but seen by nobody
    assert machine.tree.sampled[stray] and machine.logprobs[stray] == [-3] and not any(stray in p for p in machine.tree.parents)
    assert machine.eos not in machine.main.context_ids[:-1]


def test_budget_spent():
    machine = start(limits=Limits(max_tokens=29))
    say(machine, "main", TWO)
    assert [b.budget for b in machine.ready] == [5, 5]
    say(machine, "2", "x" * 5, "length"); say(machine, "1", "y" * 5, "length")
    assert machine.ready == [machine.main] and machine.main.budget == 6   # a share of its own, to answer with
    say(machine, "main", "z" * 6, "length")
    assert machine.done and machine.finish_reason == "length" and not machine.ready
    alone = start(limits=Limits(max_tokens=4))
    say(alone, "main", "1234", "length")
    assert alone.finish_reason == "length" and alone.text == "1234"
    with pytest.raises(ValueError, match="more than the budget of 4"): say(start(limits=Limits(max_tokens=4)), "main", "12345", "length")


def test_many_ids_may_end_a_text():
    "Each ends the main thread and closes a thread; a thread's is scored and seen by nobody; all are remembered."
    eos, pad, hash_ = char.eos_token_id, char.pad_token_id, encode_text(char, "#")[0]
    for mode, inside in [("parallel", control_ids(char)["</Outlines>"]), ("sequential", None), ("autoregressive", None)]:
        machine = start(mode=mode, stops=[eos, hash_, pad])
        assert machine.eos == eos and machine.end is None and set(machine.main.stop_ids) - {inside} == {eos, hash_, pad}
        say(machine, "main", "56#")
        assert (machine.finish_reason, machine.end, machine.text) == ("stop", hash_, "56")
        for how in ("parallel", mode):
            assert replay(machine.trajectory, machine.tree.ids[0], char, mode=how, stops=machine.stops, end=machine.end) == machine.tree
    machine = start(stops=[eos, hash_, pad])
    for step in [("main", block("1:a", "2:b", "3:c")), ("1", "x#"), ("2", "y<pad>"), ("3", "z<eos>"), ("main", "56<pad>")]: say(machine, *step)
    assert machine.text.endswith("<Thread>1:x</Thread><Thread>2:y</Thread><Thread>3:z</Thread></Parallel>56") and machine.end == pad
    assert [e.rule for e in machine.errors] == ["end of sequence"] * 3
    for i in (hash_, pad, eos):
        stray = next(s for s, ids in enumerate(machine.tree.ids) if ids == [i])
        assert machine.tree.sampled[stray] and not any(stray in p for p in machine.tree.parents)
    options = dict(stops=machine.stops, end=machine.end)
    assert replay(machine.trajectory, machine.tree.ids[0], char, **options) == machine.tree
    context, completion = units(machine.trajectory, machine.tree.ids[0], char, **options)[-1]
    assert completion[-1] == pad and not {hash_, pad, eos} & set(context)   # what ended a thread is not read again
    with pytest.raises(ValueError, match="behind a stop token"): say(start(stops=[eos, hash_]), "main", "5#6<eos>")
    assert say(start(), "main", "5#6<eos>") == []   # not a stop token unless it is said to be one


def test_a_stop_token_counts_even_at_the_limit():
    machine = start()
    say(machine, "main", TWO); say(machine, "1", "a</Thread>", "length"); say(machine, "2", "b</Thread>", "length")
    assert not machine.errors and machine.text.endswith("<Thread>1:a</Thread><Thread>2:b</Thread></Parallel>")


def test_wrong_feeds():
    machine = start()
    with pytest.raises(ValueError, match="no stop token"): say(machine, "main", "abc")
    with pytest.raises(ValueError, match="behind a stop token"): say(machine, "main", "a<eos>b")
    with pytest.raises(ValueError, match="1 logprobs for 2 ids"): say(machine, "main", "a<eos>", "stop", [0])
    say(machine, "main", TWO)
    with pytest.raises(ValueError, match="branch main does not want tokens now"): machine.feed(machine.main, [machine.eos])
    assert len(machine.tree) == 4   # nothing of this has left a trace
    thread = machine.ready[0]
    machine.cancel(thread)
    with pytest.raises(ValueError, match="branch 1 is closed already"): machine.cancel(thread)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown mode 'turbo': choose one of parallel, sequential, autoregressive"): start(mode="turbo")
    with pytest.raises(ValueError, match="unknown join 'zip': choose one of concat"): start(join="zip")
    with pytest.raises(ValueError, match="unknown join 'zip'"): get_join("zip")


def test_control_tokens_in_the_question():
    machine = start(f"what is {TWO}?")
    assert not set(control_ids(char).values()) & set(machine.tree.ids[0])
    assert say(machine, "main", "</Outlines>") == ["main"] and machine.errors[0].rule == "close_without_open"


def test_cancel_what_waits():
    machine = start()
    for step in [("main", TWO), ("1", "x" + TWO), ("1.1", "u</Thread>")]: say(machine, *step)
    machine.cancel(machine.main.threads[0], "error")
    assert [(e.rule, e.path) for e in machine.errors] == [("error", "1.2"), ("error", "1")] and [b.name for b in machine.ready] == ["2"]
    machine.cancel(machine.main)
    assert machine.done and machine.finish_reason == "cancelled" and machine.tree.pack()


def test_cancel_takes_every_waiting_thread_below():
    "Thread 1 waits for 1.1, which waits for its own: the innermost are closed and joined first, and nothing that was written is lost."
    machine = start()
    for step in [("main", TWO), ("1", "x" + TWO), ("1.1", "y" + TWO), ("1.1.2", "u")]:
        say(machine, *step, *(["length"] if step[1] == "u" else []))
    machine.cancel(machine.main.threads[0])
    assert [(e.rule, e.path) for e in machine.errors] == [("length", "1.1.2")] + [("cancelled", p) for p in ("1.1.1", "1.1", "1.2", "1")]
    assert [b.name for b in machine.branches] == ["main", "1", "2"] and [b.name for b in machine.ready] == ["2"]
    say(machine, "2", "</Thread>"); say(machine, "main", "56<eos>")
    inner = f"{TWO}<Thread>1:</Thread><Thread>2:u</Thread></Parallel>"
    middle = f"x{TWO}<Thread>1:y{inner}</Thread><Thread>2:</Thread></Parallel>"
    assert machine.text == f"{TWO}<Thread>1:{middle}</Thread><Thread>2:</Thread></Parallel>56" and not check_format(machine.text)
    assert replay(machine.trajectory, machine.tree.ids[0], char) == machine.tree


def test_text_while_a_fork_is_open():
    machine = start()
    say(machine, "main", "so " + TWO)
    assert machine.text == f"so {TWO}<Thread>1:</Thread><Thread>2:</Thread></Parallel>"
    say(machine, "2", "x" + TWO); say(machine, "2.1", "u</Thread>")
    assert machine.trajectory[1].threads[1].body[1].threads[0].body == [Text("u")]
    assert machine.text.count("<Thread>") == 4


# ---- conclusions, modes, errors

@pytest.mark.parametrize("text, body, conclusion", [
    ("work<Conclusion>7</Conclusion>", "work", "7"), ("work<Conclusion></Conclusion>", "work", ""), ("work", "work", None),
    ("<Conclusion>7", "<Conclusion>7", None), ("<Conclusion>7</Conclusion>x", "<Conclusion>7</Conclusion>x", None),
    ("<Conclusion>1</Conclusion><Conclusion>2</Conclusion>", "<Conclusion>1</Conclusion><Conclusion>2</Conclusion>", None)])
def test_conclusions(text, body, conclusion):
    machine = start()
    say(machine, "main", TWO); say(machine, "1", text + "</Thread>"); say(machine, "2", "</Thread>"); say(machine, "main", "<eos>")
    assert machine.trajectory[0].threads[0] == Thread([Text(body)], conclusion)
    assert machine.text == f"{TWO}<Thread>1:{text}</Thread><Thread>2:</Thread></Parallel>"
    assert replay(machine.trajectory, machine.tree.ids[0], char) == machine.tree



def test_tokenizer_without_control_tokens():
    from transformers import PreTrainedTokenizerFast
    bare = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS["char"]().backend_tokenizer, unk_token="<unk>")
    with pytest.raises(ValueError, match="no end-of-sequence token"): ForkJoin([20], bare)
    assert ForkJoin([20], bare, stops=[1]).eos == 1


def test_the_table_of_pitfalls_names_tests_that_exist():
    folder = Path(__file__).parent
    text = (folder.parent / "nbs" / "05_forkjoin.ipynb").read_text(encoding="utf-8")
    files = set(re.findall(r"(test_\w+\.py)::", text))
    written = "".join((folder / name).read_text(encoding="utf-8") for name in files)
    names = set(re.findall(r"`(?:test_\w+\.py::)?(test_\w+)`", text))
    assert len(names) >= 8 and not [name for name in names if f"def {name}(" not in written]


def test_blanks_behind_a_tag_are_kept():
    "Some tokenizers leave out a blank where a text begins (Llama 2, Mistral). What branches wrote is read as it stands in the line."
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(unk_token="<unk>")), eos_token="<eos>", unk_token="<unk>")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.backend_tokenizer.train_from_iterator(["so the p q: 1 2 "] * 9, trainers.BpeTrainer(vocab_size=40, special_tokens=["<unk>", "<eos>"],
                                                                                                 show_progress=False))
    add_control_tokens(tokenizer)
    ids = lambda text: [i for part in re.split(r"(?=<)|(?<=>)", text) if part for i in encode_text(tokenizer, part)]
    machine = ForkJoin(ids("so"), tokenizer)
    machine.feed(machine.ready[0], ids(TWO), "stop")
    for said in ("the", "so"): machine.feed(machine.ready[0], [*ids(said), control_ids(tokenizer)["</Thread>"]], "stop")
    machine.feed(machine.ready[0], [*ids("the so"), tokenizer.eos_token_id], "stop")
    fork, end = machine.trajectory
    assert [t.body[0].text for t in fork.threads] == [" the", " so"] and end.text == " the so"
