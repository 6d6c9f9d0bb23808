"""`generate(custom_generate=...)`: in this process, and from a folder where this package is not installed."""
import contextlib
import copy
import os
import random
import subprocess
import sys

import pytest
import torch
from helpers import TOKENIZERS, random_text, tiny
from test_decode import Script, random_plan
from transformers import GenerationConfig, pipeline

from threadweaver_ref.decode import DecodeConfig, generate
from threadweaver_ref.domains import split_problems
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.model import decoding_copy, load_policy
from threadweaver_ref.parallel import RowStops, parallel_generate, written
from threadweaver_ref.serve import needed, save_policy
from threadweaver_ref.tokenizer import encode_text

char = TOKENIZERS["char"]()


def mixed(n): return [p.question for some in zip(*split_problems("programs", "dev", n).values()) for p in some]


@pytest.fixture(scope="module")
def tiny_rl():
    model, tokenizer = load_policy("tiny-rl", device="cpu")
    return decoding_copy(model), tokenizer


def padded(tokenizer, questions): return tokenizer(questions, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)


@pytest.mark.parametrize("policy, join", [("tiny-rl", "concat"), ("tiny-result", "result")])
def test_token_for_token_the_local_rollouts(policy, join):
    model, tokenizer = load_policy(policy, device="cpu")
    model, questions, machines = decoding_copy(model), mixed(1)[1:], []
    local = generate(model, tokenizer, questions, DecodeConfig(join=join))
    found = model.generate(**padded(tokenizer, questions), custom_generate=parallel_generate, join=join, machines=machines, max_new_tokens=4096)
    assert [m.tree.sorted() for m in machines] == [r.tree for r in local] and [m.text for m in machines] == [r.text for r in local]
    assert sum(r.forks for r in local) > 0
    for row, machine, question in zip(found.tolist(), machines, questions):
        ids = [i for i in row if i != tokenizer.pad_token_id]
        assert ids == machine.main.context_ids and ids[-1] == tokenizer.eos_token_id
        if join == "concat": assert tokenizer.decode(ids) == question + machine.text + tokenizer.eos_token


@pytest.mark.parametrize("mode", ["sequential", "autoregressive"])
def test_on_one_line_with_random_weights(mode):
    model, rng, machines = tiny("Llama", char), random.Random(mode), []
    questions = [random_text(rng, 6) + "?" for _ in range(5)]
    local = generate(model, char, questions, DecodeConfig(mode, limits=Limits(max_tokens=25)))
    model.generate(**padded(char, questions), custom_generate=lambda model, input_ids=None, **options: parallel_generate(
        model, input_ids, tokenizer=char, mode=mode, machines=machines, **options), max_new_tokens=25)
    assert [(m.text, m.finish_reason) for m in machines] == [(r.text, r.finish_reason) for r in local]


def test_nested_forks_and_all_ends(monkeypatch):
    "A script forces the structure, here and in the local decoder."
    from threadweaver_ref import parallel
    model, rng, machines, limits = tiny("Qwen3", char), random.Random(0), [], Limits(max_tokens=400)
    questions = [random_text(rng, 5) + "?" for _ in range(6)]
    local = generate(model, char, questions, DecodeConfig(hook=Script(char, random_plan), limits=limits))
    script = Script(char, random_plan)
    def one_at_a_time(model, branches, pad, options):
        found = []
        for b in branches:
            ids = []
            while len(ids) < b.budget and not (ids and ids[-1] in b.stop_ids):
                with torch.no_grad(): logits = model(torch.tensor([b.context_ids + ids])).logits[0, -1]
                ids.append(int(script(b, ids, logits).argmax()))
            found.append(ids)
        return found
    monkeypatch.setattr(parallel, "one_round", one_at_a_time)
    parallel_generate(model, padded(char, questions)["input_ids"], tokenizer=char, machines=machines, max_new_tokens=400)
    assert [m.tree.sorted() for m in machines] == [r.tree for r in local] and sum(r.forks for r in local) > 3
    assert [sorted(map(str, m.errors)) for m in machines] == [sorted(map(str, r.errors)) for r in local]


def test_temperature_is_the_callers(tiny_rl):
    model, tokenizer = tiny_rl
    torch.manual_seed(0)
    ids = padded(tokenizer, ["a=7+3x4;b=2+5x3;c=a+b;c?"] * 6)
    drawn = {}, dict(do_sample=True, temperature=3.)
    greedy, sampled = (model.generate(**ids, custom_generate=parallel_generate, max_new_tokens=300, **options) for options in drawn)
    assert len({tuple(r) for r in greedy.tolist()}) == 1 < len({tuple(r) for r in sampled.tolist()})


def test_without_a_generation_config_the_callers_options_hold_and_else_the_models(tiny_rl, monkeypatch):
    "As Transformers hands them to a folder's code: as they are, and no config."
    model, tokenizer = tiny_rl
    ids = padded(tokenizer, ["a=7+3x4;b=2+5x3;c=a+b;c?"] * 4)["input_ids"]
    def said(**options):
        torch.manual_seed(0)
        return {tuple(row) for row in parallel_generate(model, ids, tokenizer=tokenizer, **options).tolist()}
    greedy = said(max_new_tokens=100)
    hot = dict(max_new_tokens=100, do_sample=True, temperature=3.0)
    assert len(greedy) == 1 < len(said(**hot)) and len({*greedy, *said(max_new_tokens=100, temperature=3.0)}) == 1
    assert said(**hot, top_k=1) == greedy == said(**hot, top_p=1e-6)
    assert max(map(len, said(max_new_tokens=7))) == ids.shape[1] + 7
    monkeypatch.setattr(model, "generation_config", GenerationConfig(do_sample=True, temperature=3.0, max_new_tokens=100))
    assert len(said()) > 1 and said(do_sample=False) == greedy and said(top_k=1) == greedy
    assert len(said(generation_config=GenerationConfig(max_new_tokens=100))) == 1


def test_every_end_of_the_model_ends_a_text(tiny_rl, monkeypatch):
    model, tokenizer = tiny_rl
    config = copy.deepcopy(model.generation_config)
    config.eos_token_id = [tokenizer.eos_token_id, encode_text(tokenizer, ";")[0]]
    monkeypatch.setattr(model, "generation_config", config)
    ids = padded(tokenizer, ["a=1+2;b=a*3;b?"])["input_ids"]
    assert tokenizer.decode(parallel_generate(model, ids, tokenizer=tokenizer)[0]).endswith(";")


def test_what_a_caller_asks_for_is_done_or_refused(tiny_rl):
    model, tokenizer = tiny_rl
    ids = padded(tokenizer, ["a=1+2;b=a*3;b?"])["input_ids"]
    def said(**options): return tokenizer.decode(parallel_generate(model, ids, tokenizer=tokenizer, max_new_tokens=60, **options)[0])
    semicolon, four = (encode_text(tokenizer, c)[0] for c in ";4")
    assert said(eos_token_id=semicolon).endswith(";") and said(eos_token_id=[semicolon, four]).endswith(";") != said().endswith(";")
    said(eos_token_id=semicolon, machines=(machines := []))
    assert [m.finish_reason for m in machines] == ["stop"]   # it is an end, not a line that was cut
    assert said(repetition_penalty=5.0) != said() == said(repetition_penalty=1.0)
    assert "=" in said()[15:] and "=" not in said(suppress_tokens=encode_text(tokenizer, "="))[15:]
    for name, n in (("num_beams", 4), ("num_return_sequences", 2), ("max_length", 90)):
        with pytest.raises(ValueError, match=name): said(**{name: n})
        with pytest.raises(ValueError) if name != "max_length" else contextlib.nullcontext(): said(generation_config=GenerationConfig(**{name: n}))


@pytest.mark.parametrize("window", [6, 12, 30])
def test_no_token_stands_behind_the_models_window(window):
    "The local decoder closes branches there too."
    model, rng, machines = tiny("Llama", char, max_position_embeddings=window), random.Random(window), []
    questions = [random_text(rng, 3) + "?" for _ in range(3)] + ["1+1+1+1?"]
    local = generate(model, char, questions, DecodeConfig("autoregressive"))
    parallel_generate(model, padded(char, questions)["input_ids"], tokenizer=char, mode="autoregressive", machines=machines)
    assert [(m.text, m.finish_reason, m.tree.sorted()) for m in machines] == [(r.text, r.finish_reason, r.tree) for r in local]
    assert "length" in {r.finish_reason for r in local} and all(len(m.main.context_ids) <= window for m in machines if m.text)


def test_the_pipeline(tiny_rl):
    model, tokenizer = tiny_rl
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)
    question = "a=7+3x9;b=2+5x12;c=4-1x8;d=6+2x10;e=a+b;f=c-d;ef?"
    options = dict(max_new_tokens=1000, return_full_text=False, skip_special_tokens=False)
    said = made(question, custom_generate=parallel_generate, **options)[0]["generated_text"]
    assert said == generate(model, tokenizer, [question])[0].text + tokenizer.eos_token


def test_rows_end_by_themselves():
    stops = RowStops([(6,), (6, 7), (9,)], [5, 5, 2], 1)
    assert stops(torch.tensor([[6, 7], [6, 7], [9, 9]]), None).tolist() == [False, True, True]
    assert stops(torch.tensor([[6, 7, 7], [6, 7, 1], [9, 1, 1]]), None).tolist() == [False, False, True]
    assert written([1, 2, 7, 7], (7,), 9) == [1, 2, 7] and written([1, 2, 7], (7,), 2) == [1, 2] and written([7], (7,), 1) == [7]


def test_padding_is_taken_off_with_a_mask_and_without(tiny_rl):
    model, tokenizer = tiny_rl
    one, batch = mixed(1)[1:2], padded(tokenizer, mixed(1)[1:3])
    alone = parallel_generate(model, padded(tokenizer, one)["input_ids"], tokenizer=tokenizer)
    for mask in ({}, {"attention_mask": batch["attention_mask"]}):
        row = parallel_generate(model, batch["input_ids"], tokenizer=tokenizer, **mask)[0].tolist()
        assert [i for i in row if i != tokenizer.pad_token_id] == alone[0].tolist()


def test_a_token_that_begins_a_text_is_no_padding():
    "Where both are the same one: a row alone, the longest of several, and a shorter one."
    tokenizer, model = copy.deepcopy(char), tiny("Qwen3", char)
    def prompts(rows):
        machines = []
        parallel_generate(model, torch.tensor(rows), tokenizer=tokenizer, machines=machines, max_new_tokens=1)
        return [m.tree.ids[0] for m in machines]
    pad = tokenizer.pad_token_id
    assert prompts([[pad, 30, 24], [30, 24, 30]]) == [[30, 24], [30, 24, 30]] and prompts([[pad, 30]]) == [[30]]
    tokenizer.bos_token = tokenizer.pad_token
    assert prompts([[pad, 30, 24]]) == [[pad, 30, 24]]
    assert prompts([[pad, pad, 30], [pad, 30, 24]]) == [[pad, 30], [pad, 30, 24]] and prompts([[pad, 30], [30, 24]]) == [[30], [30, 24]]


# ---- a folder that forks by itself

PROGRAM = """
import sys
for name in ("threadweaver_ref", "fastcore"): sys.modules[name] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(question, return_tensors="pt").input_ids
for trusted in (False, True):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted)
    named = {} if trusted else {"custom_generate": folder, "trust_remote_code": True, "tokenizer": tokenizer}
    print(tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=1000, **named)[0, ids.shape[1]:]))
    hot = model.generate(input_ids=ids.repeat(5, 1), max_new_tokens=50, do_sample=True, temperature=3.0, **named)
    print(len({tuple(row) for row in hot.tolist()}) > 1)
print(*sorted(n for n, m in sys.modules.items() if m and n.split(".")[0] in ("threadweaver_ref", "fastcore")))
"""


def test_a_saved_policy_forks_where_this_package_is_not_installed(tmp_path):
    "Asked for by name, or loaded as trusted: then it is what `generate` does."
    model, tokenizer = load_policy("tiny-rl", device="cpu")
    save_policy(model, tokenizer, tmp_path / "policy")
    question = "a=7+3x9;b=2+5x12;c=4-1x8;d=6+2x10;e=a+b;f=c-d;ef?"
    env = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "policy"), question], capture_output=True, text=True, cwd=tmp_path, env=env)
    local, = generate(model, tokenizer, [question])
    assert done.stdout.split("\n") == [local.text + tokenizer.eos_token, "True"] * 2 + ["", ""], done.stderr[-2000:]
    assert local.forks == 1


def test_what_is_copied_is_what_is_here(tmp_path):
    model, tokenizer = load_policy("tiny-rl", device="cpu")
    save_policy(model, tokenizer, tmp_path)
    found = {p.stem: p.read_text(encoding="utf-8") for p in (tmp_path / "custom_generate").glob("*.py")}
    assert {*found} == {"generate", "patching", *needed("parallel")} and "fastcore.basics import" not in "".join(found.values())
    again, _ = load_policy(tmp_path, device="cpu")   # merged
    merged = decoding_copy(model).state_dict()
    assert all(torch.equal(p, merged[n]) for n, p in again.state_dict().items())


def test_the_stand_in_for_patch_does_what_patch_does():
    from fastcore.basics import patch as real

    from threadweaver_ref.serve import PATCHING
    names = {}
    exec(PATCHING, names)
    for patch in (real, names["patch"]):
        class A: pass
        @patch
        def add(self: A, n): return n + 1
        @patch(as_prop=True)
        def two(self: A): return 2
        assert A().add(1) == 2 == A().two
