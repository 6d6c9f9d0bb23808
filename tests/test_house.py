"""The order of the course is the order of the package: what a module imports, and how large it may grow."""
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "threadweaver_ref"
CELLAR = {"layout", "widgets", "draw", "course"}   # for notebooks and the command line; no room imports them


def _module(notebook):
    "The module that a notebook exports, or None."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    found = [re.match(r"#\|\s*default_exp\s+(\w+)", "".join(c["source"])) for c in cells]
    return next((m[1] for m in found if m), None)


ROOMS = [m for n in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")) if (m := _module(n))]
TREES = {name: ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8")) for name in ROOMS}


def imported(tree):
    "What a module imports from this package: [(module, name)]."
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level or module.split(".")[0] == "threadweaver_ref":
                yield from ((module.removeprefix("threadweaver_ref").lstrip("."), a.name) for a in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name.removeprefix("threadweaver_ref").lstrip("."), "*") for a in node.names if a.name.startswith("threadweaver_ref"))


def wrong_imports(room, tree, rooms):
    "The imports of a room that are upward, private, or of the cellar."
    above = set(rooms[:rooms.index(room)]) - (CELLAR if room not in CELLAR else set())
    return [(m, n) for m, n in imported(tree) if (m and m not in above) or n.startswith("_")]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_public_names_of_rooms_above(room):
    assert not wrong_imports(room, TREES[room], ROOMS)


@pytest.mark.parametrize("line", ["from .joins import get_join", "from .format import _parse", "from threadweaver_ref.decode import generate",
                                  "import threadweaver_ref.decode", "def f():\n    from .draw import show_mask"])
def test_upward_and_private_imports_are_found(line):
    assert wrong_imports("tree", ast.parse(line), ["format", "tree", "joins", "decode", "draw"])


def test_every_module_has_a_notebook():
    assert {p.stem for p in PACKAGE.glob("*.py")} == {*ROOMS, "__init__", "_modidx", "cli", "cli_adapt", "cli_serve"}


@pytest.mark.parametrize("name", [*ROOMS, "cli", "cli_adapt", "cli_serve"])
def test_modules_and_functions_are_short(name):
    text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    assert len(text.splitlines()) <= 260
    assert not {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 30}


@pytest.mark.parametrize("room", ROOMS)
def test_a_class_is_whole(room):
    classes = [n for n in ast.walk(TREES[room]) if isinstance(n, ast.ClassDef)]
    assert not [c.name for c in classes if c.name in {b.id for b in c.bases if isinstance(b, ast.Name)}]
    assert len({c.name for c in classes}) == len(classes)
    assert not [c.name for c in classes if not ast.get_docstring(c)]


@pytest.mark.parametrize("room", ROOMS)
def test_public_functions_say_what_they_do(room):
    public = [n for n in TREES[room].body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
    patched = [n for n in public if isinstance(n, ast.FunctionDef) and "patch" in " ".join(map(ast.unparse, n.decorator_list))]
    short = [n.name for n in patched if n.end_lineno - n.lineno < 3]   # one line says it itself
    assert not [n.name for n in public if not ast.get_docstring(n) and n.name not in short]


def foreign(tree):
    "What a module imports of nbdev's family, but for `patch` of fastcore."
    whole = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    parts = [(n.module, a.name) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and not n.level for a in n.names]
    wanted = whole + [m for m, name in parts if not (m.startswith("fastcore") and name == "patch")]
    return [m for m in wanted if m.split(".")[0] in ("nbdev", "execnb", "ghapi", "fastcore")]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda p: p.stem)
def test_the_package_needs_patch_alone_of_fastcore_and_no_nbdev(path):
    assert not foreign(ast.parse(path.read_text(encoding="utf-8")))


def test_what_the_package_does_not_need_is_found():
    seen = ["import fastcore.basics", "from fastcore.basics import patch, store_attr", "from nbdev.showdoc import *", "import nbdev"]
    assert all(len(foreign(ast.parse(line))) == 1 for line in seen) and not foreign(ast.parse("from fastcore.basics import patch\nimport torch"))


@pytest.mark.parametrize("notebook", sorted((ROOT / "nbs").glob("[0-9]*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_reads_like_the_others(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells)
    head = "".join(cells[0]["source"])
    assert head.startswith("# ") and "\n> " in head and "minutes to read" in head and "colab" in head
    assert not [float(x) for x in re.findall(r"fontsize=([0-9.]+)", text) if float(x) < 7]
    assert re.search(r"^## Recap", text, re.M) and re.search(r"^## Open questions", text, re.M) or not "01" <= notebook.stem < "38"
    assert notebook.stat().st_size < 500_000


def test_links_between_notebooks_lead_somewhere_and_onward():
    notebooks = {p.stem: p.read_text(encoding="utf-8") for p in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))}
    for name, text in notebooks.items():
        found = re.findall(r"\]\((\w+)\.ipynb", text) + re.findall(r"`(\d\d[a-z]?_\w+)`", text)
        assert {*found} <= {*notebooks, "index"}, (name, {*found} - {*notebooks})
    course = [name for name in notebooks if name < "30"]
    for name, after in zip(course, course[1:]):
        assert re.search(rf"Next[^`\[\n]*[`\[]+{after}\b", notebooks[name]), f"{name} should name {after} as the next notebook"
