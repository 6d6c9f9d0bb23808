"""Fails if a generated module differs from its notebook, or a notebook carries debris. Run by `make test`."""
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from threadweaver_ref.results import shown

ROOT = Path(__file__).resolve().parent.parent
PLAIN = {"cli.py", "cli_adapt.py", "cli_serve.py"}   # modules that no notebook makes


def drift(copy) -> list:
    "Modules that change when the notebooks are exported again."
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "data", ".hypothesis", "__pycache__"))
    subprocess.run(["nbdev_export"], cwd=copy, check=True)
    made, kept = ({p.name: p.read_text() for p in (root / "threadweaver_ref").glob("*.py")} for root in (copy, ROOT))
    changed = [name for name in sorted({*made, *kept}) if made.get(name) != kept.get(name)]
    return [f"{name}: differs from its notebook (edit the notebook, run nbdev_export)" for name in changed]


def debris(path) -> list:
    "What a notebook should not carry."
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT / "nbs").as_posix()
    notebook = json.loads(text)
    found = [f"{name}: {len(text) // 1000} kB, more than 500"] if len(text) > 500_000 else []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if output["output_type"] == "error": found.append(f"{name}: an error among the outputs")
            if output.get("name") == "stderr": found.append(f"{name}: stderr among the outputs: {''.join(output['text'])[:60]!r}")
        if cell["cell_type"] == "code" and cell.get("execution_count"): found.append(f"{name}: execution counts (run nbdev_clean)"); break
    if not any(cell.get("outputs") for cell in notebook["cells"]): found.append(f"{name}: no outputs")
    return found


def stale_readme() -> list:
    "Text and results of `index.ipynb` that README.md lacks."
    readme, found = (ROOT / "README.md").read_text(encoding="utf-8"), []
    index = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    texts = [s for s in shown(index, "index") if isinstance(s.content, str)]
    found += [f"README.md lacks {s.name} of index.ipynb, a result (run make readme)" for s in texts if s.content.strip() not in readme]
    for cell in index["cells"]:
        text = re.sub(r"\]\(([0-9a-z_]+\.ipynb)\)", r"](nbs/\1)", "".join(cell["source"])).replace("](../", "](").strip()
        if cell["cell_type"] == "markdown" and text not in readme: found.append(f"README.md lacks {text[:60]!r} of index.ipynb (run make readme)")
    return found


def main():
    with tempfile.TemporaryDirectory() as folder: found = drift(Path(folder) / "copy")
    for path in sorted((ROOT / "nbs").rglob("[!_]*.ipynb")): found += debris(path)   # one that starts with _ is a draft
    found += stale_readme()
    print("\n".join(found) or "notebooks and modules agree; no debris")
    sys.exit(bool(found))


if __name__ == "__main__": main()
