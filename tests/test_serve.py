"""Names in one place, and adapters that are exchanged on every replica."""
import pytest

from threadweaver_ref import serve
from threadweaver_ref.remote import Completion, EngineError, generate_remote
from threadweaver_ref.serve import CompletionsClient
from threadweaver_ref.standin import StandIn
from threadweaver_ref.tokenizer import char_tokenizer


def test_the_public_names_are_here():
    for name in ("CompletionsClient", "BatchingEngine", "generate_remote", "parallel_generate", "serve_check", "save_policy"):
        assert name in serve.__all__ and callable(getattr(serve, name))


def test_an_adapter_goes_to_every_replica_with_a_salt_of_its_own(tmp_path):
    end = lambda request: Completion([1], [-1.], "stop")
    with StandIn(end, model="base") as one, StandIn(end, model="base") as two:
        client, salts = CompletionsClient([one.url, two.url], "base"), [None]
        for _ in range(3):
            client.load_adapter("policy", tmp_path)
            rollouts = generate_remote(client, char_tokenizer(), ["1+1?", "2+2?"])
            assert client.model == "policy" and all(r.finish_reason == "stop" for r in rollouts)
            salts.append(client.salt)
    assert len({*salts}) == 4
    for server in (one, two):
        assert server.loaded == [{"lora_name": "policy", "lora_path": str(tmp_path), "load_inplace": True}] * 3
        assert [(b["model"], b["cache_salt"]) for b in server.bodies] == [("policy", s) for s in salts[1:]]


def test_an_adapter_that_does_not_load():
    with StandIn(None) as server: pass
    with pytest.raises(EngineError, match="load_lora_adapter"): CompletionsClient(server.url, "base").load_adapter("policy", ".")
