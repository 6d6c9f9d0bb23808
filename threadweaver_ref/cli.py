"""The command line, `threadweaver-ref`: thin, over the modules that the notebooks build. A plain file."""
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Optional

import typer

from threadweaver_ref.cli_adapt import app as adapt_app, in_processes, writable
from threadweaver_ref.cli_serve import add_commands

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Adaptive parallel reasoning: fork, decode in one batch, join, answer.")
app.add_typer(adapt_app, name="adapt")
add_commands(app)
POLICY, DOMAIN = "tiny-rl", "programs"


def _questions(question, file):
    "The questions of the argument, the file, or standard input; one a line."
    if question is not None and file is not None: raise ValueError("a question and --file: give one of them, not both")
    if question and question != "-":
        if any("\ud800" <= c <= "\udfff" for c in question): raise ValueError(f"the question is not UTF-8: {question!a:.60}")
        return [question]
    none = "no question: give one as an argument, with --file, or on standard input"
    if not question and not file and sys.stdin.isatty(): raise ValueError(none)
    from threadweaver_ref.domains import text_lines
    lines = text_lines(file.read_bytes(), file) if file else text_lines(sys.stdin.buffer.read(), "standard input")
    if found := [line.strip() for line in lines if line.strip()]: return found
    raise ValueError(none)


@app.command()
def solve(
    question: Optional[str] = typer.Argument(None, help='such as "a=7+3x4;b=2+5x3;c=a+b;c?"; "-" or nothing: read standard input. '
                                            'Options first, then -- before a question that begins with "-": solve --json -- "-5*3+7?"'),
    file: Optional[Path] = typer.Option(None, help="a file with one question a line"),
    mode: str = typer.Option("parallel", help="parallel, sequential or autoregressive"),
    join: str = typer.Option("concat", help="how threads come back: concat, result or kv"),
    deadline: Optional[int] = typer.Option(None, help="decoding steps after which unfinished threads are closed and joined as they stand"),
    policy: str = typer.Option(POLICY, help="a shipped policy, a folder, or a hub name"),
    temperature: float = typer.Option(0.0, help="0 is greedy"),
    seed: int = typer.Option(0),
    as_json: bool = typer.Option(False, "--json", help="one JSON object a question"),
):
    "Answer questions, and show the reasoning with its threads told apart."
    questions = _questions(question, file)   # before anything slow
    from threadweaver_ref.decode import DecodeConfig, generate
    from threadweaver_ref.evaluate import rollout_data
    from threadweaver_ref.model import load_policy
    from threadweaver_ref.race import trajectory_lines
    config = DecodeConfig(mode=mode, join=join, temperature=temperature, seed=seed, deadline=deadline)
    model, tokenizer = load_policy(policy)
    with warnings.catch_warnings(record=True) as said: rollouts = generate(model, tokenizer, questions, config)
    for line in dict.fromkeys([w for r in rollouts for w in r.warnings] + [str(w.message) for w in said]): typer.echo(f"warning: {line}", err=True)
    for r in rollouts:
        if as_json: typer.echo(json.dumps(rollout_data(r), ensure_ascii=not (sys.stdout.encoding or "").lower().startswith("utf")))
        else: typer.echo("\n".join([r.question, *trajectory_lines(r.trajectory), _summary(r)]) + "\n")


def _summary(r, seconds=None):
    errors = "".join(f"\nerror: {e}" for e in r.errors)
    return (f"answer: {r.answer}   token latency {r.token_latency}, tokens {r.total_tokens}, decode steps {r.decode_steps}, "
            f"{r.seconds if seconds is None else seconds:.2f} s, finished: {r.finish_reason}{errors}")


@app.command()
def demo(
    problems: int = typer.Option(64, help="development problems, a share from every family", min=5),
    policy: str = typer.Option(POLICY),
    domain: str = typer.Option(DOMAIN, help="which problems (`threadweaver-ref domains` lists them)"),
    out: Path = typer.Option(Path("demo"), help="folder for race.svg, timeline.png and demo.json"),
):
    "The main job: a race with and without forks on a wide problem; then development problems in both modes, one at a time, compared."
    import matplotlib
    matplotlib.use("Agg")
    from threadweaver_ref.decode import DecodeConfig
    from threadweaver_ref.domains import best_flat, families_of, split_problems
    from threadweaver_ref.draw import show_timeline
    from threadweaver_ref.evaluate import evaluate, provenance, public_path, rollout_data
    from threadweaver_ref.model import load_policy
    from threadweaver_ref.race import picture, race
    from threadweaver_ref.report import plain_table, reports_table
    writable(out / "demo.json")
    model, tokenizer = load_policy(policy)
    chosen = _mixed(split_problems(domain, "dev", -(-problems // len(families_of(domain)))), problems)[:problems]
    widest = max(chosen, key=lambda p: best_flat(p).sequential / best_flat(p).best if p.steps else 0)
    sides = race(model, tokenizer, widest.question, on_first=lambda sides: picture(sides, out / "race.svg"))
    for s in sides: typer.echo(f"{s.name}: {_summary(s.rollout, s.seconds)}")
    reports = {mode: evaluate(model, tokenizer, chosen, DecodeConfig(mode, batch=1)) for mode in ("sequential", "parallel")}
    typer.echo(f"\n{public_path(policy)}, parallel mode, by family:\n\n{plain_table(reports['parallel'].table())}")
    typer.echo(f"\nboth modes, one problem at a time:\n\n{plain_table(reports_table(reports, 'sequential'))}\n")
    show_timeline(sides[1].rollout).figure.savefig(out / "timeline.png", dpi=120)
    about = provenance(f"threadweaver-ref demo --problems {problems} --policy {public_path(policy)} --domain {domain}", seed=0)
    found = {"reports": {m: r.rows for m, r in reports.items()}, "race": {s.name: {**rollout_data(s.rollout), "seconds": s.seconds} for s in sides}}
    (out / "demo.json").write_text(json.dumps({**about, **found}, indent=1) + "\n")
    typer.echo(f"saved {out}/race.svg, {out}/timeline.png and {out}/demo.json")


@app.command()
def evaluate(
    policy: list[str] = typer.Option([POLICY], help="a shipped policy, a folder, or a hub name; several are measured on the same problems"),
    domain: str = typer.Option(DOMAIN, help="which problems (`threadweaver-ref domains` lists them)"),
    split: str = typer.Option("dev", help="dev, or test (measured for a release only)"),
    problems: int = typer.Option(100, help="of each family", min=1),
    family: list[str] = typer.Option([], help="of these families alone"),
    mode: list[str] = typer.Option(["sequential", "parallel"], help="of decoding, or a baseline such as best-of-4; each policy in every one"),
    timed: int = typer.Option(0, help="of each family, so many are timed as well, all in turn, one at a time and in batches", min=0),
    batch: int = typer.Option(64, help="problems decoded together", min=1),
    join: list[str] = typer.Option(["concat"], help="how threads come back: concat, result or kv; one for all policies, or one for each"),
    longest: int = typer.Option(4096, help="tokens of an answer, at the most", min=1),
    dtype: str = typer.Option("float32", help="of the weights while decoding: float32, or bfloat16 (adapters are merged before)"),
    out: Optional[Path] = typer.Option(None, help="folder for one .jsonl file a policy and mode; a stopped run goes on there"),
):
    "Accuracy with intervals, token latency, regret and seconds; every problem's own row is kept."
    from threadweaver_ref.domains import draw_split, families_of
    from threadweaver_ref.evaluate import evaluate_all, find_way, named_policies, provenance, public_path, time_all
    from threadweaver_ref.report import plain_table, reports_table
    families, named = {f: draw_split(domain, split, problems, f) for f in family or families_of(domain)}, named_policies(policy, join)
    if out: writable(out / "x.jsonl")
    runs = {f"{n}-{m}": (*loaded, *find_way(m, j, batch, longest)) for n, p, j in named for loaded in [_loaded(p, dtype)] for m in mode}
    given = [*(f"--family '{f}'" for f in family), *(f"--policy {n}" for n, *_ in named), *(f"--mode {m}" for m in mode),
             *(f"--join {j}" for j in join), f"--batch {batch} --timed {timed} --longest {longest}",
             *([f"--dtype {dtype}"] if dtype != "float32" else []), *([f"--out {public_path(out)}"] if out else [])]
    about = provenance(f"threadweaver-ref evaluate --domain {domain} --split {split} --problems {problems} {' '.join(given)}", seed=0)
    reports = evaluate_all(runs, [p for ps in families.values() for p in ps], out, about)
    for name, report in reports.items(): typer.echo(f"\n{name}:\n\n{plain_table(report.table())}")
    if len(reports) > 1: typer.echo(f"\n{plain_table(reports_table(reports, next(iter(reports))))}\n")
    if timed: typer.echo("\n".join(time_all(runs, _mixed(families, timed), sorted({1, batch}), out, about)))


def _loaded(policy, dtype):
    "(model, tokenizer) to decode with, in a number format."
    import torch

    from threadweaver_ref.model import load_policy
    from threadweaver_ref.pgrpo import rounded_copy
    if dtype not in ("float32", "bfloat16"): raise ValueError(f"unknown dtype {dtype!r}: choose float32 or bfloat16")
    model, tokenizer = load_policy(policy)
    return (model if dtype == "float32" else rounded_copy(model, torch.bfloat16)), tokenizer


def _mixed(families, n): return [p for some in zip(*(ps[:n] for ps in families.values())) for p in some]   # of every family in turn


@app.command()
def load(
    policy: str = typer.Option(POLICY, help="a shipped policy, a folder, or a hub name"),
    domain: str = typer.Option(DOMAIN, help="which problems (`threadweaver-ref domains` lists them)"),
    split: str = typer.Option("dev", help="dev, or test (measured for a release only)"),
    problems: int = typer.Option(52, help="of each family", min=1),
    size: list[int] = typer.Option([1, 2, 4, 8, 16, 32, 64], help="problems in the works, all the time", min=1),
    turns: int = typer.Option(3, help="measurements of each size and way", min=1),
    out: Path = typer.Option(..., help="folder for load.jsonl; a stopped run goes on there"),
):
    "Throughput and latency while many problems wait: without forks, with forks, and with a width regulated by load."
    from threadweaver_ref.domains import split_problems
    from threadweaver_ref.evaluate import provenance, public_path
    from threadweaver_ref.load import load_table, under_load
    from threadweaver_ref.model import load_policy
    from threadweaver_ref.report import plain_table
    mixed = _mixed(split_problems(domain, split, problems), problems)
    writable(out / "load.jsonl")
    given = f"--policy {public_path(policy)} --domain {domain} --split {split} --problems {problems} {' '.join(f'--size {n}' for n in size)}"
    about = provenance(f"threadweaver-ref load {given} --turns {turns} --out {public_path(out)}", seed=0)
    typer.echo(plain_table(load_table(under_load(*load_policy(policy), mixed, size, turns, out / "load.jsonl", about))))


@app.command()
def gpu(
    out: Path = typer.Option(..., help="folder for one JSON file a part"),
    part: Optional[list[str]] = typer.Option(None, help="cuda, steps, packing or pgrpo; default: all"),
    again: bool = typer.Option(False, "--again", help="measure finished parts anew"),
):
    "Measure all that wants a GPU, in parts of at most nine minutes. A stopped part goes on where it was; on a CPU everything is tiny."
    from threadweaver_ref.scale import measure_parts, summary
    writable(out / "steps.json")
    measure_parts(out, part or (), again, on_part=lambda name, content: typer.echo(summary(name, content)))


@app.command()
def train(
    name: str = typer.Argument(..., help="a recipe of data/recipes, such as tiny-sft, or the path of a .yaml file"),
    out: Optional[Path] = typer.Option(None, help="folder for the policy; default runs/NAME/policy"),
    runs: Path = typer.Option(Path("runs"), help="checkpoints and logs; a stopped run continues from there"),
    steps: Optional[int] = typer.Option(None, help="fewer or more optimiser steps than the recipe", min=1),
    seed: int = typer.Option(0, help="of problems, rollouts and new weights; all but seed 0 keep their runs in a folder of their own", min=0),
    processes: int = typer.Option(1, help="processes that share every step; on a CPU one a core is fastest", min=1),
):
    "Train a policy by a recipe, or continue where a run was stopped."
    from threadweaver_ref.recipes import load_recipe, save_trained, train_recipe
    recipe = load_recipe(name)   # once, not by every process
    if seed: runs = runs / f"seed-{seed}"
    folder, first = out or runs / recipe.name / "policy", "RANK" not in os.environ
    try:
        if first: writable(folder / "config.json")
        if first and processes > 1: in_processes(processes)
        model, tokenizer, _ = train_recipe(name, runs, **({"steps": steps} if steps else {}), **({"seed": seed} if seed else {}))
        if saved := save_trained(model, tokenizer, folder): typer.echo(f"saved {' and '.join(map(str, saved))}")
    except KeyboardInterrupt:
        if first: typer.echo(f"stopped: the same command continues from the last checkpoint under {runs}", err=True)
        raise typer.Exit(130) from None


@app.command()
def domains():
    "The domains and their families of problems, each with an example, its answer, and what forking could gain."
    from threadweaver_ref.domains import best_flat, domain_names, draw_split, families_of
    for domain, names in ((d, families_of(d)) for d in domain_names()):
        for name, (p,) in ((name, draw_split(domain, "dev", 1, name)) for name in names[:6]):
            typer.echo(f"{domain}, {name}: {p.question} -> {p.answer}")
            if p.steps: typer.echo("   token latency {0.sequential} without forks, {0.best} in the best flat schedule".format(best_flat(p)))
        if names[6:]: typer.echo(f"{domain}: {len(names) - 6} families more")


@app.command()
def results(out: Path = typer.Option(Path("results"), help="folder for a file a table or figure")):
    "Make every table and figure of README and the results notebooks again, from data/results; fails where one differs from what is saved."
    from threadweaver_ref.results import make_results
    old = make_results(out, on_shown=lambda made, changed: typer.echo(f"{out / made.file}: {'differs from' if changed else 'as in'} the notebook"))
    if old: raise ValueError(f"{', '.join(s.name for s in old)}: not what the notebooks show; run them again and save them, then make readme")


def _explained(error) -> bool:
    "Is it a mistake or a shortage that one line explains? Of libraries' own errors: a disk or a memory that is full."
    full = ("inline_container", "PytorchStreamWriter", "iostream error", "out of memory", "not enough memory", "can't allocate memory")
    named = {t.__name__ for t in type(error).__mro__} & {"SafetensorError", "EngineError"}
    return (isinstance(error, (ValueError, OSError, FloatingPointError, MemoryError)) or bool(named)
            or isinstance(error, RuntimeError) and any(words in str(error) for words in full))


def main():
    "Run the command line; an error is one clear line."
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):   # a terminal may know ASCII alone
        if hasattr(stream, "reconfigure"): stream.reconfigure(errors="backslashreplace")
    try:
        from transformers.utils import logging
        logging.disable_progress_bar()
        app()
    except KeyboardInterrupt: raise SystemExit(130) from None
    except Exception as error:
        if not _explained(error): raise
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "inline_container" in line: line = f"a file could not be written, is the disk full? {line}"
        typer.echo(f"threadweaver-ref: {line}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__": main()
