"""Reads `settings.ini`, as nbdev projects do."""
import shlex
from configparser import ConfigParser

from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=["="])
cfg.read("settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"].split(),
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"], license="Apache-2.0",
    packages=find_packages(include=[cfg["lib_path"]]), python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg["requirements"]), extras_require={"dev": shlex.split(cfg["dev_requirements"])},
    entry_points={"console_scripts": shlex.split(cfg["console_scripts"]), "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    long_description=open("README.md", encoding="utf-8").read(), long_description_content_type="text/markdown",
    classifiers=["Development Status :: 3 - Alpha", "Programming Language :: Python :: 3"],
)
