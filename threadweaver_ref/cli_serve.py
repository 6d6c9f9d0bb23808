"""Commands for servers: `threadweaver-ref serve-check` and `serve-cost`. A plain file."""
import json
from pathlib import Path
from typing import Optional

import typer


def add_commands(app):
    "Give the command line its commands for servers."
    app.command("serve-check")(serve_check)
    app.command("serve-cost")(serve_cost)


def serve_check(
    url: list[str] = typer.Argument(..., help="such as http://127.0.0.1:8000, or several; the key is in the environment: THREADWEAVER_API_KEY"),
    model: str = typer.Option(..., help="its name on the server"),
    policy: str = typer.Option("tiny-rl", help="the policy that is served (a shipped one, a folder or a hub name): its tokenizer is used"),
    question: list[str] = typer.Option([], help="one on which it should fork; default: development problems of --domain"),
    domain: str = typer.Option("programs", help="which problems (`threadweaver-ref domains` lists them)"),
    dialect: str = typer.Option("", help="completions, generate or sglang; default: the best that the server has"),
):
    "Try what fork and join need of a server, one thing after another. Fails unless it works."
    from threadweaver_ref.domains import families_of, split_problems
    from threadweaver_ref.model import load_policy
    from threadweaver_ref.serve import CompletionsClient, serve_check
    from threadweaver_ref.tokenizer import stop_ids
    loaded, tokenizer = load_policy(policy, device="cpu")
    asked = question or [p.question for ps in split_problems(domain, "dev", -(-5 // len(families_of(domain)))).values() for p in ps][:5]
    works = True
    for address in url:
        found = serve_check(CompletionsClient(address, model, dialect=dialect or None, stops=stop_ids(loaded, tokenizer)), tokenizer, asked)
        typer.echo("\n".join([address, *map(str, found)]))
        works = works and found[-1].ok
    raise typer.Exit(0 if works else 1)


def serve_cost(
    url: str = typer.Argument(..., help="a vLLM that serves this policy"),
    model: str = typer.Option(..., help="its name on the server"),
    policy: str = typer.Option("tiny-rl", help="the policy that is served"),
    problems: int = typer.Option(20, help="of each family", min=1),
    domain: str = typer.Option("programs", help="which problems (`threadweaver-ref domains` lists them)"),
    note: str = typer.Option("", help="what else should be known of this run"),
    out: Optional[Path] = typer.Option(None, help="a .json file for the rows"),
):
    "The same problems through the local decoder, continuous batching and a server: seconds, requests, tokens read again, cache hits."
    from threadweaver_ref.domains import split_problems
    from threadweaver_ref.evaluate import provenance
    from threadweaver_ref.model import decoding_copy, load_policy
    from threadweaver_ref.serve import CompletionsClient, cost_rows
    from threadweaver_ref.tokenizer import stop_ids
    if out and not out.resolve().parent.is_dir(): raise ValueError(f"{out.parent} is no folder: the rows cannot be written to {out}")
    loaded, tokenizer = load_policy(policy)
    client = CompletionsClient(url, model, stops=stop_ids(loaded, tokenizer))
    client.learn()   # a wrong address or model is said now, not behind the local runs
    asked = [p.question for ps in split_problems(domain, "dev", problems).values() for p in ps]
    rows, same = cost_rows(decoding_copy(loaded), tokenizer, asked, client)
    for row in rows: typer.echo(json.dumps(row))
    typer.echo("the same tokens" if same else "NOT the same tokens")
    about = provenance(f"threadweaver-ref serve-cost URL --model {model} --policy {policy} --problems {problems} --domain {domain}", seed=0)
    if out: out.write_text(json.dumps({**about, "note": note, "same": same, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    raise typer.Exit(0 if same else 1)
