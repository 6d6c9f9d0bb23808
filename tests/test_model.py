"""Models: sizes, loading and its refusals, what policies know, control tokens, and LoRA: alone, merged, saved and loaded again."""
import copy
import json
import logging
import random
import re
import shutil
import time
import warnings

import pytest
import torch
from helpers import ARCHITECTURES, DATA, TOKENIZERS, bpe_tokenizer, policies_at_hand, random_text, rngs, tiny
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from threadweaver_ref.domains import find_domain
from threadweaver_ref.format import CONTROL_TOKENS
from threadweaver_ref.model import (
    LONGEST_QUESTION,
    SIZES,
    add_lora,
    decoding_copy,
    find_policy,
    load_policy,
    merge_lora,
    save_policy,
    shipped_policies,
    tiny_model,
    unfamiliar,
)
from threadweaver_ref.schoolbook import FAMILIES, heldout_problems
from threadweaver_ref.tokenizer import char_tokenizer, control_ids

TOKENIZER = char_tokenizer()


def narrow(seed=0, **options):
    torch.manual_seed(seed)
    return tiny_model("tiny", TOKENIZER, **{"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": .2, **options})


def ids(n=30): return torch.tensor([[rngs(1, "ids")[0].randrange(20, 110) for _ in range(n)]])


@torch.no_grad()
def logits(model): return model(input_ids=ids()).logits


def shake(model, scale=.05):
    "Move whatever is trained, as training would."
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad: p.data += scale * torch.randn_like(p)


@pytest.fixture
def policy(tmp_path):
    save_policy(narrow(), TOKENIZER, tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    "A data folder with two policies and an adapter on the first: the shipped ones of this test. The second policy is both, merged."
    monkeypatch.setenv("THREADWEAVER_DATA", str(tmp_path / "data"))
    folder = tmp_path / "data" / "policies"
    save_policy(narrow(), TOKENIZER, folder / "start")
    lora = add_lora(load_policy("start", device="cpu")[0], r=2)
    shake(lora)
    save_policy(lora, TOKENIZER, folder / "adapter")
    save_policy(merge_lora(lora), TOKENIZER, folder / "merged")
    return folder


def test_one_kind_of_policy_a_folder(policy, tmp_path):
    "A whole model beside an adapter would be loaded with the adapter on top, whoever saved it there."
    adapted = add_lora(load_policy(policy, device="cpu")[0], r=2)
    with pytest.raises(ValueError, match="holds a whole model already .config.json.: choose another folder"): save_policy(adapted, TOKENIZER, policy)
    for _ in range(2): save_policy(adapted, TOKENIZER, tmp_path / "adapter")   # the same kind again is a new version
    with pytest.raises(ValueError, match="holds an adapter already"): save_policy(narrow(), TOKENIZER, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists() and not (policy / "adapter_config.json").exists()


def refusal(*args, **options):
    with pytest.raises(ValueError) as refused: load_policy(*args, device="cpu", **options)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
    return str(refused.value)


@pytest.fixture
def said():
    "What transformers logs."
    records, handler = [], logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    yield records
    logging.getLogger("transformers").removeHandler(handler)


# ---- sizes

@pytest.mark.parametrize("size", SIZES)
def test_sizes_by_formula(size):
    d, layers, heads = (SIZES[size][k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    by_hand = len(TOKENIZER) * d + layers * (4 * d * 32 * heads + 9 * d * d + 2 * d + 64) + d
    model = tiny_model(size, TOKENIZER)
    assert sum(p.numel() for p in model.parameters()) == by_hand
    assert not model.training and model.config.eos_token_id == TOKENIZER.eos_token_id


def test_a_size_can_be_changed():
    config = tiny_model("tiny", TOKENIZER, hidden_size=32, num_hidden_layers=1, vocab_size=7, tie_word_embeddings=False).config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size, config.tie_word_embeddings) == (32, 1, 7, False)
    assert config.num_attention_heads == SIZES["tiny"]["num_attention_heads"]


def test_unknown_size():
    with pytest.raises(ValueError, match="unknown size 'huge': choose one of mini, tiny, small"): tiny_model("huge", TOKENIZER)


# ---- loading

def test_round_trip(policy):
    model, tokenizer = load_policy(policy, device="cpu")
    assert torch.equal(logits(model), logits(narrow())) and not model.training and model.dtype == torch.float32
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert [f.name for f in policy.glob("*") if f.suffix in (".bin", ".pt", ".pkl")] == [] and (policy / "model.safetensors").is_file()


def test_shipped():
    assert "schoolbook-sft" in shipped_policies()
    for name in policies_at_hand():
        model, tokenizer = load_policy(name, device="cpu")
        assert len(tokenizer) == model.config.vocab_size and set(CONTROL_TOKENS) <= set(tokenizer.all_special_tokens)


def test_an_adapter_and_its_merged_policy_are_one(shelf):
    adapted, merged, start = (logits(load_policy(name, device="cpu")[0]) for name in ("adapter", "merged", "start"))
    torch.testing.assert_close(adapted, merged, atol=1e-4, rtol=0)
    assert (adapted - start).abs().max() > .1


def test_a_shipped_adapter_is_found_by_any_name(shelf, monkeypatch, tmp_path):
    "By name, by folder, on its base; from any current directory; by peft alone from the root of the repository."
    monkeypatch.chdir(tmp_path)
    loaded = [load_policy("adapter", device="cpu"), load_policy("data/policies/adapter", device="cpu"),
              load_policy("start", adapter="adapter", device="cpu")]
    by_peft = AutoPeftModelForCausalLM.from_pretrained("data/policies/adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copytree(shelf / "adapter", "mine")
    loaded += [load_policy(name, device="cpu") for name in ("adapter", "mine", "data/policies/adapter")]
    wanted = logits(by_peft)
    assert all(torch.equal(logits(model), wanted) and not model.training for model, _ in loaded)
    assert list(shipped_policies()) == ["adapter", "merged", "start"]


def test_an_adapter_is_no_base(shelf, tmp_path):
    shutil.copytree(shelf / "adapter", tmp_path / "second")
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    (tmp_path / "second" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "adapter"}))
    assert "merge that one first" in refusal(tmp_path / "second")
    assert "is an adapter itself" in refusal("adapter", adapter="adapter")


def test_the_base_of_an_adapter_is_found_or_named(policy, tmp_path, monkeypatch):
    base, adapter = load_policy(policy, device="cpu")[0], tmp_path / "adapter"
    save_policy(add_lora(base, r=2), TOKENIZER, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    def named(name):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
        return adapter
    assert config["base_model_name_or_path"] == str(policy)   # the whole path: it is found from anywhere
    monkeypatch.chdir("/")
    shutil.copytree(policy, adapter / "base")
    for name in (str(policy), "policy", "../policy", "base"): load_policy(named(name), device="cpu")
    monkeypatch.chdir(tmp_path.parent)
    load_policy(named(f"{tmp_path.name}/policy"), device="cpu")   # beside the current directory
    for name in (None, "", "nope", "/nope", "../nope"):
        message = refusal(named(name))
        assert "load its base with adapter=" in message and (not name or repr(name) in message)
    assert "cannot load policy" in refusal(named("owner/nope"))   # a hub name, and there is no network


def test_a_saved_adapter_names_a_base_that_lasts(tmp_path):
    def kept(model):
        save_policy(model, TOKENIZER, tmp_path / "adapter")
        named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert model.peft_config["default"].base_model_name_or_path == named
        return named
    for name in ("schoolbook-sft", find_policy("schoolbook-sft")):
        model = add_lora(load_policy(name, device="cpu")[0], r=2)
        assert kept(model) == "data/policies/schoolbook-sft"
    for name, wanted in [("schoolbook-sft", "data/policies/schoolbook-sft"), ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B")]:   # as a recipe may say it
        model.peft_config["default"].base_model_name_or_path = name
        assert kept(model) == wanted


def test_names_are_not_downloaded(monkeypatch, tmp_path):
    assert find_policy("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    monkeypatch.setenv("THREADWEAVER_DATA", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="none shipped"): find_policy("schoolbook-sft")


def test_a_folder_needs_no_data_folder(policy, monkeypatch, tmp_path):
    monkeypatch.setenv("THREADWEAVER_DATA", str(tmp_path / "none"))
    load_policy(policy, device="cpu")


@pytest.mark.parametrize("name", ["nope", "a/b/c", "./nope", "/nope"])
def test_unknown_names(name):
    assert repr(name) in refusal(name) and "schoolbook-sft" in refusal(name)


def test_at_most_a_dozen_names(monkeypatch, tmp_path):
    monkeypatch.setenv("THREADWEAVER_DATA", str(tmp_path))
    for i in range(40):
        (tmp_path / "policies" / f"made-{i:02}").mkdir(parents=True)
        (tmp_path / "policies" / f"made-{i:02}" / "adapter_config.json").write_text("{}")
    for message in (refusal("nope"), refusal(DATA / "policies" / "schoolbook-sft", adapter="nope")):
        assert message.count("made-") == 11 and message.endswith("made-10, 29 more")


def test_folder_without_config(tmp_path): assert "it has no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 1000, 20_000])
def test_truncated_weights(policy, keep):
    weights = policy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert refusal(policy).startswith(f"cannot load policy {str(policy)!r}: Error while deserializing")


def test_missing_files(policy):
    (policy / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(policy)
    (policy / "config.json").write_text("{")
    assert "not a valid JSON" in refusal(policy)


def test_a_missing_weight_is_not_made_up(policy, said):
    weights = load_file(policy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, policy / "model.safetensors", {"format": "pt"})
    assert "no weights for model.layers.1.mlp.up_proj.weight" in refusal(policy)
    save_file({k: v for k, v in weights.items() if "layers" not in k}, policy / "model.safetensors", {"format": "pt"})
    assert refusal(policy).count("model.layers") == 3 and not said   # nor a table of all of them


def test_another_shape(policy):
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    refusal(policy)


def test_what_is_none_of_our_errors_is_explained(policy):
    (policy / "tokenizer.json").write_text("{}")
    assert refusal(policy).endswith("a file in it is malformed (KeyError: 'added_tokens')")


def test_pickled_weights_are_not_read(policy):
    torch.save(load_file(policy / "model.safetensors"), policy / "pytorch_model.bin")
    (policy / "model.safetensors").unlink()
    assert "safetensors" in refusal(policy)


@pytest.mark.parametrize("broken", ["config.json", "adapter_config.json", "tokenizer.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\x00\xff"])
def test_whatever_is_broken_is_one_line(policy, tmp_path, said, broken, content):
    save_policy(add_lora(load_policy(policy, device="cpu")[0], r=2), TOKENIZER, tmp_path / "adapter")
    path = (tmp_path / "adapter" if "adapter" in broken else policy) / broken
    path.unlink() if content is None else path.write_bytes(content)
    said.clear()
    with warnings.catch_warnings(record=True) as warned: refusal(tmp_path / "adapter")
    assert not said and not [w for w in warned if "missing" in str(w.message)]   # no table, no list beside it


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\x00\xff"])
def test_a_broken_tokenizer_config_is_one_line(policy, content):
    (policy / "tokenizer_config.json").write_bytes(content)
    refusal(policy)


# ---- what transformers 4, and engines that go by its classes, can read

def test_saved_tokenizers_are_of_a_class_that_all_know(policy, tmp_path):
    folders = [policy, *shipped_policies().values()]
    save_policy(tiny("Llama", bpe_tokenizer()), bpe_tokenizer(), tmp_path / "bpe")
    for folder in [*folders, tmp_path / "bpe"]:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert not {"backend", "is_local", "local_files_only", "extra_special_tokens"} & set(config)   # the last: a list breaks transformers 4
    _, tokenizer = load_policy(tmp_path / "bpe", device="cpu")
    assert set(tokenizer.all_special_tokens) == set(bpe_tokenizer().all_special_tokens) > set(CONTROL_TOKENS)


# ---- what a policy knows

KNOWN = ["12*3+4*5?", "3*4*5?", "((1+2)*3-4)?", "(12-(3*4))?", "a=48/2;b=a+7;b?", "12*3?", "A=1+2;A?"]
UNKNOWN = ["abc?", "What is 3 plus 4?", "", "?", "12?", "12*?", "*3?", "12*3+4*5", "a=;a?", "a=1+;a?", "a=1+2;?", "a=1+2", "1+2?\n",
           "12 * 3?", "1.5*2?", "x*3?", "12*3?12*3?", "-5*3?", "²*3?", "٣*4?", "a=b;b?", "🙂"]


KNOWS = json.loads((DATA / "policies" / "schoolbook-sft" / "config.json").read_text())["knows"]


def test_what_is_unfamiliar():
    model = load_policy("schoolbook-sft", device="cpu")[0]
    assert unfamiliar(model, "What is 3 plus 4?") == f"this policy was trained on {KNOWS['says']} (no other question has a meaningful answer)"
    assert [q for q in KNOWN if unfamiliar(model, q)] == [] and [q for q in UNKNOWN if not unfamiliar(model, q)] == []
    for model in (narrow(), tiny("Llama", TOKENIZER)): assert unfamiliar(model, "abc?") is None


@pytest.mark.parametrize("length, known", [(LONGEST_QUESTION - 1, True), (LONGEST_QUESTION + 1, False)])
def test_what_is_too_long_is_unfamiliar(length, known):
    assert len(question := "1+" * (length // 2 - 1) + "12?") == length
    assert (unfamiliar(narrow(knows=KNOWS), question) is None) == known


def test_every_tiny_shipped_policy_says_what_it_knows():
    "In a pattern that matches no question in English."
    for name in policies_at_hand():
        if not name.startswith("smollm2"): assert unfamiliar(load_policy(name, device="cpu")[0], "What is 3 plus 4?")


def test_nothing_that_was_trained_on_is_unfamiliar():
    model, rng = narrow(knows=KNOWS), random.Random(0)
    for family in FAMILIES:
        questions = [p.question for p in heldout_problems(family)]
        assert len(questions) == 500 and [q for q in questions if unfamiliar(model, q)] == []
    samplers = [*find_domain("schoolbook").samplers.values(), *(lambda rng, step, f=f: f(rng) for f in FAMILIES.values())]
    drawn = [f(rng, step).question for f in samplers for step in (0, 1000, 10 ** 6) for _ in range(40)]
    assert [q for q in drawn if unfamiliar(model, q)] == []


def test_what_a_policy_knows_stays_with_it(tmp_path):
    model = narrow(knows=KNOWS)
    save_policy(model, TOKENIZER, tmp_path / "policy")
    loaded, _ = load_policy(tmp_path / "policy", device="cpu")
    adapted = add_lora(loaded, r=2)
    save_policy(merge_lora(copy.deepcopy(adapted)), TOKENIZER, tmp_path / "merged")
    for m in (loaded, adapted, load_policy(tmp_path / "merged", device="cpu")[0]): assert unfamiliar(m, "abc?") and not unfamiliar(m, "1+2?")


def test_a_question_cannot_keep_the_pattern_busy():
    began = time.perf_counter()
    for piece in ("(", "1", "1+", "1)", "(1", "1*1+", "a=1+1;", "a=1+a;", ")", "a"):
        for end in ("x", "?x", "??"): re.fullmatch(KNOWS["pattern"], piece * 5000 + end)
    assert time.perf_counter() - began < 5


# ---- control tokens

def plain_tokenizer():
    "Of a model that has never seen a control token."
    words = {w: i for i, w in enumerate(["<pad>", "<eos>", *"0123456789+-*/=;?"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize("tied", [True, False])
def test_control_tokens_are_added_at_the_mean(tmp_path, tied):
    plain = plain_tokenizer()
    stranger = tiny("Qwen3", plain, tie_word_embeddings=tied)
    save_policy(stranger, plain, tmp_path / "stranger")
    model, tokenizer = load_policy(tmp_path / "stranger", device="cpu")
    assert len(tokenizer) == len(plain) + len(CONTROL_TOKENS) == model.config.vocab_size
    for ours, theirs in [(model.get_input_embeddings(), stranger.get_input_embeddings()),
                         (model.get_output_embeddings(), stranger.get_output_embeddings())]:
        old, new = ours.weight[:len(plain)], ours.weight[len(plain):]
        assert torch.equal(old, theirs.weight) and torch.allclose(new, old.mean(0).expand_as(new), rtol=0, atol=2e-3 * old.std().item())
        assert len(new.unique(dim=0)) == len(CONTROL_TOKENS)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    save_policy(model, tokenizer, tmp_path / "again")   # and now they are there
    assert torch.equal(load_policy(tmp_path / "again", device="cpu")[0].get_input_embeddings().weight, model.get_input_embeddings().weight)


# ---- LoRA

@pytest.mark.parametrize("arch, tied", [("Qwen3", True), ("Llama", False)])
@pytest.mark.parametrize("new_tokens", [False, True])
def test_lora_round_trip(tmp_path, arch, tied, new_tokens):
    base = tiny(arch, TOKENIZER, tie_word_embeddings=tied)
    save_policy(base, TOKENIZER, tmp_path / "base")
    before = logits(base)
    lora = add_lora(base, r=4, train_tokens=list(control_ids(TOKENIZER).values()) if new_tokens else ())
    assert torch.equal(logits(lora), before)
    trained = [n for n, p in lora.named_parameters() if p.requires_grad]
    assert trained and all("lora" in n or new_tokens and "trainable_tokens" in n for n in trained)
    shake(lora)
    moved = logits(lora)
    assert (moved - before).abs().max() > .1
    save_policy(lora, TOKENIZER, tmp_path / "adapter")
    assert {f.suffix for f in (tmp_path / "adapter").glob("adapter_model.*")} == {".safetensors"}
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as f: assert len(f.keys()) >= len(trained)
    adapted, _ = load_policy(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu")
    assert torch.equal(logits(adapted), moved)
    merged = merge_lora(lora)
    assert torch.allclose(logits(merged), moved, atol=1e-4)
    save_policy(merged, TOKENIZER, tmp_path / "merged")
    assert torch.equal(logits(load_policy(tmp_path / "merged", device="cpu")[0]), logits(merged))
    assert torch.equal(logits(load_policy(tmp_path / "base", device="cpu")[0]), before)   # the base is as it was


@pytest.mark.parametrize("r, alpha", [(2, 32), (2, 1), (8, 32)])
def test_an_adapter_is_scaled_by_alpha_over_r(r, alpha):
    lora = add_lora(narrow(), r=r, alpha=alpha)
    shake(lora)
    layer = lora.base_model.model.model.layers[1].mlp.down_proj
    A, B, W = layer.lora_A.default.weight, layer.lora_B.default.weight, layer.base_layer.weight
    assert A.shape[0] == B.shape[1] == r
    x = torch.randn(5, W.shape[1])
    torch.testing.assert_close(layer(x), x @ (W + alpha / r * B @ A).T)


class Stranger:
    "A saved policy whose tokenizer has no control tokens, with spare rows in its embedding, as released models have."
    def __init__(self, folder, tied, padding=0):
        self.plain, self.folder = plain_tokenizer(), folder
        save_policy(tiny("Llama", self.plain, tie_word_embeddings=tied, vocab_size=len(self.plain) + padding), self.plain, folder)

    def load(self):
        model, tokenizer = load_policy(self.folder, device="cpu")
        return model, tokenizer, list(control_ids(tokenizer).values())


@pytest.mark.parametrize("padding", [0, 20])
@pytest.mark.parametrize("tied", [True, False])
def test_new_token_rows_are_trained_by_default_and_told_apart(tmp_path, tied, padding):
    model, _, new = Stranger(tmp_path / "base", tied, padding).load()
    weights = [h.weight.detach().clone() for h in (model.get_input_embeddings(), model.get_output_embeddings())]
    lora = add_lora(model, r=4)
    assert set(map(tuple, lora.peft_config["default"].trainable_token_indices.values())) == {tuple(new)}
    assert len(lora.peft_config["default"].trainable_token_indices) == 2 - tied   # as input and as output
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=1.0)
    batch = torch.tensor([[3, *new, 4, *new]])
    lora(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    merged = merge_lora(lora)
    for head, before in zip((merged.get_input_embeddings(), merged.get_output_embeddings()), weights, strict=True):
        moved = (head.weight - before).norm(dim=1)
        assert (moved[new] > 1e-4).all() and moved[[i for i in range(len(moved)) if i not in new]].max() == 0
        apart = torch.cdist(head.weight[new], head.weight[new]) + torch.eye(len(new))
        assert apart.min() > 1e-4
    assert add_lora(merged, r=2).peft_config["default"].trainable_token_indices is None   # trained by now: no longer new


def test_which_tokens_are_trained(tmp_path):
    model, _, new = Stranger(tmp_path / "base", True).load()
    def rows(**options): return add_lora(copy.deepcopy(model), r=2, **options).peft_config["default"].trainable_token_indices
    assert rows() == rows(train_tokens="new") == {"model.embed_tokens": new}
    assert rows(train_tokens=()) is None and rows(train_tokens=[4, 5]) == {"model.embed_tokens": [4, 5]}
    with pytest.raises(ValueError, match="unknown train_tokens 'old': give ids, or new"): rows(train_tokens="old")
    for trained in (narrow(), load_policy("schoolbook-sft", device="cpu")[0]):
        assert add_lora(trained, r=2).peft_config["default"].trainable_token_indices is None


@pytest.mark.parametrize("train_tokens", ["new", (), (2, 3)])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_new_tokens_is_small_and_comes_back(tmp_path, tied, train_tokens):
    "The embedding is not saved with it: the new rows are made again as they were."
    base = Stranger(tmp_path / "base", tied)
    model, tokenizer, _ = base.load()
    lora = add_lora(model, r=4, train_tokens=train_tokens)
    shake(lora)
    wanted = mixed_logits(lora, tokenizer)
    save_policy(lora, tokenizer, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(w.numel() for w in saved.values()) == sum(p.numel() for p in lora.parameters() if p.requires_grad)
    by_itself, its = load_policy(tmp_path / "adapter", device="cpu")
    assert torch.equal(mixed_logits(by_itself, its), wanted) and its.get_vocab() == tokenizer.get_vocab()
    on_its_base, _ = load_policy(base.folder, adapter=tmp_path / "adapter", device="cpu")
    assert torch.equal(mixed_logits(on_its_base, tokenizer), wanted)
    torch.testing.assert_close(mixed_logits(merge_lora(by_itself), tokenizer), wanted, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def mixed_logits(model, tokenizer):
    "Logits behind a line with every control token in it."
    return model(input_ids=torch.tensor([[3, 4, *control_ids(tokenizer).values(), 5, 6, 7]])).logits


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_in_bf16_is_half_as_large(tmp_path, tied):
    "In the file its numbers are bf16; the model that is saved keeps its own, and what is loaded is float32, rounded. peft reads it too."
    save_policy(tiny("Llama", TOKENIZER, tie_word_embeddings=tied), TOKENIZER, tmp_path / "base")
    lora = add_lora(load_policy(tmp_path / "base", device="cpu")[0], r=4, train_tokens=list(control_ids(TOKENIZER).values()))
    for p in lora.parameters():
        if p.requires_grad: p.data += .1 * torch.randn_like(p)
    before = {n: p.clone() for n, p in lora.named_parameters()}
    for name, dtype in (("whole", None), ("half", torch.bfloat16)): save_policy(lora, TOKENIZER, tmp_path / name, dtype)
    whole, half = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "half"))
    assert whole.keys() == half.keys() and all(torch.equal(half[k], whole[k].bfloat16()) for k in whole)
    assert any("trainable_tokens" in k for k in half) and any("lora_A" in k for k in half)
    assert all(torch.equal(p, before[n]) and p.dtype == torch.float32 for n, p in lora.named_parameters())
    rounded = load_policy(tmp_path / "half", device="cpu")[0]
    for n, p in rounded.named_parameters():
        wanted = before[n].bfloat16().float() if re.search("lora_|trainable_tokens_delta", n) else before[n]
        assert p.dtype == torch.float32 and torch.equal(p, wanted), n
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "half").eval()), logits(rounded))
    with pytest.raises(ValueError, match="dtype is for adapters alone"):
        save_policy(rounded.get_base_model(), TOKENIZER, tmp_path / "x", torch.bfloat16)


def test_an_adapter_that_was_saved_with_its_embedding_loads_too(tmp_path):
    base = Stranger(tmp_path / "base", True)
    lora = add_lora(base.load()[0], r=4)
    shake(lora)
    lora.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)   # as the first edition did
    wanted = mixed_logits(lora, base.load()[1])
    assert torch.equal(mixed_logits(load_policy(tmp_path / "adapter", device="cpu")[0], base.load()[1]), wanted)


# ---- decoding

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("new_tokens", [False, True])
def test_decoding_copy_is_plain_and_leaves_the_original(new_tokens, tied):
    rows = list(control_ids(TOKENIZER).values()) if new_tokens else ()
    model = add_lora(tiny("Llama", TOKENIZER, tie_word_embeddings=tied), r=4, train_tokens=rows)
    shake(model)
    model.train()
    before, wanted = copy.deepcopy(model.state_dict()), mixed_logits(model, TOKENIZER)
    fast = decoding_copy(model)
    torch.testing.assert_close(mixed_logits(fast, TOKENIZER), wanted, atol=1e-5, rtol=1e-5)
    assert type(fast).__name__ == "LlamaForCausalLM" and not [n for n, _ in fast.named_parameters() if "lora" in n or "trainable_tokens" in n]
    assert (fast.get_input_embeddings().weight is fast.get_output_embeddings().weight) == tied
    prompt = ids(8)
    texts = [m.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False) for m in (model, fast)]
    assert torch.equal(*texts)
    with torch.no_grad():
        for p in fast.parameters(): p.zero_()
    after = model.state_dict()
    assert model.training and before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_decoding_copy_of_what_is_not_to_be_merged():
    plain = narrow()
    assert decoding_copy(plain) is plain
    lora = add_lora(narrow(), r=2)
    shake(lora)
    with lora.disable_adapter():
        base = logits(lora)
        assert torch.equal(logits(decoding_copy(lora)), base)
    assert (logits(decoding_copy(lora)) - base).abs().max() > .01
    half = add_lora(narrow().bfloat16(), r=2)
    assert decoding_copy(half) is half


def test_new_token_rows_learn_both_as_input_and_as_output():
    model = add_lora(tiny("Llama", TOKENIZER, tie_word_embeddings=False), r=2, train_tokens=[5, 6])
    assert sum("trainable_tokens" in n for n, p in model.named_parameters() if p.requires_grad) == 2
    model = add_lora(narrow(), r=2, train_tokens=[5, 6])
    assert sum("trainable_tokens" in n for n, p in model.named_parameters() if p.requires_grad) == 1


def test_adapters_that_cannot_be(policy, tmp_path):
    assert "it has no adapter_config.json" in refusal(policy, adapter=tmp_path / "nope")
    assert "it has no adapter_config.json" in refusal(policy, adapter=policy)
    save_policy(add_lora(narrow(), r=2), TOKENIZER, tmp_path / "adapter")
    assert "load its base with adapter=" in refusal(tmp_path / "adapter")
    save_policy(narrow(hidden_size=64), TOKENIZER, tmp_path / "wider")
    assert "size mismatch" in refusal(tmp_path / "wider", adapter=tmp_path / "adapter")
    shutil.copy(policy / "config.json", tmp_path / "adapter" / "adapter_model.safetensors")   # not safetensors at all
    refusal(policy, adapter=tmp_path / "adapter")


def test_adapters_are_complete_and_not_pickled(policy, tmp_path):
    save_policy(add_lora(narrow(), r=2), TOKENIZER, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file(dict(list(weights.items())[:3]), path, {"format": "pt"})
    with warnings.catch_warnings(record=True) as warned: assert "has no weights for base_model" in refusal(policy, adapter=tmp_path / "adapter")
    assert not [w for w in warned if "missing" in str(w.message)]
    path.unlink()
    torch.save(weights, tmp_path / "adapter" / "adapter_model.bin")
    assert "has no adapter_model.safetensors" in refusal(policy, adapter=tmp_path / "adapter")
    with pytest.raises(ValueError, match="nothing to merge"): merge_lora(narrow())


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_policy_keeps_its_own_tokenizer(tmp_path, arch, tokenizer):
    "AutoTokenizer gives a Qwen2 folder the tokenizer of that family, which drops blanks and cuts elsewhere."
    tokenizer = TOKENIZERS[tokenizer]()
    save_policy(tiny(arch, tokenizer), tokenizer, tmp_path)
    loaded = load_policy(tmp_path, device="cpu")[1]
    texts = ["12 clips and  don't 347*6\n", "<Parallel>ⅠⅡ ₀2</Parallel>", *(random_text(rng) for rng in rngs(20, "own"))]
    assert loaded.get_vocab() == tokenizer.get_vocab() and loaded.eos_token == tokenizer.eos_token
    assert [loaded.encode(t) for t in texts] == [tokenizer.encode(t) for t in texts]
    assert [loaded.decode(loaded.encode(t)) for t in texts] == [tokenizer.decode(tokenizer.encode(t)) for t in texts]


@pytest.mark.parametrize("arch", ["Qwen2", "Llama"])
def test_a_folder_that_transformers_saved(tmp_path, arch):
    "As a model of the hub comes: no control tokens yet, the tokenizer's class as transformers writes it."
    plain = plain_tokenizer()
    model = tiny(arch, plain)
    model.save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path)
    loaded, tokenizer = load_policy(tmp_path, device="cpu")
    assert tokenizer.encode("12*3+4?") == plain.encode("12*3+4?") and set(control_ids(tokenizer)) == set(CONTROL_TOKENS)
    known = torch.tensor([plain.encode("12*3+4?")])
    with torch.no_grad(): assert torch.equal(loaded(known).logits[..., :len(plain)], model(known).logits)


def test_a_bpe_policy(tmp_path):
    tokenizer = bpe_tokenizer()
    model = tiny("Llama", tokenizer)
    save_policy(model, tokenizer, tmp_path)
    loaded, its = load_policy(tmp_path, device="cpu")
    assert its("12 clips<Thread>")["input_ids"] == tokenizer("12 clips<Thread>")["input_ids"]
    assert torch.equal(logits(loaded), logits(model))
