"""Shared by the tests: tiny models of several architectures, two tokenizers, random trajectories."""
import copy
import functools
import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from threadweaver_ref.course import random_text, random_trajectory  # noqa: F401
from threadweaver_ref.format import Fork
from threadweaver_ref.hub import PACKAGED, kept_folder
from threadweaver_ref.model import shipped_policies
from threadweaver_ref.tokenizer import add_control_tokens, char_tokenizer

DATA = Path(__file__).resolve().parent.parent / "data"
ARCHITECTURES = ("Qwen3", "Qwen2", "Llama", "Mistral", "Gemma")


def tiny(arch, tokenizer, seed=0, **options):
    "A tiny causal model with random weights, large enough that its logits are not flat; float32, in eval mode."
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=64,
                 max_position_embeddings=4096, initializer_range=.3, vocab_size=len(tokenizer), bos_token_id=None,
                 eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    if arch == "Mistral": shape["sliding_window"] = None
    torch.manual_seed(seed)
    config = getattr(transformers, f"{arch}Config")(**{**shape, **options})
    return getattr(transformers, f"{arch}ForCausalLM")(config).float().eval()


@functools.cache
def bpe_tokenizer(merges=400):
    "A byte-level BPE tokenizer trained on the wording of GSM8K, with the control tokens added."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(vocab_size=256 + merges + len(special), special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    with open(DATA / "gsm8k_graphs" / "train.jsonl", encoding="utf-8") as f: wording = [json.loads(line)["wording"] for line in f]
    tok.train_from_iterator(wording[:1000], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=special[0], pad_token=special[1], clean_up_tokenization_spaces=False)
    add_control_tokens(fast)
    return fast


def chat_tokenizer():
    "The BPE tokenizer with a chat template, in which a turn has an end of its own."
    tokenizer = copy.deepcopy(bpe_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
                               "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    return tokenizer


TOKENIZERS = {"char": functools.cache(char_tokenizer), "bpe": bpe_tokenizer}


def random_forks(rng, depth=2, conclusions=False):
    "A random trajectory that forks at least once."
    while True:
        trajectory = random_trajectory(rng, depth, conclusions)
        if any(isinstance(n, Fork) for n in trajectory): return trajectory


def thread_paths(nodes, path=()):
    "The path, ((fork, thread), ...), of every thread of a trajectory."
    forks = [n for n in nodes if isinstance(n, Fork)]
    for f, fork in enumerate(forks, 1):
        for i, thread in enumerate(fork.threads, 1):
            yield path + ((f, i),)
            yield from thread_paths(thread.body, path + ((f, i),))


@torch.no_grad()
def alone(model, context, completion):
    "Log-probabilities of `completion` behind `context`: a plain causal run, no mask given."
    ids = torch.tensor([list(context) + list(completion)])
    logits = model(input_ids=ids, attention_mask=None, use_cache=False).logits[0].float()
    return logits[len(context) - 1:-1].log_softmax(-1).gather(1, ids[0, len(context):, None])[:, 0]


def rngs(n, name=""): return [random.Random(f"{name}{i}") for i in range(n)]


def spied(monkeypatch, owner, name):
    "Every call of a function, as (positional, named) arguments; it is made all the same."
    calls, real = [], getattr(owner, name)
    def spy(*args, **named):
        calls.append((args, named))
        return real(*args, **named)
    monkeypatch.setattr(owner, name, spy)
    return calls


def policies_at_hand():
    "Name -> folder of the shipped policies that need no pretrained base, or whose base is kept on this machine."
    bases = {name: json.loads((f / "adapter_config.json").read_text())["base_model_name_or_path"] if (f / "adapter_config.json").is_file() else None
             for name, f in shipped_policies().items()}
    return {name: f for name, f in shipped_policies().items() if bases[name] not in PACKAGED or kept_folder(bases[name]).is_dir()}
