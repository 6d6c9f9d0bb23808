"""The client against servers over real HTTP: the local rollouts, and with every fault none lost and none wrong."""
import asyncio
import collections
import random
import socket
import threading
import time

import httpx
import pytest
import torch

from threadweaver_ref.client import CompletionsClient
from threadweaver_ref.decode import DecodeConfig, generate
from threadweaver_ref.dialects import DIALECTS, completions_body, read_answer
from threadweaver_ref.domains import split_problems
from threadweaver_ref.forkjoin import ForkJoin
from threadweaver_ref.model import decoding_copy, load_policy
from threadweaver_ref.remote import Completion, EngineError, Request, blocking, check_completion, generate_remote
from threadweaver_ref.scoring import collate, tree_logprobs
from threadweaver_ref.standin import FAULTS, NAMES, PATHS, StandIn, greedy_writer

PASSING = [f for f in FAULTS if f != "gone"]   # another attempt helps


def mixed(n): return [p.question for some in zip(*split_problems("programs", "dev", n).values()) for p in some]


@pytest.fixture(scope="module")
def tiny_rl():
    model, tokenizer = load_policy("tiny-rl", device="cpu")
    return decoding_copy(model), tokenizer


@pytest.fixture(scope="module")
def recorded(tiny_rl):
    "(questions, what the local decoder says, a writer that says the same): for tests of what happens on the way."
    model, tokenizer = tiny_rl
    questions, said, feed = mixed(4), {}, ForkJoin.feed
    def spy(self, branch, ids, reason="stop", logprobs=None):
        said[tuple(branch.context_ids), branch.stop_ids] = Completion(list(ids), list(logprobs), reason)
        return feed(self, branch, ids, reason, logprobs)
    ForkJoin.feed = spy
    try: local = generate(model, tokenizer, questions)
    finally: ForkJoin.feed = feed
    return questions, local, lambda request: said[tuple(request.context_ids), request.stop_ids]


def same(a, b):
    for f in ("text", "answer", "finish_reason", "errors", "token_latency", "decode_steps"): assert getattr(a, f) == getattr(b, f), f
    return a.tree == b.tree and torch.allclose(a.logprobs, b.logprobs, atol=1e-4)


def client(*servers, **options):
    return CompletionsClient([s.url for s in servers], servers[0].served[0], **{"backoff": .01, "timeout": 20, **options})


# ---- the local rollouts

@pytest.mark.parametrize("dialect", DIALECTS)
def test_token_for_token_the_local_rollouts(tiny_rl, dialect):
    model, tokenizer = tiny_rl
    questions = mixed(1)[1:]
    with StandIn(greedy_writer(model), dialects=[dialect]) as server: remote = generate_remote(client(server), tokenizer, questions)
    assert all(map(same, remote, generate(model, tokenizer, questions))) and sum(r.forks for r in remote) > 1
    with torch.no_grad(): scored = tree_logprobs(model, collate([r.tree.pack() for r in remote]))
    assert torch.allclose(torch.cat([r.logprobs for r in remote]), scored, atol=1e-3)


def test_the_result_join_and_sequential_mode():
    model, tokenizer = load_policy("tiny-result", device="cpu")
    questions, write = mixed(1)[1:], greedy_writer(model)
    for config in (DecodeConfig(join="result"), DecodeConfig("sequential", join="result")):
        with StandIn(write) as server: remote = generate_remote(client(server), tokenizer, questions, config)
        assert all(map(same, remote, generate(model, tokenizer, questions, config)))
        assert bool(server.bodies[0]["sampling_params"].get("logit_bias")) == (config.mode == "sequential")


@pytest.mark.parametrize("spread", [False, True])
def test_replicas(tiny_rl, recorded, spread):
    questions, local, write = recorded
    with StandIn(write) as one, StandIn(write) as two: remote = generate_remote(client(one, two, spread=spread), tiny_rl[1], questions)
    assert all(map(same, remote, local)) and min(len(one.bodies), len(two.bodies)) > 20
    asked = [{tuple(b["token_ids"][:20]) for b in s.bodies} for s in (one, two)]   # the first 20 tokens tell the questions apart
    assert bool(asked[0] & asked[1]) == spread


def test_a_replica_that_is_gone_is_not_missed(tiny_rl, recorded):
    questions, local, write = recorded
    with StandIn(write) as one: pass
    with StandIn(write) as two: remote = generate_remote(client(one, two), tiny_rl[1], questions)
    assert all(map(same, remote, local))


# ---- faults

def run(tokenizer, recorded, times, fault, dialect="generate", **options):
    "`times` rollouts of every question against a faulty server: (rollouts, what is right, the client, the server)."
    questions, local, write = recorded
    with StandIn(write, fault=fault, slow=1.5, dialects=[dialect]) as server:
        found = client(server, **{"timeout": 1.0, **options})
        return generate_remote(found, tokenizer, questions * times, DecodeConfig(batch=20)), local * times, found, server


@pytest.mark.parametrize("dialect", DIALECTS)
def test_two_hundred_rollouts_at_a_tenth_of_faults(tiny_rl, recorded, dialect):
    rng = random.Random(0)
    remote, right, found, server = run(tiny_rl[1], recorded, 10, lambda number: rng.choice(PASSING) if rng.random() < .1 else None, dialect)
    complete = [same(a, b) for a, b in zip(remote, right, strict=True) if a.finish_reason != "error"]
    assert len(remote) == 200 and all(complete) and len(complete) >= 198 and {*server.faults} == {*PASSING}
    assert found.counts["attempts"] >= found.counts["requests"] + len(server.faults) > 1000


def test_none_is_wrong_when_most_answers_are(tiny_rl, recorded):
    rng = random.Random(1)
    remote, right, _, _ = run(tiny_rl[1], recorded, 2, lambda number: rng.choice(FAULTS) if rng.random() < .6 else None, retries=2)
    ended = collections.Counter(r.finish_reason for r in remote)
    assert len(remote) == 40 and {*ended} == {"stop", "error"} and min(ended.values()) >= 2
    for a, b in zip(remote, right):
        if a.finish_reason == "stop": assert same(a, b)
        else: assert any(isinstance(e, EngineError) and str(e) and "\n" not in str(e) for e in a.errors)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("fault", PASSING, ids=lambda f: f"fault-{f}")   # a test called slow would be skipped
def test_every_fault_alone(tiny_rl, recorded, fault, dialect):
    questions, local, write = recorded
    with StandIn(write, fault=lambda number: fault if number % 2 == 0 else None, slow=1.5, dialects=[dialect]) as server:
        found = client(server, timeout=1.0)
        assert all(map(same, generate_remote(found, tiny_rl[1], questions[1:3]), local[1:3]))
    assert fault in server.faults
    with StandIn(write, fault=lambda number: fault, slow=1.5, dialects=[dialect]) as server:
        r, = generate_remote(client(server, timeout=.3, retries=1), tiny_rl[1], questions[:1])
    assert r.finish_reason == "error" and "2 attempts" in str(r.errors[0]) and r.text == "" and len(server.bodies) == 2


def test_an_adapter_that_is_gone_is_not_asked_for_again(tiny_rl, recorded):
    questions, local, write = recorded
    with StandIn(write, fault=lambda number: "gone" if number >= 30 else None) as server:
        remote = generate_remote(client(server), tiny_rl[1], questions)
    for a, b in zip(remote, local):
        if a.finish_reason == "error": assert "status 404: The model does not exist" in str([e for e in a.errors if isinstance(e, EngineError)])
        else: assert same(a, b)
    assert len(server.bodies) == len({tuple(b["token_ids"]) for b in server.bodies}) > 35   # nothing was asked twice


def test_a_server_that_is_killed_and_started_again(tiny_rl, recorded):
    questions, local, write = recorded
    first, restarted = StandIn(lambda request: time.sleep(.01) or write(request)), []
    first.__enter__()
    def kill():
        while len(first.bodies) < 25: time.sleep(.01)
        first.__exit__()
        first.write = lambda request: time.sleep(30)   # what it was at is lost
        time.sleep(1)
        restarted.append(StandIn(write, port=first.port).__enter__())
    killer = threading.Thread(target=kill)
    killer.start()
    found = client(first, timeout=2.0, backoff=.1)
    remote = generate_remote(found, tiny_rl[1], questions * 3, DecodeConfig(batch=10))
    killer.join()
    restarted[0].__exit__()
    assert all(map(same, remote, local * 3)) and len(restarted[0].bodies) > 20 and found.counts["attempts"] > found.counts["requests"]


# ---- how it asks

@pytest.mark.parametrize("status, attempts", [(302, 1), (307, 1), (400, 1), (401, 1), (403, 1), (404, 1), (422, 1),
                                              (408, 3), (429, 3), (500, 3), (503, 3)])
def test_which_errors_are_worth_another_attempt(tiny_rl, status, attempts, monkeypatch):
    said = []
    with StandIn(None) as server:
        monkeypatch.setattr(server, "answer", lambda path, body: said.append(path) or (status, {"error": {"message": "no\nway"}}, None))
        r, = generate_remote(client(server, retries=2), tiny_rl[1], ["1+1?"])
    assert len(said) == attempts and f"status {status}: no way" in str(r.errors[0]) and r.finish_reason == "error"


def test_waits_grow_and_differ(tiny_rl, monkeypatch):
    waits, real = [], asyncio.sleep
    async def sleep(seconds, *rest):
        waits.append(seconds)
        await real(0)
    monkeypatch.setattr("threadweaver_ref.client.asyncio.sleep", sleep)
    with StandIn(None, fault=lambda number: "500") as server:
        generate_remote(client(server, retries=6, backoff=1.0), tiny_rl[1], ["1+1?"])
        one = list(waits)
        generate_remote(client(server, retries=6, backoff=1.0), tiny_rl[1], ["1+1?"])
    assert all(base * .5 <= wait <= base * 1.5 for base, wait in zip((1, 2, 4, 8, 8, 8), one, strict=True)) and one != waits[6:]


def test_how_many_requests_are_under_way(tiny_rl, recorded):
    questions, local, write = recorded
    now, most, lock = [0], [0], threading.Lock()
    def counted(request):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(.01)
        with lock: now[0] -= 1
        return write(request)
    for limit in (3, 64):
        most[0] = 0
        with StandIn(counted) as server: assert all(map(same, generate_remote(client(server, concurrency=limit), tiny_rl[1], questions), local))
        assert most[0] <= limit and (limit == 3 or most[0] > 3)


def test_time_that_is_over_ends_requests_at_the_server(tiny_rl, recorded):
    questions, _, write = recorded
    with StandIn(write, fault=lambda number: "slow" if number else None, slow=8) as server:
        began = time.perf_counter()
        r, = generate_remote(client(server), tiny_rl[1], questions[:1], seconds=1)
        assert time.perf_counter() - began < 6 and r.finish_reason == "cancelled" and r.text
        for _ in range(200): len(server.aborted) >= 2 * r.forks or time.sleep(.02)
    names = {b["request_id"] for b in server.bodies[1:]}
    assert names <= {*server.aborted} and len(names) >= 2


def test_the_key_is_sent_and_never_shown(tiny_rl, monkeypatch):
    model, tokenizer = tiny_rl
    with StandIn(lambda request: Completion([1], [-1.], "stop"), key="secret-17") as server:
        monkeypatch.setenv("THREADWEAVER_API_KEY", "secret-17")
        found = client(server)
        r, = generate_remote(found, tokenizer, ["1+1?"])
        assert r.finish_reason == "stop" and "secret" not in repr(found)
        for wrong in (client(server, api_key="secret-18"), client(server, api_key="secret-18", retries=0)):
            r, = generate_remote(wrong, tokenizer, ["1+1?"])
            assert r.finish_reason == "error" and "status 401" in str(r.errors[0]) and "secret" not in str(r.errors) + repr(wrong)


@pytest.mark.parametrize("key", ["secret-17\n", " secret-17 \r\n"])
def test_blanks_around_the_key_are_taken_off(tiny_rl, key):
    with StandIn(lambda request: Completion([1], [-1.], "stop"), key="secret-17") as server:
        r, = generate_remote(client(server, api_key=key), tiny_rl[1], ["1+1?"])
    assert r.finish_reason == "stop"


@pytest.mark.parametrize("key", ["secret\n-17", "secret-\u2019", "secret-\x7f"])
def test_a_key_that_no_header_may_have_is_refused_unseen(key):
    with pytest.raises(ValueError, match="a character that no header may have") as refused: CompletionsClient("http://x", "m", api_key=key)
    assert "secret" not in str(refused.value)


def test_a_server_that_repeats_the_key_does_not_make_us_show_it(tiny_rl):
    def said(path, body=None): return 401, {"error": {"message": "no such key: secret-17"}}
    with StandIn(None) as server:
        server.answer = said
        r, = generate_remote(client(server, api_key="secret-17"), tiny_rl[1], ["1+1?"])
        server.about = said
        with pytest.raises(EngineError, match=r"no such key: \*\*\*") as refused: client(server, api_key="secret-17").learn()
    assert "no such key: ***" in str(r.errors[0]) and "secret" not in str(r.errors) + str(refused.value)


def test_a_user_in_the_address_is_sent_and_never_shown(tiny_rl, monkeypatch):
    "As a header of its own, in every kind of request; the address is shown without it."
    from threadweaver_ref import standin
    seen = []
    class Noting(standin._Handler):
        def send(self, *answer):
            seen.append((self.path, self.headers.get("Authorization")))
            super().send(*answer)
    monkeypatch.setattr(standin, "_Handler", Noting)
    with StandIn(lambda request: Completion([1], [-1.], "stop")) as server:
        found = CompletionsClient(server.url.replace("//", "//me:s%40cret@") + "/v1", "tiny-rl", retries=0, backoff=.01)
        r, = generate_remote(found, tiny_rl[1], ["1+1?"])
    assert r.finish_reason == "stop" and len(seen) == 3 and {key for _, key in seen} == {httpx.BasicAuth("me", "s@cret")._auth_header}
    r, = generate_remote(found, tiny_rl[1], ["1+1?"])   # it is gone
    with pytest.raises(EngineError) as gone: found.learn()
    with pytest.raises(ValueError) as no_port: CompletionsClient("http://me:s%40cret@x:port", "m")
    with pytest.raises(ValueError) as no_scheme: CompletionsClient("me:s%40cret@x", "m")
    assert found.urls == [server.url] and server.url in str(gone.value)
    assert "cret" not in repr(found) + str(r.errors) + str(gone.value) + str(no_port.value) + str(no_scheme.value)


def test_nothing_is_left_to_the_models_generation_config():
    "What vLLM 0.32 fills in for /v1/completions, where a field is missing (`CompletionRequest._DEFAULT_SAMPLING_PARAMS`), with what does nothing."
    filled_in = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0}
    request = Request([1, 2], (7,), 3)
    assert {k: completions_body(request, "m", DecodeConfig(), "r").get(k) for k in filled_in} == filled_in
    drawn = {**filled_in, "temperature": .5, "top_p": .9}
    assert {k: completions_body(request, "m", DecodeConfig(temperature=.5, top_p=.9), "r").get(k) for k in filled_in} == drawn
    assert completions_body(request, "m", DecodeConfig(temperature=.5, top_k=5), "r")["top_k"] == 5


@pytest.mark.parametrize("temperature, banned, known", [(0, (), True), (1., (), True), (.7, (), False), (0, (5,), False), (1., (5,), False)])
def test_log_probabilities_of_sglang_are_believed_where_they_are_the_models(temperature, banned, known):
    "It gives those after temperature and bias. vLLM's are the model's own."
    request, said = Request([1, 2], (7,), 3, banned), Completion([6, 7], [-1., -2.], "stop")
    for name, dialect in DIALECTS.items():
        found = read_answer(dialect, request, PATHS[NAMES[name]][1](request, said), DecodeConfig(temperature=temperature))
        assert found == (said if known or name != "sglang" else said._replace(logprobs=None))


def test_rollouts_from_sglang_know_what_they_do_not_know(tiny_rl):
    with StandIn(lambda request: Completion([1], [-1.], "stop"), dialects=["sglang"]) as server:
        hot, = generate_remote(client(server), tiny_rl[1], ["1+1?"], DecodeConfig(temperature=.7))
        own, = generate_remote(client(server), tiny_rl[1], ["1+1?"], DecodeConfig(temperature=1.0))
    assert hot.logprobs.isnan().tolist() == [True] and own.logprobs.tolist() == [-1]


def test_sampling_and_salt_are_asked_for(tiny_rl):
    config = DecodeConfig(temperature=.7, top_p=.9, top_k=5, seed=3)
    for dialect, longest in (("generate", "max_tokens"), ("completions", "max_tokens"), ("sglang", "max_new_tokens")):
        with StandIn(lambda request: Completion([1], [-1.], "stop"), dialects=NAMES) as server:
            generate_remote(client(server, dialect=dialect, salt="v2"), tiny_rl[1], ["1+1?", "1+1?"], config)
        params = [b.get("sampling_params", b) for b in server.bodies]
        assert [(p["temperature"], p["top_p"], p["top_k"], p[longest]) for p in params] == [(.7, .9, 5, 4096)] * 2
        seeds = [p.get("seed", p.get("sampling_seed")) for p in params]
        assert seeds[0] != seeds[1] and all(0 <= s < 2 ** 62 for s in seeds)
        assert all(b.get("cache_salt", b.get("extra_key")) == "v2" and b.get("skip_special_tokens", params[0]["skip_special_tokens"]) is False
                   for b in server.bodies)


@pytest.mark.parametrize("dialects, chosen", [(["completions"], "completions"), (["completions", "generate"], "generate"),
                                              (["sglang", "completions"], "sglang")])
def test_the_dialect_is_the_best_that_the_server_has(dialects, chosen):
    with StandIn(None, dialects=dialects, window=77) as server: assert (client(server).dialect.name, client(server).window) == (chosen, 77)


def test_what_is_no_server_or_no_model():
    with pytest.raises(ValueError, match="no address of a server"): CompletionsClient("127.0.0.1:8000", "m")
    with pytest.raises(ValueError, match="no base_url"): CompletionsClient([], "m")
    with pytest.raises(ValueError, match="choose one of generate, sglang, completions"): CompletionsClient("http://x", "m", dialect="chat")
    with StandIn(None) as server:
        with pytest.raises(ValueError, match="no model 'other': choose one of tiny-rl"): CompletionsClient(server.url, "other").learn()
    with pytest.raises(EngineError, match="v1/models"): CompletionsClient(server.url, "tiny-rl", retries=0).learn()
    assert CompletionsClient("http://x:1/v1/", "m").urls == ["http://x:1"]


NO_LIST = [(200, answer) for answer in ("<html>", {}, {"data": [3]}, {"data": None})]


@pytest.mark.parametrize("answer, said", [*((answer, "no list of models") for answer in NO_LIST), ((307, "<html>"), "status 307"),
                                          ((200, {"data": [{"id": 3}]}), "choose one of 3")])
def test_what_answers_and_is_no_such_server(answer, said):
    with StandIn(None, pages={"/v1/models": answer}) as server, pytest.raises((EngineError, ValueError), match=said): client(server).learn()


@pytest.mark.parametrize("answer", [(200, "<html>"), (307, ""), (200, {}), (200, {"paths": None}), (200, [])])
def test_a_server_without_a_list_of_its_paths_is_a_good_one(answer):
    with StandIn(None, window=77, pages={"/openapi.json": answer}) as server:
        assert (client(server).dialect.name, client(server).window) == ("completions", 77)


@pytest.mark.parametrize("status, attempts", [(500, 3), (429, 3), (408, 3), (404, 1), (400, 1)])
def test_what_is_asked_beside_the_rollouts_is_asked_again_too(status, attempts):
    with StandIn(None) as server:
        asked, about = [], server.about
        server.about = lambda path: asked.append(path) or ((status, {}) if len(asked) < 3 else about(path))
        if attempts == 3: assert client(server, retries=2).window == 8192 and asked[:3] == ["/v1/models"] * 3
        else:
            with pytest.raises(EngineError, match=f"v1/models: status {status}"): client(server, retries=2).learn()
        assert len(asked) == (attempts if attempts == 1 else 4)   # the fourth is the list of paths


def test_a_broken_connection_there_ends_nothing(monkeypatch):
    "The first connection is broken; with two replicas, the other one answers at once."
    real, broken = httpx.Client.get, []
    def get(self, url, **options):
        if not broken: broken.append(url) or (_ for _ in ()).throw(httpx.ConnectError("broken"))
        return real(self, url, **options)
    monkeypatch.setattr(httpx.Client, "get", get)
    with StandIn(None) as server: assert client(server).window == 8192 and broken
    with StandIn(None) as one, StandIn(None) as two:
        one.about = lambda path: (500, {})
        assert client(one, two, retries=0).window == 8192


def test_answers_built_in_any_other_way_are_errors():
    "Parts of a right answer are taken away or changed to something else: an error or the right answer, never another one."
    request, rng = Request([1, 2], (7,), 3), random.Random(0)
    right = Completion([5, 7], [-1., -2.], "stop")
    def mutate(node):
        if isinstance(node, (dict, list)) and node and rng.random() < .7:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if rng.random() < .3:
                node = dict(node) if isinstance(node, dict) else list(node)
                del node[key]
                return node
            copy = dict(node) if isinstance(node, dict) else list(node)
            copy[key] = mutate(node[key])
            return copy
        return rng.choice([None, [], {}, "x", -1, [None], True])
    refused = 0
    for name, dialect in DIALECTS.items():
        answer = PATHS[NAMES[name]][1](request, right)
        assert read_answer(dialect, request, answer) == right
        for _ in range(500):
            try: assert check_completion(request, read_answer(dialect, request, mutate(answer)))[::2] == right[::2]
            except EngineError: refused += 1
    assert refused > 900


def test_no_connection_is_left_open(tiny_rl, recorded):
    "A session closes its connections: each has a thread at the server, which ends with it."
    questions, local, write = recorded
    def handlers(): return sum("process_request_thread" in t.name for t in threading.enumerate())
    before = handlers()
    def counted(request):
        most[0] = max(most[0], handlers() - before)
        return write(request)
    most = [0]
    with StandIn(counted) as server:
        assert all(map(same, generate_remote(client(server), tiny_rl[1], questions[:2]), local))
        for _ in range(100): handlers() == before or time.sleep(.02)
        assert most[0] > 0 and handlers() == before


# ---- replicas that do not answer

class Silent:
    "A server that accepts connections, and never says a word."
    def __enter__(self):
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        return self
    def __exit__(self, *error): self.socket.close()


def test_a_deadline_is_kept_where_nothing_is_answered_not_even_that_it_is_over(tiny_rl, recorded):
    questions, local, write = recorded
    with StandIn(write) as good, Silent() as bad:
        found = CompletionsClient([good.url, bad.url], "tiny-rl", timeout=20)
        assert found.window == 8192
        began = time.perf_counter()
        a, b = generate_remote(found, tiny_rl[1], questions[:2], seconds=.8)
        took = time.perf_counter() - began
    assert b.finish_reason == "cancelled" and took < 3.5 and found.counts["ended"] >= 1


def test_a_time_out_is_not_prolonged_by_saying_so(tiny_rl, recorded):
    questions, local, write = recorded
    with StandIn(write) as good, Silent() as bad:
        found = CompletionsClient([good.url, bad.url], "tiny-rl", timeout=1, backoff=.01)
        request = Request([1, 2], (7,), 3, rollout=1)
        good.write = lambda request: Completion([7], [-1.], "stop")
        async def one():
            async with found.session(DecodeConfig()) as complete:
                began = time.perf_counter()
                said = await complete(request)
                return said, time.perf_counter() - began
        said, took = blocking(one())
    assert said.ids == [7] and 1 <= took < 3


def test_a_replica_that_hangs_is_asked_twice_and_then_rests(tiny_rl, recorded):
    questions, local, write = recorded
    with StandIn(write) as good, StandIn(write, fault=lambda n: "slow", slow=60) as bad:
        found = CompletionsClient([good.url, bad.url], "tiny-rl", timeout=1.5, backoff=.01)
        some = generate_remote(found, tiny_rl[1], questions[:10], DecodeConfig(batch=1))
    assert all(map(same, some, local)) and len(bad.bodies) == 2


def test_when_a_replica_rests_and_when_it_is_tried_again(monkeypatch):
    now = [1000.]
    monkeypatch.setattr("threadweaver_ref.client.time.monotonic", lambda: now[0])
    found, ask = CompletionsClient(["http://a", "http://b"], "m"), lambda: found.replica(Request([1], (7,), 3, rollout=0), 0)
    found._note("http://a", False)
    assert ask() == "http://a"
    found._note("http://a", True)
    found._note("http://a", False)
    assert ask() == "http://a"   # not two in a row
    found._note("http://a", False)
    assert [ask(), ask()] == ["http://b"] * 2
    now[0] += 31
    assert [ask(), ask()] == ["http://a", "http://b"]   # one request tries it
    found._note("http://a", False)
    now[0] += 29
    assert ask() == "http://b"
    found._note("http://a", True)
    assert [ask(), ask()] == ["http://a"] * 2
    for _ in "12": found._note("http://a", False), found._note("http://b", False)
    assert ask() == "http://a"   # where all rest, none does


def test_an_answer_may_take_as_long_as_the_client_allows(monkeypatch):
    "A POST may be a reasoner's whole answer; what a GET asks for is there at once."
    patience = []
    class Client:
        def __init__(self, timeout, **options): patience.append(timeout)
        def __enter__(self): raise httpx.ConnectError("nobody")
        def __exit__(self, *error): pass
    monkeypatch.setattr(httpx, "Client", Client)
    for seconds in (600, 20):
        for body in (None, {}):
            with pytest.raises(EngineError): CompletionsClient("http://x", "m", timeout=seconds, retries=0).ask("/path", body)
    assert patience == [60, 600, 20, 20]
