"""A real instruct model, SmolLM2-135M-Instruct: what holds for tiny random models holds for it, with its tokenizer and chat template. Slow."""
import random

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from smollm2 import adapted, smollm2
from test_decode import Script, block, check_against_plain_loop, clean_plan, random_plan, replayed, same, same_logprobs
from test_scoring import check_packed, check_siblings

from threadweaver_ref.decode import DecodeConfig, generate
from threadweaver_ref.domains import Grouped, WheneverReady
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.hub import SMOLLM2, at_hand
from threadweaver_ref.model import add_lora, decoding_copy, load_policy, save_policy
from threadweaver_ref.format import CONTROL_TOKENS
from threadweaver_ref.sft import concluding
from threadweaver_ref.tokenizer import control_ids, encode_prompt, encode_text
from threadweaver_ref.words import words

pytestmark = pytest.mark.slow
QUESTIONS = [
    "What is 2 + 2?", "What is the capital of France?", "Name three fruits.", "Say hello in Spanish.", "Why is the sky blue?",
    "Write a haiku about rain.", "Who wrote Hamlet?", "What is the boiling point of water?", "Explain gravity to a child.", "What is 17 times 3?",
    "List the days of the week.", "What does a compiler do?", "A synonym for happy?", "How many legs has a spider?", "What is a prime number?",
    "Translate 'good night' into French.", "Tell me a joke.", "What is the largest planet?", "What does </Outlines> mean?", "Finish: roses are red,"]


@pytest.fixture(scope="module")
def policy(): return load_policy(smollm2(), device="cpu")


def chat_ids(tokenizer, question):
    "Ids of the question as the user's turn, by transformers."
    turn = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]


def reference(model, tokenizer, ids, n):
    "What `transformers.generate` writes, greedily, without control tokens; its end of sequence too."
    prompt = torch.tensor([ids])
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, do_sample=False,
                             suppress_tokens=list(control_ids(tokenizer).values()))
    return written[0, len(ids):].tolist()


def sampled(rollout):
    packed = rollout.tree.pack()
    return packed.input_ids[packed.sampled].tolist()


def test_the_prompt_is_the_templates(policy):
    "But for what looks like a control token, which transformers would read as one."
    _, tokenizer = policy
    for question in QUESTIONS:
        if not any(t in question for t in CONTROL_TOKENS): assert encode_prompt(tokenizer, question) == chat_ids(tokenizer, question)


def test_sequential_greedy_text_is_that_of_transformers(policy):
    model, tokenizer = policy
    rollouts = generate(model, tokenizer, QUESTIONS, DecodeConfig(mode="sequential", limits=Limits(max_tokens=64)))
    ended = 0
    for question, rollout in zip(QUESTIONS, rollouts, strict=True):
        wanted = reference(model, tokenizer, encode_prompt(tokenizer, question), 64)
        assert sampled(rollout) == wanted, question
        ends = wanted[-1] == tokenizer.eos_token_id
        assert rollout.text == tokenizer.decode(wanted[:-1] if ends else wanted), question
        assert rollout.finish_reason == ("stop" if ends else "length") and rollout.forks == 0 and not rollout.errors
        ended += ends
    assert 0 < ended < len(QUESTIONS)   # both ways to end were seen


def test_an_adapter_on_new_tokens_takes_20_mb(policy, tmp_path):
    lora, tokenizer = adapted()
    assert lora.peft_config["default"].trainable_token_indices == {"model.embed_tokens": list(control_ids(tokenizer).values())}
    save_policy(lora, tokenizer, tmp_path)
    trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 4 * trained < size < 4 * trained + 200_000 and size < 21e6
    ids = torch.tensor([[*chat_ids(tokenizer, "Name three fruits."), *control_ids(tokenizer).values()]])
    with torch.no_grad():
        wanted = lora(input_ids=ids).logits
        assert torch.equal(load_policy(tmp_path, device="cpu")[0](input_ids=ids).logits, wanted)
        assert (policy[0](input_ids=ids).logits - wanted).abs().max() > 1
        torch.testing.assert_close(decoding_copy(lora)(input_ids=ids).logits, wanted, atol=1e-3, rtol=1e-4)


def test_peft_alone_loads_and_merges_an_adapter(policy, tmp_path):
    "`AutoPeftModelForCausalLM`, without this package: log-probabilities to 1e-4, as an adapter and merged; in bf16 the file has at most 10 MB."
    lora, tokenizer = adapted()
    ids = torch.tensor([[*chat_ids(tokenizer, "Name three fruits."), *control_ids(tokenizer).values(), *encode_text(tokenizer, "Apples.")]])
    with torch.no_grad(): wanted = lora(input_ids=ids).logits.log_softmax(-1)
    save_policy(lora, tokenizer, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace(SMOLLM2, at_hand(SMOLLM2)))   # where the hub is out of reach: its stand-in
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(alone(input_ids=ids).logits.log_softmax(-1), wanted, atol=1e-4, rtol=0)
        merged = alone.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits.log_softmax(-1), wanted, atol=1e-4, rtol=0)
        assert (policy[0](input_ids=ids).logits.log_softmax(-1) - wanted).abs().max() > 1 and type(merged) is type(policy[0])
    save_policy(lora, tokenizer, tmp_path / "half", torch.bfloat16)
    assert (tmp_path / "half" / "adapter_model.safetensors").stat().st_size < 10e6


# ---- what must hold, always: DESIGN's numbers

FAMILIES = {"wide": WheneverReady(), "mixed": WheneverReady(), "nested": Grouped()}


def worked(tokenizer, join):
    "Word problems in English, worked with forks: (trajectory, ids of the question in the chat template, rng)."
    for i, (family, arrangement) in enumerate(FAMILIES.items()):
        rng = random.Random(i)
        problem = words(rng, family, small=True)
        yield concluding(arrangement, join).arrange(problem, rng), encode_prompt(tokenizer, problem.question), rng


def plan(branch, tokenizer):
    "A fork of two, then what the model likes for a while, and an end."
    if not branch.path and not branch.forks: return encode_text(tokenizer, block("1:the first part", "2:the second part"))
    return [None] * 8 + (encode_text(tokenizer, "</Thread>") if branch.path else [tokenizer.eos_token_id])


@pytest.mark.parametrize("join", ["concat", "result"])
def test_packed_is_unpacked(policy, join):   # 1
    check_packed(*policy, [(t, prompt) for t, prompt, _ in worked(policy[1], join)], join)


@pytest.mark.parametrize("join", ["concat", "result"])
def test_decoded_is_rerun_and_its_tree_is_the_replay(policy, join):   # 2 and 3
    model, tokenizer = policy
    limits = Limits(max_tokens=120, max_thread_tokens=30)
    for script in (plan, random_plan):
        config = DecodeConfig(join=join, hook=Script(tokenizer, script), batch=2, limits=limits)
        found = check_against_plain_loop(model, tokenizer, QUESTIONS[:2] + QUESTIONS[18:19], config)
        assert any(r.forks for r in found)


@pytest.mark.parametrize("join", ["concat", "result", "kv"])
def test_siblings_are_independent(policy, join):   # 5
    check_siblings(*policy, worked(policy[1], join), join, tolerance=1e-4)


def test_neighbours_change_nothing(policy):   # 6
    model, tokenizer = policy
    asked = QUESTIONS[:4]
    def config(**more):
        return DecodeConfig(**{"temperature": 1., "hook": Script(tokenizer, clean_plan), "batch": 3, "limits": Limits(max_tokens=80), **more})
    together = generate(model, tokenizer, asked, config())
    assert any(r.forks for r in together) and all(r.tree == replayed(r, tokenizer, config()) for r in together)
    same_logprobs(model, together)
    for r in together[:1]: assert same(r, generate(model, tokenizer, [r.question], config())[0])
    for r, again in zip(together[::-1], generate(model, tokenizer, asked[::-1], config(batch=64)), strict=True): assert same(r, again)
    other = generate(model, tokenizer, asked, config(seed=1))
    assert sum(not same(a, b) for a, b in zip(together, other, strict=True)) >= 3


def test_an_adapter_names_the_hubs_model(tmp_path):
    model, tokenizer = load_policy(smollm2(), device="cpu")
    save_policy(add_lora(model, r=2), tokenizer, tmp_path)
    assert f'"base_model_name_or_path": "{SMOLLM2}"' in (tmp_path / "adapter_config.json").read_text()
