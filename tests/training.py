"Shared by the tests of the learning floor: problems, small models, runs that stop."
import os
import random
import subprocess
import sys
import textwrap

import torch

from threadweaver_ref.domains import Sequential, WheneverReady
from threadweaver_ref.model import tiny_model
from threadweaver_ref.schoolbook import FAMILIES, sum_of_products, training_problem
from threadweaver_ref.sft import SFTConfig
from threadweaver_ref.tokenizer import char_tokenizer, encode_prompt

TOKENIZER = char_tokenizer()
RUNNING = sum_of_products([(12, 3), (4, 5)])
MIXED = [training_problem(random.Random(1), [name]) for name in FAMILIES]
SHORT = SFTConfig(steps=6, batch=4, save_every=2, micro_tokens=512)


def prompt(p): return encode_prompt(TOKENIZER, p.question)
def forked(p, conclude=False): return WheneverReady(conclude).arrange(p)
def in_line(p): return Sequential().arrange(p)
def flat(tensors): return torch.cat([t.detach().flatten() for t in tensors])
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
def adapters(model): return flat(p for p in model.parameters() if p.requires_grad)


def fresh(seed=0, **options):
    torch.manual_seed(seed)
    return tiny_model("tiny", TOKENIZER, **{"hidden_size": 32, "num_hidden_layers": 2, **options})


def stop_at(n):
    def on_step(step, row):
        if step == n: raise KeyboardInterrupt
    return on_step


def drawing(*values):
    "An `rng` whose first draws are these."
    rng, values = random.Random(0), iter(values)
    real = rng.random
    rng.random = lambda: next(values, None) or real()
    return rng


def in_two_processes(script, folder):
    "Run a script in two gloo processes on the CPU; it gets the folder as its argument, and finds the tests' helpers."
    tests = os.path.dirname(os.path.abspath(__file__))
    (folder / "process.py").write_text(f"import sys\nsys.path.insert(0, {tests!r})\n" + textwrap.dedent(script))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(folder / "process.py"), str(folder)]
    subprocess.run(launch, check=True, timeout=300, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
