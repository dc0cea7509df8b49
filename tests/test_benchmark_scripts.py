"""The scripts in benchmarks/ run what they say. What they measure is not run here."""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def suite(tmp_path):
    """Runs gpu_suite.sh with a python3 and a compute-sanitizer that only note how they were called."""
    commands = tmp_path / "bin"
    commands.mkdir()
    log = tmp_path / "calls"
    for name in ("python3", "compute-sanitizer"):
        (commands / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {log}\n')
        (commands / name).chmod(0o755)

    def run(*steps):
        env = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
        done = subprocess.run(
            ["bash", "benchmarks/gpu_suite.sh", *steps], cwd=ROOT, env=env, capture_output=True, text=True
        )
        return done, log.read_text().splitlines() if log.exists() else []

    return run


def test_the_gpu_suite_without_arguments_compiles_tests_measures_and_checks_memory(suite):
    done, calls = suite()
    assert done.returncode == 0
    assert calls[0] == "python3 -"
    assert "pytest" in calls[1]
    assert "benchmarks/cuda_decode.py" in calls[2]
    assert [call.split()[0] for call in calls[3:]] == ["compute-sanitizer"] * 2


def test_the_gpu_suite_runs_the_steps_that_it_is_given(suite):
    _, calls = suite("bench")
    assert len(calls) == 1
    assert "benchmarks/cuda_decode.py" in calls[0]


def test_the_gpu_suite_refuses_an_unknown_step(suite):
    done, calls = suite("benhc")
    assert (done.returncode, calls) == (2, [])
    assert "got benhc" in done.stderr


def test_a_cuda_graph_gives_one_measurement(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import cuda_decode

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        synchronize = record

        def elapsed_time(self, end):
            return 3.0

    class Graph:
        def replay(self):
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert cuda_decode.in_graph([lambda: None], 3) == 1000.0
    sys.modules.pop("cuda_decode")


def test_what_the_gpu_suite_imports_is_there():
    text = (ROOT / "benchmarks" / "gpu_suite.sh").read_text()
    programs = re.findall(r"<<'PY'\n(.*?)\nPY\n", text, re.DOTALL)
    imports = [x for program in programs for x in ast.walk(ast.parse(program)) if isinstance(x, ast.ImportFrom)]
    wanted = [(x.module, name.name) for x in imports for name in x.names]
    assert ("cuda_cases", "unique_kernels") in wanted
    for module, name in wanted:
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")
