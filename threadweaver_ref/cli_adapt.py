"""`threadweaver-ref adapt`: a model adapted to a file of your own. A plain file."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Optional

import typer

app = typer.Typer(no_args_is_help=True, help="Adapt a model to your own data: check the file, train, evaluate, export.")
JOIN = "how threads come back: concat, result or kv"
DATA = typer.Argument(..., help="a file with one JSON object a line: question, answer, and steps or a text if you have them")


def _read(path, err=True):
    "The good rows of a file; what is wrong with the others is said line by line."
    from threadweaver_ref.yourdata import read_yours
    found = read_yours(path)
    _left_out(path, found.faults, err)
    for note in found.notes: typer.echo(f"{path}: {note}", err=err)
    return found


def _left_out(path, faults, err=True):
    for fault in faults: typer.echo(f"{path}, {fault}", err=err)


def in_processes(n):
    "Run this command once more, in `n` processes. glibc is told to keep memory rather than ask for it anew in every step."
    import torch
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", "-m", "threadweaver_ref.cli"]
    env = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // n)), "MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "16000000000"}
    if not torch.cuda.is_available(): env["ACCELERATE_USE_CPU"] = "true"
    raise typer.Exit(subprocess.run([sys.executable, *launch, *sys.argv[1:]], env={**env, **os.environ}).returncode)


def writable(path):
    "Make the folder of a result, and see that the result can be written there: before it is measured. Raises `OSError` if not."
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    path.open("a").close()
    if new: path.unlink(missing_ok=True)   # several processes may try at once


def _policy_in(folder):
    "The policy in a folder that `adapt train` was given, or what else was given, as it is."
    return str(Path(folder) / "policy") if (Path(folder) / "policy").is_dir() else folder


@app.command()
def check(
    data: Path = DATA,
    base: Optional[str] = typer.Option(None, help="the model to be adapted: its tokenizer counts, and what it cannot take is said"),
    join: str = typer.Option("concat", help=JOIN),
):
    "Every broken rule with its line; what could fork, and what that could save. Exit code 1 if a row is left out."
    from threadweaver_ref.adapt import Plan, start, usable, window_of
    from threadweaver_ref.domains import char_length
    from threadweaver_ref.report import text_length
    from threadweaver_ref.survey import split_blanks, survey
    found = _read(data, err=False)
    model, tokenizer = start(Plan(base, join=join)) if base else (None, None)
    rows, faults = usable(found.rows, tokenizer, model and window_of(model), join)
    length = text_length(tokenizer) if base else char_length
    _left_out(data, faults, err=False)
    bad = len({f.line for f in [*found.faults, *faults]})
    typer.echo("\n".join(_survey_lines(survey(rows, length), bad, f"tokens of {base}" if base else "characters")))
    split = sum(split_blanks(r, tokenizer) for r in rows) if base else 0
    if split: typer.echo(f"{split} rows have a blank where a fork could be, a token of its own there: write it in front of the next step's text")
    if bad: raise typer.Exit(1)


def _survey_lines(s, bad, unit):
    "What `check` says of a file, in lines."
    texts = f"{s['text']} with a text ({s['texts_with_forks']} fork)"
    yield f"rows: {s['rows']} good, {bad} left out; {s['steps']} with steps, {texts}, {s['question']} a question alone"
    yield f"split, by a hash of the question: {s['train']} train, {s['dev']} dev, {s['test']} test"
    unmeasured = f"; {s['not_measured']} have too many orders to be measured" if s["not_measured"] else ""
    yield f"could fork: {s['could_fork']} of {s['steps']} with steps{unmeasured}"
    if "best_flat" not in s: return
    yield (f"of these, in {unit}: best flat speedup {s['best_flat']:.2f} (mean; at most {s['largest']:.2f}), forking whenever ready "
           f"{s['whenever_ready']:.2f}; it pays in {s['pays']} of them; without forks an answer has {s['never']:.0f} tokens (mean)")
    if s["best_flat"] < 1.05: yield "forks save next to nothing here: make outlines shorter, or steps longer"


@app.command()
def rewrite(
    data: Path = DATA,
    out: Path = typer.Option(..., help="the new file"),
    url: Optional[str] = typer.Option(None, help="a server of an instruction model, such as http://127.0.0.1:8000: it is asked instead"),
    model: Optional[str] = typer.Option(None, help="its name on the server"),
):
    """Turn texts in one line into steps: by rules (cut at sentences, linked by values and names), or by a model that is asked. Look at some
    rows! What a killed run had done is in OUT.part."""
    from threadweaver_ref.rewrite import STOPPED, rewrite_rows
    from threadweaver_ref.yourdata import write_yours
    if out.exists() and data.exists() and out.samefile(data): raise ValueError(f"--out {out} is the file itself: choose another name")
    if bool(url) != bool(model): raise ValueError("--url and --model go together: a server, and the name of a model on it")
    found = _read(data)
    writable(out)
    part = out.with_name(out.name + ".part")   # a model may have been asked for hours
    with part.open("w", encoding="utf-8") as file:
        made, faults = rewrite_rows([r.data for r in found.rows], _asking(url, model) if url else None,
                                    lambda row: print(json.dumps(row, ensure_ascii=False), file=file, flush=True))
    for i, fault in faults: typer.echo(f"{data}, line {found.rows[i - 1].line}: stays as it is: {fault}", err=True)
    write_yours(out, made)
    part.unlink()
    changed = sum("steps" in new and bool(old.text) for new, old in zip(made, found.rows))
    typer.echo(f"saved {out}: {len(made)} rows, {changed} of them rewritten")
    if faults and faults[-1][1] == STOPPED: raise typer.Exit(130)


def _asking(url, model):
    "f(prompt) -> what the model of a server replies."
    from threadweaver_ref.client import CompletionsClient
    client = CompletionsClient(url, model, retries=3, timeout=600)   # reasoners think; for a server that is away a row waits a few seconds
    def ask(prompt):
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        return client.ask("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    return ask


@app.command()
def train(
    base: str = typer.Option(..., help="a shipped policy, a folder, a hub name; or mini, tiny or small for new weights"),
    data: Path = typer.Option(..., help="a file with one JSON object a line"),
    out: Path = typer.Option(..., help="folder for checkpoints and the policy; a stopped run goes on there"),
    sft_steps: int = typer.Option(600, help="of fine-tuning", min=0),
    selftrain: int = typer.Option(0, help="questions of a round of self-training behind it", min=0),
    rl_steps: int = typer.Option(40, help="of P-GRPO", min=0),
    batch: int = typer.Option(16, help="rows in a step of fine-tuning", min=1),
    rl_batch: int = typer.Option(8, help="questions in a step of P-GRPO, eight rollouts each", min=1),
    lr: Optional[float] = typer.Option(None, help="of fine-tuning; default 0.005 (Muon) for all weights, 0.001 (AdamW) for LoRA"),
    rl_lr: float = typer.Option(1e-3, help="of P-GRPO"),
    lora: Optional[int] = typer.Option(None, help="rank; 0: all weights; default 16, and 0 for a base of fewer than 20 million parameters", min=0),
    join: str = typer.Option("concat", help=JOIN),
    twin: bool = typer.Option(False, "--twin", help="train the sequential twin, with forks banned, into OUT/twin"),
    seed: int = typer.Option(0, min=0),
    gradient_checkpointing: bool = typer.Option(False, "--gradient-checkpointing", help="less memory: layers are computed again"),
    processes: int = typer.Option(1, help="processes that share every step", min=1),
):
    "Fine-tuning on arrangements drawn at random, self-training if you like, P-GRPO for time saved. Killed, the same command goes on."
    from threadweaver_ref.adapt import Plan
    more = {"gradient_checkpointing": gradient_checkpointing}
    plan, rank = Plan(base, sft_steps, selftrain, rl_steps, batch, rl_batch, lr, rl_lr, lora, join, twin, seed, **more), os.environ.get("RANK")
    try:
        if rank is None and processes > 1: _look(base, data), in_processes(processes)
        _train(plan, data, out, speaks=rank in (None, "0"))
    except KeyboardInterrupt:
        if rank is None: typer.echo(f"stopped: the same command continues from the last checkpoint under {out}", err=True)
        raise typer.Exit(130) from None


def _look(base, data):
    "Refuses a base or a file that is not there: once, before every process would."
    from threadweaver_ref.adapt import SIZES, find_policy
    from threadweaver_ref.yourdata import read_yours
    if base not in SIZES: find_policy(base)
    read_yours(data)


def _train(plan, data, out, speaks):
    "One process's part of `train`; of several, one speaks."
    from threadweaver_ref.adapt import adapt
    from threadweaver_ref.yourdata import read_yours
    began, found = time.perf_counter(), _read(data) if speaks else read_yours(data)
    out.mkdir(parents=True, exist_ok=True)
    _, _, logs = adapt(found, out, plan, on_faults=lambda faults: speaks and _left_out(data, faults))
    if not speaks: return
    for line in _last_steps(logs): typer.echo(line)
    typer.echo(f"saved {out / 'twin' / 'policy' if plan.twin else out / 'policy'} after {time.perf_counter() - began:.0f} s")


def _last_steps(logs):
    "The last step of every stage, a line each."
    for stage, log in logs.items():
        last = {k: round(log[-1][k], 4) for k in ("loss", "accuracy", "reward", "token_latency", "fork_rate") if k in log[-1]}
        yield f"{stage}: {len(log)} steps; the last one: {', '.join(f'{k} {v}' for k, v in last.items())}"


@app.command(name="eval")
def evaluate(
    policy: str = typer.Option(..., help="the folder that `adapt train` was given as --out, or any policy"),
    data: Path = typer.Option(..., help="a file with one JSON object a line"),
    split: str = typer.Option("dev", help="dev; or test, once, when all is decided"),
    problems: Optional[int] = typer.Option(None, help="at most so many", min=1),
    twin: Optional[str] = typer.Option(None, help="the sequential twin; default POLICY/twin, if it is there"),
    batch: int = typer.Option(64, help="problems decoded together", min=1),
    join: Optional[str] = typer.Option(None, help=f"{JOIN}; default: the one it was trained with"),
    longest: Optional[int] = typer.Option(None, help="tokens of an answer, at the most; default: half as many again as the file's own need", min=1),
    out: Optional[Path] = typer.Option(None, help="folder for one .jsonl file a policy and mode; a stopped run goes on there"),
):
    "Both modes against the sequential twin, on questions that training never saw, with intervals."
    from threadweaver_ref.adapt import measure, trained_join
    from threadweaver_ref.evaluate import provenance, public_path
    from threadweaver_ref.model import load_policy
    from threadweaver_ref.report import plain_table, reports_table
    if split not in ("dev", "test"): raise ValueError(f"unknown split {split!r}: choose dev or test")
    loaded, join = load_policy(_policy_in(policy)), join or trained_join(policy)
    rows, chosen = _chosen(data, split, problems, *loaded)
    limits, twin = _limits(rows, loaded[1], longest), _twin_of(policy, twin)
    given = f"--policy {public_path(policy)} --data {public_path(data)} --split {split}" + (f" --problems {problems}" if problems else "")
    if out: out.mkdir(parents=True, exist_ok=True)
    about = provenance(f"threadweaver-ref adapt eval {given} --batch {batch} --join {join} --longest {limits.max_tokens}", seed=0)
    reports = measure(loaded, chosen, twin, join, batch, limits, out, about)
    typer.echo(f"parallel mode, by family:\n\n{plain_table(reports['parallel'].table())}\n")
    typer.echo(plain_table(reports_table(reports, next(iter(reports)))))
    remedy = f"train one with `adapt train --twin --out {public_path(policy)}`" if _policy_in(policy) != policy else "give one with --twin"
    if not twin: typer.echo(f"\nno twin to compare with: {remedy}", err=True)


def _limits(rows, tokenizer, longest):
    "What `answer_limits` says, with `longest` tokens if so many are given."
    from dataclasses import replace

    from threadweaver_ref.adapt import answer_limits
    limits = answer_limits(rows, tokenizer)
    return replace(limits, max_tokens=longest, max_thread_tokens=longest) if longest else limits


def _twin_of(policy, twin):
    "The twin that was given, or the one beside the policy, or None."
    beside = Path(policy) / "twin" / "policy"
    return _policy_in(twin) if twin else str(beside) if beside.is_dir() else None


def _chosen(data, split, problems, model, tokenizer):
    "(the good rows of a file, the problems of a split); what the model cannot take of the split is said."
    from threadweaver_ref.adapt import evaluation_problems, usable, window_of
    from threadweaver_ref.yourdata import Rows
    found = _read(data)
    rows, faults = usable(found.rows, tokenizer, window_of(model))
    lines = {r.line for r in found.of(split)}
    _left_out(data, [f for f in faults if f.line in lines])
    return rows, evaluation_problems(Rows(rows), split, problems)


@app.command()
def export(
    policy: str = typer.Option(..., help="the folder that `adapt train` was given as --out, or any policy"),
    out: Path = typer.Option(..., help="folder for the merged model"),
    dtype: str = typer.Option("float32", help="or bfloat16"),
):
    "A merged folder for Transformers and vLLM, read back and compared."
    from threadweaver_ref.adapt import export_policy
    from threadweaver_ref.serve import save_generate
    off = export_policy(_policy_in(policy), out, dtype)
    save_generate(out)   # so that `generate(custom_generate=out, trust_remote_code=True)` forks
    typer.echo(f"saved {out}; read back, log-probabilities differ by at most {off:.1e}")
    typer.echo(json.dumps({"transformers": f"AutoModelForCausalLM.from_pretrained({str(out)!r})", "vllm": f"vllm serve {out}"}, indent=1))
