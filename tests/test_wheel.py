"""The wheel outside the clone: what it carries, and that it answers without the repository. Slow: a build, and three fresh Pythons."""
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import DATA

from threadweaver_ref.domains import allowed

pytestmark = pytest.mark.slow
ROOT = DATA.parent
ASIDE = shutil.ignore_patterns(".*", "build", "dist", "runs", "mutants", "demo", "*.egg-info", "__pycache__", "nbs", "tests")


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from a copy, so that the clone stays clean; what an earlier build left behind does not get in."
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "clone", ignore=ASIDE)
    stale = folder / "clone" / "build" / "lib" / "threadweaver_ref" / "data" / "policies" / "stale" / "config.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    run(sys.executable, "-m", "pip", "wheel", "-q", ".", "--no-deps", "--no-build-isolation", "-w", folder, cwd=folder / "clone")
    shutil.rmtree(folder / "clone")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    "Runs Python in an empty folder, where the package can only come from the installed wheel."
    target, empty = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("empty")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel)
    names = ("PATH", "HOME", "OMP_NUM_THREADS", "LANG", "TMPDIR")
    env = {k: os.environ[k] for k in names if k in os.environ} | {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    def ask(*arguments, check=True):
        done = subprocess.run([sys.executable, *arguments], cwd=empty, env=env, capture_output=True, text=True)
        assert not check or not done.returncode, done.stderr[-3000:]
        return done.stdout if check else done.stderr
    ask.target = target
    return ask


def test_what_the_wheel_carries(wheel):
    with zipfile.ZipFile(wheel) as archive: names = archive.namelist()
    shipped = {f.relative_to(ROOT).as_posix() for f in DATA.rglob("*") if f.is_file() and f.relative_to(DATA).parts[0] != "results"}
    inside = {n.removeprefix("threadweaver_ref/") for n in names if n.startswith("threadweaver_ref/data/")}
    assert inside == {s for s in shipped if "/." not in s} and "data/policies/schoolbook-sft/model.safetensors" in inside
    modules = {p.name for p in (ROOT / "threadweaver_ref").glob("*.py")}
    assert {n.removeprefix("threadweaver_ref/") for n in names if n.endswith(".py")} == modules
    assert wheel.stat().st_size < 15e6


def test_the_wheel_requires_what_settings_say(wheel):
    with zipfile.ZipFile(wheel) as archive: meta = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
    required = {re.match(r"[\w-]+", line)[0].lower() for line in re.findall(r"^Requires-Dist: (.*)$", meta, re.MULTILINE) if "extra ==" not in line}
    assert {"torch", "transformers", "fastcore", "pyyaml", "safetensors", "peft"} <= required and not {"nbdev", "pytest", "setuptools"} & required


def test_it_answers_outside_the_clone(python):
    said = python("-m", "threadweaver_ref.cli", "solve", "12*3+4*5?")
    assert re.search(r"^answer: 56\b", said, re.MULTILINE), said


def test_it_loads_a_shipped_policy_by_name(python):
    code = """
import json, threadweaver_ref
from threadweaver_ref.model import load_policy, shipped_policies
model, tokenizer = load_policy("schoolbook-sft", device="cpu")
print(json.dumps([threadweaver_ref.__file__, {k: str(v) for k, v in shipped_policies().items()}, len(tokenizer), model.num_parameters()]))
"""
    file, policies, words, parameters = json.loads(python("-c", code))
    assert Path(file).is_relative_to(python.target) and words == 151 and parameters == 1_299_328
    assert set(policies) == {p.name for p in (DATA / "policies").iterdir()}
    assert all(Path(p).is_relative_to(python.target) for p in policies.values())


def test_it_knows_the_recipes(python):
    said = python("-m", "threadweaver_ref.cli", "train", "nope", check=False)
    names = [p.stem for p in sorted((DATA / "recipes").glob("*.yaml"))]
    assert f"unknown recipe 'nope': choose one of {allowed(names)}, or a .yaml file" in said, said
