"""Markers, and one thread: the models of these tests are so small that more threads make them slower."""
import os

import pytest
import torch

os.environ.setdefault("ACCELERATE_USE_CPU", "true")   # the same results with or without a GPU; what is marked cuda says otherwise
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--vllm", metavar="VENV", help="run the tests marked vllm, with the engine that tests/vllm_cpu.sh has installed there")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs with --slow only")
    config.addinivalue_line("markers", "vllm: needs a real vLLM; runs with --vllm VENV only")
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU; skipped where there is none")


def pytest_collection_modifyitems(config, items):
    skips = {"cuda": (not torch.cuda.is_available(), "needs a CUDA GPU"), "slow": (not config.getoption("--slow"), "needs --slow"),
             "vllm": (not config.getoption("--vllm"), "needs --vllm VENV: make test-vllm")}
    for item in items:
        for name, (skip, reason) in skips.items():
            if skip and name in item.keywords: item.add_marker(pytest.mark.skip(reason=reason))
