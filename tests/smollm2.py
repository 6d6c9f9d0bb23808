"""SmolLM2-135M-Instruct for the slow tests, from the hub or without it."""
import pytest
import torch

from threadweaver_ref.hub import SMOLLM2, at_hand, bring
from threadweaver_ref.model import add_lora, load_policy


def smollm2() -> str:
    "The hub id of SmolLM2-135M-Instruct, once `load_policy` can take it from somewhere. Skips the test where it cannot be had."
    try: at_hand(SMOLLM2)
    except ValueError:
        try: bring()
        except ValueError as error: pytest.skip(f"SmolLM2: {error}")
    return SMOLLM2


def adapted(size=.01, seed=0):
    "(SmolLM2 with a random adapter, which has rows for the control tokens, its tokenizer). `size`: standard deviation of what is added."
    model, tokenizer = load_policy(smollm2(), device="cpu")
    lora = add_lora(model)
    torch.manual_seed(seed)
    for p in lora.parameters():
        if p.requires_grad: p.data += size * torch.randn_like(p)
    return lora.eval(), tokenizer
