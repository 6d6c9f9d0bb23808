"""Every table and figure that reports a result, made again from data/results."""
import json
import sys

import pytest

from threadweaver_ref import cli, results
from threadweaver_ref.results import Shown, make_results, results_notebooks, shown


def test_every_result_is_what_the_notebooks_show(tmp_path):
    seen = []
    assert make_results(tmp_path, on_shown=lambda made, changed: seen.append(made)) == []
    assert {s.name.rsplit("-", 1)[0] for s in seen} == set(results_notebooks()) >= {"index"}
    assert {p.name for p in tmp_path.iterdir()} == {s.file for s in seen}


@pytest.fixture
def notebooks(tmp_path):
    "A folder with one results notebook, whose last cell says what a file says."
    def cell(source, output, *tags):
        outputs = [{"output_type": "execute_result", "execution_count": 1, "metadata": {}, "data": {"text/plain": output}}] if output else []
        made = {"cell_type": "code", "id": str(len(source)), "execution_count": None, "metadata": {"tags": [*tags]}}
        return {**made, "source": source, "outputs": outputs}
    cells = [cell("number = int(open('number').read())", ""), cell("number", "7", "result"), cell("number + 1", "99"),
             cell("[number]", "[7]", "result")]
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "one.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    (tmp_path / "nbs" / "_draft.ipynb").write_text("no notebook")
    (tmp_path / "nbs" / "number").write_text("7")
    return tmp_path / "nbs"


def test_a_number_that_changed_in_the_data_is_found(notebooks, tmp_path):
    assert make_results(folder=notebooks) == []   # the cell without a tag, which shows 99, is nobody's business
    (notebooks / "number").write_text("8")
    old = make_results(tmp_path / "out", notebooks)
    assert [(s.name, s.content) for s in old] == [("one-1", "8"), ("one-2", "[8]")]
    assert (tmp_path / "out" / "one-1.md").read_text() == "8\n"


def test_a_result_that_is_new_or_gone_is_found(notebooks):
    path = notebooks / "one.ipynb"
    notebook = json.loads(path.read_text())
    saved, notebook["cells"][1]["outputs"] = notebook["cells"][1]["outputs"], []
    path.write_text(json.dumps(notebook))
    assert [s.name for s in make_results(folder=notebooks)] == ["one-1", "one-2"]   # new; and so the other is counted anew
    notebook["cells"][1]["outputs"], notebook["cells"][3]["source"] = saved, "None"
    path.write_text(json.dumps(notebook))
    assert make_results(folder=notebooks) == [Shown("one-2", "[7]")]


def test_a_cell_that_fails_is_named(notebooks):
    (notebooks / "number").write_text("seven")
    with pytest.raises(ValueError, match="one: a cell failed with ValueError: invalid literal"): make_results(folder=notebooks)


def test_the_command(notebooks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "notebooks_folder", lambda folder=None: notebooks)
    def call():
        monkeypatch.setattr(sys, "argv", ["threadweaver-ref", "results", "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as stop: cli.main()
        return stop.value.code or 0, *capsys.readouterr()
    code, out, err = call()
    assert code == 0 and out.count("as in the notebook") == 2 and not err
    (notebooks / "number").write_text("9")
    code, out, err = call()
    assert code == 2 and out.count("differs from the notebook") == 2 and "one-1, one-2: not what the notebooks show" in err


def test_outputs_of_every_kind():
    outputs = [{"output_type": "stream", "name": "stdout", "text": ["a\n", "b\n"]},
               {"output_type": "display_data", "data": {"image/png": "aGk=", "text/plain": "<Figure>"}},
               {"output_type": "execute_result", "data": {"text/markdown": ["| x |\n", "| y |"], "text/plain": "Markdown"}},
               {"output_type": "stream", "text": ""}]
    found = shown({"cells": [{"cell_type": "code", "metadata": {"tags": ["result"]}, "outputs": outputs}]}, "n")
    assert [(s.file, s.content) for s in found] == [("n-1.md", "a\nb"), ("n-2.png", b"hi"), ("n-3.md", "| x |\n| y |")]
