"""Reads `settings.ini`, as nbdev projects do. A wheel carries `data/` (but for results) inside the package; a clone is used as it lies."""
import shlex
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

cfg = ConfigParser(delimiters=["="])
cfg.read("settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]


class BuildWithData(build_py):
    "Copies the folders of `data/` that functions read to `threadweaver_ref/data`, where `data_dir` looks first."
    def run(self):
        if self.editable_mode: return super().run()   # `data/` lies beside the package
        package = Path(self.build_lib, cfg["lib_path"])
        shutil.rmtree(package, ignore_errors=True)    # files of an earlier build would stay in the wheel
        super().run()
        hidden = shutil.ignore_patterns(".*")
        for folder in sorted(p for p in Path("data").iterdir() if p.is_dir() and p.name != "results" and not p.name.startswith(".")):
            shutil.copytree(folder, package / "data" / folder.name, ignore=hidden)


setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"].split(),
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"], license="Apache-2.0",
    packages=find_packages(include=[cfg["lib_path"]]), python_requires=f">={cfg['min_python']}", cmdclass={"build_py": BuildWithData},
    install_requires=shlex.split(cfg["requirements"]), extras_require={extra: shlex.split(cfg[f"{extra}_requirements"]) for extra in ("dev", "gguf")},
    entry_points={"console_scripts": shlex.split(cfg["console_scripts"]), "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    long_description=open("README.md", encoding="utf-8").read(), long_description_content_type="text/markdown",
    classifiers=["Development Status :: 3 - Alpha", "Programming Language :: Python :: 3"],
)
