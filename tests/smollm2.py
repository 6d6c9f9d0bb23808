"""SmolLM2-135M-Instruct for the slow tests, from the hub or without it."""
import pytest

from threadweaver_ref.hub import SMOLLM2, at_hand, bring


def smollm2() -> str:
    "The hub id of SmolLM2-135M-Instruct, once `load_policy` can take it from somewhere. Skips the test where it cannot be had."
    try: at_hand(SMOLLM2)
    except ValueError:
        try: bring()
        except ValueError as error: pytest.skip(f"SmolLM2: {error}")
    return SMOLLM2
