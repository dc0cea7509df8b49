"""The scripts in benchmarks/ run what they say. What they measure is not run here."""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
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


class Suite:
    """vllm_suite.py with programs in place of vLLM's that leave a record, or fail."""

    def __init__(self, monkeypatch, folder):
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        self.module, self.folder, self.calls = importlib.import_module("vllm_suite"), folder, []
        self.failing = set()
        monkeypatch.setattr(subprocess, "run", self.called)
        monkeypatch.setattr(self.module.shutil, "which", lambda name: f"/bin/{name}")
        self.monkeypatch = monkeypatch

    def called(self, line, stdout, stderr, timeout, env, check):
        file = Path(line[line.index("--json") + 1])
        self.calls.append((file.stem, line, timeout))
        failed = file.stem in self.failing
        if not failed:
            case = {"op": "vllm", "case": file.stem, "said": ["long"]}
            file.write_text(json.dumps([{"op": "env", "machine": "here"}, case]))
        return subprocess.CompletedProcess(line, int(failed))

    def __call__(self, *arguments):
        self.calls.clear()
        line = ["vllm_suite.py", "--out", str(self.folder), "--model", "/models/m", *arguments]
        self.monkeypatch.setattr(sys, "argv", line)
        self.module.main()


def test_the_vllm_suite_goes_on_where_it_ended(monkeypatch, tmp_path, capsys):
    suite = Suite(monkeypatch, tmp_path)
    suite.failing = {"texts-eager", "counts"}
    with pytest.raises(SystemExit, match="not finished: texts-eager, counts"):
        suite()
    ran = [name for name, _, _ in suite.calls]
    assert ran[:3] == ["speed-packed-balanced", "speed-own", "texts"]
    assert "graphs-on-off" not in ran  # it compares with the answers that failed
    assert "texts-2-gpus" not in ran
    assert "texts-eager has not run" in capsys.readouterr().out
    records = json.loads((tmp_path / "vllm.json").read_text())
    assert [record["op"] for record in records].count("env") == 1
    assert not any("said" in record for record in records)
    suite.failing = set()
    suite("--gpus", "2")
    assert {"texts-eager", "counts", "graphs-on-off", "texts-2-gpus", "one-or-two-gpus"} == {x[0] for x in suite.calls}
    compared = next(line for name, line, _ in suite.calls if name == "graphs-on-off")
    at = compared.index("compare")
    assert compared[at + 1 : at + 3] == [str(tmp_path / "texts-eager.json"), str(tmp_path / "texts.json")]
    suite("--gpus", "2")
    assert suite.calls == []


def test_the_vllm_suite_leaves_out_what_there_is_no_time_for(monkeypatch, tmp_path):
    suite = Suite(monkeypatch, tmp_path)
    with pytest.raises(SystemExit):
        suite("--minutes", "0.4", "--only", "speed-own", "texts")
    assert suite.calls == []


def test_every_step_of_the_vllm_suite_is_understood(monkeypatch, tmp_path):
    """The scripts' own parsers read each command line, on a GPU and as a trial."""
    suite = Suite(monkeypatch, tmp_path)
    for device in ("cuda", "cpu"):
        for step in suite.module.steps():
            args = suite.module.argparse.Namespace(
                out=tmp_path, device=device, python="python3", model="/models/m", shape="", gpus=1
            )
            line = suite.module.command(step, args)
            script = importlib.import_module(step.script.removesuffix(".py"))
            begin = next(i for i, part in enumerate(line) if part.endswith(step.script))
            parsed = script.parser().parse_args(line[begin + 1 :])
            assert parsed.device == device
            assert parsed.json == tmp_path / f"{step.name}.json"
    names = [step.name for step in suite.module.steps()]
    assert len(set(names)) == len(names)
    assert all(names.index(need) < i for i, step in enumerate(suite.module.steps()) for need in step.needs)
