"""Settings, and one problem's row without a model: against the replay of its trajectory."""
import pytest
import torch
from helpers import TOKENIZERS, random_forks, random_text, rngs

from threadweaver_ref.forkjoin import ForkJoin, Limits
from threadweaver_ref.format import Fork, token_counts
from threadweaver_ref.joins import JOINS, reprefilled
from threadweaver_ref.replay import play, replay
from threadweaver_ref.rollout import DecodeConfig, Row
from threadweaver_ref.tokenizer import control_ids, encode_prompt, encode_text

# ---- settings

@pytest.mark.parametrize("options, message", [
    (dict(mode="tree"), "unknown mode 'tree': choose one of parallel, sequential, autoregressive"),
    (dict(join="glue"), "unknown join 'glue': choose one of concat, result, kv"),
    (dict(deadline=0), "deadline=0: must be at least 1"),
    (dict(max_lanes=0), "max_lanes=0: must be at least 1"),
    (dict(max_lanes=2, deadline=9), "deadline and max_lanes: choose one"), (dict(fork_below=0), "fork_below=0: must be at least 1"),
    (dict(temperature=-.1), "temperature=-0.1"), (dict(temperature=float("nan")), "temperature=nan"),
    (dict(temperature=float("inf")), "temperature=inf"), (dict(top_p=0), "top_p=0: must be above 0 and at most 1"),
    (dict(top_p=1.5), "top_p=1.5"), (dict(top_k=-1), "top_k=-1: must not be negative"), (dict(batch=0), "batch=0: must be at least 1")])
def test_bad_config(options, message):
    with pytest.raises(ValueError) as error: DecodeConfig(**options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["max_threads", "max_forks", "max_depth", "max_tokens", "max_thread_tokens"])
def test_bad_limits(name):
    with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"): DecodeConfig(limits=Limits(**{name: 0}))


# ---- a row, and who plays the model

NO_LIMITS = Limits(max_threads=10 ** 6, max_forks=10 ** 6, max_depth=50, max_tokens=10 ** 9, max_thread_tokens=10 ** 9)


def played(trajectory, question, tokenizer, join):
    "The rollout of a trajectory, one recorded token a step for each live branch; what every token is shown is checked on the way."
    prompt = encode_prompt(tokenizer, question)
    said = {(b.path, b.forks, b.used): ids for _, b, ids in play(trajectory, prompt, tokenizer, join)}
    row, step = Row(0, 0, question, ForkJoin(prompt, tokenizer, join, NO_LIMITS), seed=0), 0
    holds = {}   # slot -> id of the token in it

    def write(live):
        branch = live.branch
        live.ids.append(said[branch.path, branch.forks, branch.used][len(live.ids)])
        live.logprobs.append(0.)
        if live.stopped: row.feed(live, step, live.stopped)

    while not row.machine.done:
        while starting := row.starting():
            reading = row.reading(starting)
            holds.update(zip(reading.slots, reading.ids, strict=True))
            # of what was written, the last token alone is not there yet
            assert not [s for s in reading.spans if row.machine.tree.sampled[s] and reading.spans.count(s) > 1]
            for b, end in zip(starting, reading.ends, strict=True):
                seen = {holds[j] for j in row.seen(b).nonzero()[:, 0].tolist()}
                assert row.seen(b).sum() == len(b.context_ids) and seen == set(b.context_ids) and reading.ids[end] == b.context_ids[-1]
                assert torch.equal(reading.mask(slice(end, end + 1))[0], row.seen(b))
            for live in [row.open(b, step, 0) for b in starting]: write(live)
        step += bool(row.live)
        for live in list(row.live):
            live.slots += row.book.take(1)
            holds[live.slots[-1]] = live.ids[-1]
            write(live)
    return row.rollout(step)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("join", JOINS)
def test_a_row_is_the_replay_of_its_trajectory(name, join):
    tokenizer = TOKENIZERS[name]()
    for rng in rngs(8, f"row {name} {join}"):
        trajectory, question = random_forks(rng, depth=3, conclusions=join == "result"), random_text(rng) + "?"
        rollout = played(trajectory, question, tokenizer, join)
        assert rollout.tree == replay(trajectory, encode_prompt(tokenizer, question), tokenizer, join)
        assert (rollout.token_latency, rollout.total_tokens) == token_counts(trajectory, lambda t: len(encode_text(tokenizer, t)))
        assert rollout.decode_steps == max(i.end for i in rollout.timeline) - min(i.start for i in rollout.timeline) + 1
        assert rollout.finish_reason == "stop" and not rollout.errors and sum(len(i.ids) for i in rollout.timeline) == len(rollout.logprobs)


def reads_again(nodes, length):
    "By the text: what `concat` lines up behind the first thread of every fork. A line's own forks are read again with it."
    total = 0
    for fork in [n for n in nodes if isinstance(n, Fork)]:
        whole = [token_counts(t.body, length, end=False)[1] for t in fork.threads]
        tags = [length(f"<Thread>{i}:") + length(("" if t.conclusion is None else f"<Conclusion>{t.conclusion}</Conclusion>") + "</Thread>")
                for i, t in enumerate(fork.threads, 1)]
        total += sum(a + b for a, b in list(zip(whole, tags, strict=True))[1:]) + sum(reads_again(t.body, length) for t in fork.threads)
    return total


@pytest.mark.parametrize("rng", rngs(12, "reprefilled"), ids=range(12))
def test_what_a_join_prefills_again(rng):
    "The character tokenizer: token counts add up."
    char = TOKENIZERS["char"]()
    trajectory, prompt = random_forks(rng, depth=3), encode_prompt(char, "1?")
    rollout = {join: played(trajectory, "1?", char, join) for join in ("concat", "kv")}
    assert reprefilled(rollout["kv"].tree, control_ids(char)) == 0 and replay(trajectory, prompt, char) == rollout["concat"].tree
    assert reprefilled(rollout["concat"].tree, control_ids(char)) == reads_again(trajectory, lambda t: len(encode_text(char, t)))
