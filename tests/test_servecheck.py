"""What serve-check says of servers that do, and of servers that do not: never "works" where nothing would fork."""
import json
import subprocess
import sys
import time

import pytest
from helpers import TOKENIZERS
from typer.testing import CliRunner

from threadweaver_ref.cli import app
from threadweaver_ref.client import CompletionsClient
from threadweaver_ref.domains import split_problems
from threadweaver_ref.model import decoding_copy, load_policy, save_policy
from threadweaver_ref.remote import Completion
from threadweaver_ref.servecheck import Finding, serve_check, verdict
from threadweaver_ref.standin import FAULTS, NAMES, StandIn, greedy_writer
from threadweaver_ref.tokenizer import control_ids, encode_text

char = TOKENIZERS["char"]()
QUESTIONS = ["a=7+3x9;b=2+5x12;c=4-1x8;d=6+2x10;e=a+b;f=c-d;ef?"]
CUT = lambda text: encode_text(char, text)


@pytest.fixture(scope="module")
def write():
    model, _ = load_policy("tiny-rl", device="cpu")
    return greedy_writer(decoding_copy(model))


def findings(writer, cut=CUT, questions=QUESTIONS, **options):
    with StandIn(writer, tokenize=cut, **options) as server: return serve_check(CompletionsClient(server.url, "tiny-rl", timeout=20), char, questions)


@pytest.mark.parametrize("dialect", NAMES)
def test_a_server_that_does(write, dialect):
    found = findings(write, dialects=[dialect])
    assert [f.ok for f in found] == [True] * 10 and found[-1].says.startswith("works") and "1 forks in 1 answers" in found[-2].says


def test_a_server_that_says_nothing_of_its_tokenizer_does_too(write):
    found = findings(write, cut=None)
    assert found[1].ok is None and found[-1].ok


def test_a_model_that_never_forks_does_not_do():
    model, _ = load_policy("tiny-never", device="cpu")
    found = findings(greedy_writer(model))
    assert [f.ok for f in found[:-2]] == [True] * 8 and not found[-1].ok and "no fork in 1 answers" in found[-1].says


def changed(write, change):
    def writer(request):
        said = write(request)
        return Completion(*change(request, list(said.ids), list(said.logprobs), said.finish_reason))
    return writer


CONTROL = {*control_ids(char).values()}


def kept(ids, logprobs):
    pairs = [(i, x) for i, x in zip(ids, logprobs) if i not in CONTROL]
    return [i for i, _ in pairs], [x for _, x in pairs]


BROKEN = {
    "the stop token is left out": lambda r, ids, x, reason: (ids[:-1], x[:-1], reason) if reason == "stop" else (ids, x, reason),
    "control tokens are stripped": lambda r, ids, x, reason: (*kept(ids, x), reason),
    "stops are not obeyed": lambda r, ids, x, reason: (ids + [20] * (r.budget - len(ids)), x + [-1.] * (r.budget - len(ids)), "length"),
    "control tokens become others": lambda r, ids, x, reason: ([i if i not in CONTROL else 20 for i in ids], x, reason),
}


@pytest.mark.parametrize("name", BROKEN)
def test_servers_that_do_not_do(write, name):
    found = findings(changed(write, BROKEN[name]))
    assert not found[-1].ok and found[-1].says.startswith("does NOT work: ") and not any("forks in" in f.says for f in found)


def test_a_ban_that_is_not_obeyed(write):
    def deaf(request): return write(request.__class__(request.context_ids, request.stop_ids, request.budget, (), path=request.path))
    found = findings(deaf)
    assert not found[-1].ok and "banned" in found[-1].says


def test_log_probabilities_of_another_distribution_are_a_remark(write):
    "Of what is left after bias: a token that was all but forced has probability one. Rollouts fork all the same."
    def processed(request):
        said = write(request)
        return said._replace(logprobs=[0.] * len(said.ids)) if request.path else said
    found = findings(processed)
    assert found[-1].ok and [f.says[:38] for f in found if f.ok is None] == ["log-probabilities are not the model's "]
    assert "the model's own, whatever the bias" in str(findings(write))


def test_a_model_that_names_further_ends(write):
    "The client is told of them; then its rollouts end there too."
    end = 33
    def writer(request):
        said = write(request)
        return said if request.path or request.stop_ids[-1] != end or len(said.ids) < 5 else Completion([end], [-1.], "stop")
    with StandIn(writer) as server:
        found = serve_check(CompletionsClient(server.url, "tiny-rl", stops=(end,)), char, QUESTIONS)
        assert all(end in b["sampling_params"]["stop_token_ids"] for b in server.bodies if b["sampling_params"]["max_tokens"] > 1)
    assert not any("no stop token of ours" in f.says for f in found)


@pytest.mark.parametrize("answer", [(200, "<html>"), (307, ""), (200, {}), (500, {}), (503, "busy")])
def test_what_is_wrong_with_the_first_question_is_a_finding_at_once(write, answer):
    began = time.perf_counter()
    found = findings(write, pages={"/v1/models": answer})
    assert len(found) == 2 and not found[-1].ok and "/v1/models" in found[-1].says and time.perf_counter() - began < 5
    if answer[0] == 200: assert findings(write, pages={"/openapi.json": answer}, dialects=["completions"])[-1].ok


def test_another_tokenizer_on_the_server(write):
    found = findings(write, cut=lambda text: [20, 21])
    assert not found[-1].ok and "<Parallel> is [20, 21] on the server, 3 here" in found[-1].says


@pytest.mark.parametrize("fault", [f for f in FAULTS if f != "slow"], ids=lambda f: f"fault-{f}")
def test_whatever_is_wrong_is_a_finding(write, fault):
    found = findings(write, fault=lambda number: fault)
    assert not found[-1].ok and all("\n" not in f.says for f in found)


def test_a_server_that_is_not_there_or_has_another_model():
    with StandIn(None, model="other") as server: found = serve_check(CompletionsClient(server.url, "tiny-rl"), char, QUESTIONS)
    assert "no model 'tiny-rl': choose one of other" in found[-1].says
    found = serve_check(CompletionsClient(server.url, "tiny-rl"), char, QUESTIONS)
    assert not found[-1].ok and "/v1/models" in found[-1].says


def test_the_verdict():
    yes, no, remark = Finding(True, "a"), Finding(False, "b"), Finding(None, "c")
    assert verdict([yes, remark]).ok and not verdict([yes, no]).ok and "b" in verdict([no]).says
    assert [str(f)[:3] for f in (yes, no, remark)] == ["yes", "NO ", "  -"]


def test_the_command_line(write):
    with StandIn(write, tokenize=CUT) as server:
        done = CliRunner().invoke(app, ["serve-check", server.url, server.url, "--model", "tiny-rl", "--question", QUESTIONS[0]])
        assert done.exit_code == 0 and done.output.count("works: ") == 2
        done = CliRunner().invoke(app, ["serve-check", server.url, "--model", "tiny-never", "--question", QUESTIONS[0]])
        assert done.exit_code == 1 and "does NOT work" in done.output
    first = [p.question for ps in split_problems("programs", "dev", 1).values() for p in ps]
    with StandIn(lambda request: write(request)) as server:
        CliRunner().invoke(app, ["serve-check", server.url, "--model", "tiny-rl"])
        asked = {tuple(b["token_ids"]) for b in server.bodies}
    assert all(tuple(encode_text(char, q)) in asked for q in first)


def test_the_command_line_tells_of_the_models_further_ends(write, tmp_path):
    model, tokenizer = load_policy("tiny-rl", device="cpu")
    plain = decoding_copy(model)
    plain.generation_config.eos_token_id = [tokenizer.eos_token_id, 33]
    save_policy(plain, tokenizer, tmp_path)
    with StandIn(write) as server:
        CliRunner().invoke(app, ["serve-check", server.url, "--model", "tiny-rl", "--policy", str(tmp_path), "--question", QUESTIONS[0]])
        assert 33 in server.bodies[0]["sampling_params"]["stop_token_ids"]


def test_the_key_comes_from_the_environment(write, monkeypatch):
    with StandIn(write, key="secret-17") as server:
        monkeypatch.setenv("THREADWEAVER_API_KEY", "secret-18\n")
        code = "import sys; from threadweaver_ref.cli import main; sys.argv = ['x', 'serve-check', *sys.argv[1:]]; main()"
        done = subprocess.run([sys.executable, "-c", code, server.url, "--model", "tiny-rl"], capture_output=True, text=True)
    assert done.returncode == 1 and "status 401" in done.stdout and json.dumps(done.stdout).count("secret") == 0
