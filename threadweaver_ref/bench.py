"""Measurements: what the results in `data/results` and the tables of the README come from. A plain file, like `cli.py`."""
import datetime
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm

from threadweaver_ref.decode import DecodeConfig, Decoder, generate
from threadweaver_ref.forkjoin import Limits
from threadweaver_ref.sft import RECIPES, packing_counts
from threadweaver_ref.tasks import BENCH_FAMILIES, bench, grade, oracle, sums
from threadweaver_ref.tokenizer import control_ids, encode_prompt, encode_text


def provenance(seed=None) -> dict:
    "Machine, versions, seed, commit and command of a measurement."
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    cpu = f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    program = Path(sys.argv[0]).name.replace("cli.py", "threadweaver-ref")   # the same, run as a module
    return {"command": " ".join([program, *sys.argv[1:]]), "seed": seed, "commit": commit, "machine": device,
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "date": datetime.date.today().isoformat()}


def mixed_problems(n) -> dict:
    "Family -> held-out problems: a third of `n` from GSM8K, the rest shared among the other families."
    others = [f for f in BENCH_FAMILIES if f != "gsm8k"]
    share = {"gsm8k": round(n / 3)}
    for i, f in enumerate(others): share[f] = (n - share["gsm8k"] + len(others) - 1 - i) // len(others)
    return {f: bench(f, k) for f, k in share.items() if k}


def share_of_oracle(rows):
    "Mean speedup over mean possible one, of `(problem, Oracle, rollout)`s with a right answer: what is short because it is wrong is not fast."
    right = [(o, r) for p, o, r in rows if grade(r.text, p)]
    return sum(o.sequential / r.token_latency for o, r in right) / sum(o.speedup for o, _ in right) if right else None


def _row(problems, sequential, parallel, seconds) -> dict:
    "One line of the comparison; speedups are means over problems (TW section 6)."
    best, mean = [oracle(p) for p in problems], statistics.fmean
    return {
        "problems": len(problems),
        "accuracy_sequential": mean(grade(r.text, p) for r, p in zip(sequential, problems)),
        "accuracy_parallel": mean(grade(r.text, p) for r, p in zip(parallel, problems)),
        "token_latency_sequential": mean(r.token_latency for r in sequential),
        "token_latency_parallel": mean(r.token_latency for r in parallel),
        "speedup_tokens": mean(s.token_latency / r.token_latency for s, r in zip(sequential, parallel)),
        "speedup_oracle": mean(o.speedup for o in best), "share_of_oracle": share_of_oracle(zip(problems, best, parallel)),
        "decode_steps_sequential": mean(r.decode_steps for r in sequential),
        "decode_steps_parallel": mean(r.decode_steps for r in parallel),
        "seconds_sequential": seconds[0], "seconds_parallel": seconds[1], "speedup_seconds": seconds[0] / seconds[1],
        "fork_rate": mean(r.forks > 0 for r in parallel), "well_formed": mean(r.well_formed for r in parallel),
    }


def compare(model, tokenizer, families: dict, config=DecodeConfig(), progress=True) -> tuple:
    "`(rows, rollouts)`: every family solved sequentially and in parallel; rows by family, and `all`."
    rows, rollouts, together = {}, {}, ([], [], [], [0.0, 0.0])
    for family, problems in tqdm(families.items(), desc="families", disable=not progress):
        runs, seconds = [], []
        for mode in ("sequential", "parallel"):
            began = time.perf_counter()
            runs.append(generate(model, tokenizer, [p.question for p in problems], replace(config, mode=mode), progress=progress))
            seconds.append(time.perf_counter() - began)
        rows[family], rollouts[family] = _row(problems, *runs, seconds), list(zip(problems, *runs))
        for whole, part in zip(together, (problems, *runs)): whole.extend(part)
        together[3][:] = [a + b for a, b in zip(together[3], seconds)]
    rows["all"] = _row(*together)
    return rows, rollouts


def table(rows: dict) -> str:
    "The comparison as text: sequential -> parallel."
    head = ("family", "problems", "right", "token latency", "decode steps", "seconds", "speedup", "possible", "in seconds", "forks")
    lines = [head] + [(
        f, str(r["problems"]), f"{r['accuracy_sequential']:.1%} -> {r['accuracy_parallel']:.1%}",
        f"{r['token_latency_sequential']:.0f} -> {r['token_latency_parallel']:.0f}",
        f"{r['decode_steps_sequential']:.0f} -> {r['decode_steps_parallel']:.0f}",
        f"{r['seconds_sequential']:.1f} -> {r['seconds_parallel']:.1f}", f"{r['speedup_tokens']:.2f}x", f"{r['speedup_oracle']:.2f}x",
        f"{r['speedup_seconds']:.2f}x", f"{r['fork_rate']:.0%}") for f, r in rows.items()]
    width = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, width)).rstrip() for line in lines)


class _Fork:
    "A hook: the main thread forks at once into so many threads (none for 1), and none of them ever stops."
    def __init__(self, tokenizer, branches):
        outlines = "".join(f"<Outline>{i}:a</Outline>" for i in range(1, branches + 1))
        self.block = encode_text(tokenizer, f"<Parallel><Outlines>{outlines}</Outlines>") if branches > 1 else []
        self.plain = encode_text(tokenizer, "1")[0]

    def __call__(self, branch, ids, logits):
        here = branch.depth == 0 and len(ids) < len(self.block)
        return torch.full_like(logits, -1e4).index_fill_(0, torch.tensor(self.block[len(ids)] if here else self.plain, device=logits.device), 0)


def step_cost(model, tokenizer, branches, slots=512, repeats=10) -> float:
    "Seconds (median) of one whole decoding step (`Decoder.turn`) of one problem: `branches` live branches, about `slots` slots of cache."
    config = DecodeConfig(hook=_Fork(tokenizer, branches), limits=Limits(max_tokens=10 ** 6, max_thread_tokens=10 ** 6))
    decoder, times = Decoder(model, tokenizer, config), []
    decoder.begin(["1" * (slots - 20 * branches)], [0])
    while not decoder.rows or len(decoder.rows[0].live) < branches: decoder.turn()
    for _ in range(repeats + 5):
        began = time.perf_counter()
        decoder.turn()
        times.append(time.perf_counter() - began)
    return statistics.median(times[5:])


def step_costs(model, tokenizer, counts=(1, 2, 4, 8, 16), rounds=7) -> dict:
    "Decoding step by live branches, relative to one branch: medians over rounds that measure all in turn."
    runs = [[step_cost(model, tokenizer, b) for b in counts] for _ in range(rounds)]
    return {b: {"ms": 1e3 * statistics.median(r[i] for r in runs), "ratio": statistics.median(r[i] / r[0] for r in runs)}
            for i, b in enumerate(counts)}


def wall_clock(model, tokenizer, problems) -> dict:
    "Sequential against parallel, one problem at a time, in turn: means, and the share of time outside the model."
    rows = []
    for p in tqdm(problems, desc="one at a time"):
        row = {}
        for mode in ("sequential", "parallel"):
            stats = {}
            rollout = generate(model, tokenizer, [p.question], DecodeConfig(mode=mode), stats=stats)[0]
            row[mode] = {"seconds": stats["seconds"], "outside_model": 1 - stats["forward_seconds"] / stats["seconds"],
                         "token_latency": rollout.token_latency, "right": grade(rollout.text, p)}
        rows.append(row)
    mean = statistics.fmean
    result = {mode: {k: mean(r[mode][k] for r in rows) for k in rows[0][mode]} for mode in rows[0]}
    result["speedup_seconds"] = mean(r["sequential"]["seconds"] / r["parallel"]["seconds"] for r in rows)
    result["speedup_tokens"] = mean(r["sequential"]["token_latency"] / r["parallel"]["token_latency"] for r in rows)
    return {"problems": len(rows), **result}


@torch.inference_mode()
def against_generate(model, tokenizer, problems, longest=1200) -> dict:
    "Batched sequential decoding here against `transformers.generate` on the same batch; do the texts agree?"
    began = time.perf_counter()
    ours = generate(model, tokenizer, [p.question for p in problems], DecodeConfig(mode="sequential", batch=len(problems)))
    seconds = time.perf_counter() - began
    prompts = [encode_prompt(tokenizer, p.question) for p in problems]
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    began = time.perf_counter()
    out = model.generate(**batch, max_new_tokens=longest, do_sample=False, suppress_tokens=[*control_ids(tokenizer).values()])
    theirs = time.perf_counter() - began
    texts = [tokenizer.decode(o[batch["input_ids"].shape[1]:], skip_special_tokens=False).split(tokenizer.eos_token)[0] for o in out]
    return {"problems": len(problems), "seconds": seconds, "seconds_transformers": theirs, "ratio": theirs / seconds,
            "same_text": statistics.fmean(a.text == b for a, b in zip(ours, texts))}


def _stages(name):
    "The recipes that a policy went through and that taught it to fork, each once, the last one first."
    found, left = {}, [name]
    while left:
        name = left.pop()
        recipe = RECIPES.get(name)
        if name in found or recipe is None or recipe.config and not recipe.config.fork: continue
        found[name] = recipe
        left += [recipe.start] if isinstance(recipe.start, str) else recipe.start
    return [(name, recipe) for name, recipe in found.items() if recipe.config]


def packing(tokenizer, n=200, seed=0, policy="tiny-sft") -> dict:
    """Tokens through the model on the problems that a policy is fine-tuned on, forked where they can be: unit by unit over packed.

    `n` problems of every stage; `ratio` is over all, each stage with as many problems as it has in training."""
    stages, sums = {}, [0.0, 0.0]
    for name, recipe in _stages(policy):
        rng = random.Random(f"packing {seed} {name}")
        problems = [recipe.problems(rng, recipe.hard_from + rng.randrange(recipe.config.steps)) for _ in range(n)]
        counts = [sum(c) / n for c in zip(*[packing_counts(p, tokenizer) for p in problems])]
        stages[name] = {"problems": recipe.config.steps * recipe.config.batch, "ratio": counts[0] / counts[1]}
        sums = [t + stages[name]["problems"] * c for t, c in zip(sums, counts)]
    return {"measured": n, "ratio": sums[0] / sums[1], "stages": stages}


def decode_bench(model, tokenizer, problems=8, seed=0) -> dict:
    "Everything that `threadweaver-ref bench` measures."
    rng = random.Random(seed)
    wide = [sums(rng, 8, 3) for _ in range(problems)]
    half = [p for f in ("gsm8k", "chain") for p in bench(f, 16)]
    return {**provenance(seed), "step_cost": step_costs(model, tokenizer), "sums_of_8": wall_clock(model, tokenizer, wide),
            "against_generate": against_generate(model, tokenizer, half), "packing": packing(tokenizer)}
