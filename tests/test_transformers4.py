"""The shipped policies in transformers 4.57: the same token ids, the same greedy tokens. Slow: a venv, and half a minute of pip."""
import json
import os
import subprocess
import sys
import sysconfig

import pytest
from helpers import DATA, policies_at_hand

from threadweaver_ref.model import add_lora, load_policy, save_policy, tiny_model
from threadweaver_ref.tokenizer import char_tokenizer

TEXTS = ["12*3+4*5?", "a=48/2;b=a+7;b?", "<Parallel><Outlines><Outline>1:a=1*2</Outline>", "nothing it knows: ö\n"]
READ = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
found = {}
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.encode(t, add_special_tokens=False) for t in json.loads(sys.argv[1])]
    found[folder] = {"ids": ids, "texts": [tokenizer.decode(i) for i in ids], "special": sorted(tokenizer.all_special_tokens)}
    model = AutoModelForCausalLM.from_pretrained(folder)   # of an adapter, peft brings the base
    prompt = torch.tensor([ids[0]])
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
    found[folder]["written"] = written[0].tolist()
print(json.dumps([transformers.__version__, found]))
"""


def read(python, folders):
    "Version of transformers, and what it makes of each folder."
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, "-c", READ, json.dumps(TEXTS), *map(str, folders)], capture_output=True, text=True, env=env, cwd=DATA.parent)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def python4(tmp_path_factory):
    "A Python whose transformers is 4.57, and everything else this environment's. Skips where pip cannot reach a registry."
    venv = tmp_path_factory.mktemp("transformers4") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    paths = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True)
    with open(f"{paths.stdout.strip()}/outer.pth", "w") as f: f.write(sysconfig.get_path("purelib") + "\n")   # behind the venv's own
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "transformers==4.57.*"]
    got = subprocess.run(pip, capture_output=True, text=True)
    if got.returncode: pytest.skip(f"transformers 4.57 needs a package registry: {got.stderr.strip().splitlines()[-1][:200]}")
    return python


@pytest.mark.slow
def test_shipped_policies_in_transformers_4(python4, tmp_path):
    save_policy(tiny_model("tiny", char_tokenizer()), char_tokenizer(), tmp_path / "new")   # what is saved from now on
    save_policy(*load_policy("schoolbook-sft", device="cpu"), tmp_path / "again")
    adapted, tokenizer = load_policy("schoolbook-sft", device="cpu")
    save_policy(add_lora(adapted, r=2), tokenizer, tmp_path / "adapter")
    folders = [*policies_at_hand().values(), tmp_path / "new", tmp_path / "again", tmp_path / "adapter"]
    (old, theirs), (new, ours) = read(python4, folders), read(sys.executable, folders)
    assert old.startswith("4.57") and not new.startswith("4")
    for folder in map(str, folders): assert theirs[folder] == ours[folder], folder
    assert all(len(f["written"]) > len(f["ids"][0]) + 20 for name, f in theirs.items() if name.endswith(("schoolbook-sft", "again", "adapter")))
