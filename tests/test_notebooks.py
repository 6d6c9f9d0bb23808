"""The notebooks run where only the package is installed; the helper with which they show errors."""
import ast
import json
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from threadweaver_ref.course import raises

ROOT = Path(__file__).resolve().parent.parent


def runtime() -> set:
    "Distributions that installing the package brings: its requirements in settings.ini, and what these require."
    line = next(line for line in (ROOT / "settings.ini").read_text().splitlines() if line.startswith("requirements ="))
    first = {Requirement(r).name for r in line.partition("=")[2].split()}
    second = {q.name for r in first for q in map(Requirement, requires(r) or []) if q.marker is None or q.marker.evaluate({"extra": ""})}
    return {name.lower().replace("_", "-") for name in first | second}


def imports(path):
    "Top-level names of the modules that a notebook's code cells import; not of those that may be missing (`except ImportError`)."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code": continue
        code = re.sub(r"^(\s*)[!%].*$", r"\1pass", "".join(cell["source"]), flags=re.MULTILINE)
        tree = ast.parse(code)
        tried = [t for t in ast.walk(tree) if isinstance(t, ast.Try) and any(getattr(h.type, "id", "") == "ImportError" for h in t.handlers)]
        optional = {id(node) for t in tried for statement in t.body for node in ast.walk(statement)}
        for node in (n for n in ast.walk(tree) if id(n) not in optional):
            if isinstance(node, ast.Import): yield from (a.name.partition(".")[0] for a in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level: yield node.module.partition(".")[0]


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("[!_]*.ipynb")), ids=lambda p: p.name)
def test_a_notebook_imports_what_the_package_brings(path):
    owners, brought = packages_distributions(), runtime()
    known = {*sys.stdlib_module_names, "threadweaver_ref"}
    foreign = [m for m in set(imports(path)) - known if not brought & {d.lower().replace("_", "-") for d in owners.get(m, ())}]
    assert not foreign, f"{path.name} imports {foreign}: only [dev] brings them"


def test_what_dev_alone_brings_is_seen(tmp_path):
    cell = {"cell_type": "code", "source": ["if 1:\n", "    !ls\n", "    import pytest\n", "from torch.nn import Linear\n",
                                            "try: import a\n", "except ImportError: import b\n", "try: import c\n", "except ValueError: pass"]}
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [cell]}))
    assert set(imports(tmp_path / "a.ipynb")) == {"pytest", "torch", "b", "c"} and {"torch", "tokenizers"} <= runtime()
    assert not {"pytest", "hypothesis", "trl", "nbdev"} & runtime()


def test_raises():
    with raises(ValueError) as caught: raise UnicodeError("line 7")
    assert str(caught.value) == "line 7"
    with raises((KeyError, ValueError), match="^line [0-9]$"): raise ValueError("line 7")
    with pytest.raises(AssertionError, match="nothing was raised"):
        with raises(ValueError): pass
    with pytest.raises(AssertionError, match="'line 7', which does not match 'line 8'"):
        with raises(ValueError, match="line 8"): raise ValueError("line 7")
    with pytest.raises(KeyError):
        with raises(ValueError): raise KeyError("other errors pass")


def test_the_install_cell_comes_first_and_takes_no_bare_folder_for_the_package(tmp_path):
    "After a restart on Colab the clone lies in the working directory, a folder of the package's name: that is not the package yet."
    cells = {}
    for path in sorted((ROOT / "nbs").glob("[!_]*.ipynb")):
        code = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        if path.name != "index.ipynb":
            cells[path.name] = next(c for c in code if not c.startswith("#| default_exp"))   # the tour has no module
            assert "find_spec" in cells[path.name], path.name
    assert len(set(cells.values())) == 1
    asked = re.search(r"^if (.*):   #", code := cells["01_format.ipynb"], re.MULTILINE)[1]
    assert "sys.path.insert" in code and "git clone" in code
    (tmp_path / "threadweaver_ref").mkdir()
    for folder, missing in [(tmp_path, True), (ROOT, False)]:
        done = [sys.executable, "-S", "-c", f"import sys, importlib.util; sys.path[:0] = ['']; print(bool({asked}))"]
        assert subprocess.run(done, cwd=folder, capture_output=True, text=True, env={}).stdout.strip() == str(missing)
