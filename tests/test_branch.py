"""A branch: what an engine is told, its limits."""
import pickle
import random

import pytest
from helpers import TOKENIZERS

from threadweaver_ref.branch import MODES, Branch, Limits, ThreadError
from threadweaver_ref.course import random_tree
from threadweaver_ref.forkjoin import ForkJoin
from threadweaver_ref.tokenizer import control_ids, encode_prompt, encode_text

char = TOKENIZERS["char"]()


def start(**options): return ForkJoin(encode_prompt(char, "7?"), char, **options)


def test_modes():
    c = control_ids(char)
    seen = {mode: (start(mode=mode).main.stop_ids, start(mode=mode).main.banned_ids) for mode in MODES}
    eos = char.eos_token_id
    assert seen == {"parallel": ((c["</Outlines>"], eos), ()), "sequential": ((eos,), tuple(c.values())), "autoregressive": ((eos,), ())}
    machine = start()
    machine.feed(machine.main, encode_text(char, "<Parallel><Outlines><Outline>1:p</Outline><Outline>2:q</Outline></Outlines>"))
    assert machine.ready[0].stop_ids == (c["</Outlines>"], c["</Thread>"], eos)


@pytest.mark.parametrize("name", ["max_threads", "max_forks", "max_depth", "max_tokens", "max_thread_tokens"])
def test_limits_below_one(name):
    with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"): Limits(**{name: 0})


def test_a_context_is_the_line_above():
    "Against walking up the parents."
    class Machine: pass
    machine = Machine()
    for seed in range(20):
        machine.tree = tree = random_tree(random.Random(seed), merges=False)
        for span in range(len(tree)):
            ids, at = [], [span]
            while at: ids, at = tree.ids[at[0]] + ids, tree.parents[at[0]]
            assert Branch(machine, (), span, 9).context_ids == ids


def test_names_and_depth():
    thread = Branch(None, ((1, 2), (3, 1)), 0, quota=9)
    assert (thread.name, thread.depth, thread.ready, Branch(None, (), 0, 9).name) == ("2.1", 2, True, "main")
    thread.used = 4
    assert thread.budget == 5
    thread.threads = []
    assert not thread.ready


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(ThreadError("length", "2.1")))
    assert (error.rule, error.path, str(error)) == ("length", "2.1", "length in thread 2.1")
