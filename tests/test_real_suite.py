"""The suite of the real models: every step's command is one that its script takes."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import real_suite


class Reached(Exception):
    """The script has read its options and goes on to the model."""


def given(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    values = {"models": tmp_path, "model": None, "device": "cpu", "out": tmp_path / "out", "only": None, "quick": False}
    return argparse.Namespace(**{**values, "wheel": None, **changes})


@pytest.mark.parametrize("quick", [False, True])
def test_every_step_is_one_that_its_script_takes(quick: bool, tmp_path: Path, monkeypatch: Any) -> None:
    args, seen = given(tmp_path, quick=quick), []

    def reached(*a: Any, **k: Any) -> Any:
        raise Reached

    monkeypatch.setattr("forgeattention.models.load", reached)
    for step in real_suite.chosen(args):
        script = importlib.import_module(step.script.removesuffix(".py"))
        if step.script == "long_tasks.py":
            monkeypatch.setattr(script, "questions", reached)
        monkeypatch.setattr(sys, "argv", real_suite.command(step, args)[1:])
        with pytest.raises(Reached):
            script.main()
        seen.append(step.script)
    assert set(seen) == set(real_suite.QUICK)


def test_the_caches_that_are_asked_for_are_there(tmp_path: Path) -> None:
    import candidates
    from hf_slow import model

    names = [c.name for c in candidates.candidates(model(), "field")]
    assert set(real_suite.TASK_CACHES) <= set(names)


def test_a_step_is_run_once_and_what_fails_again(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    codes, run = iter([1, 0, 0]), []

    def called(command: list[str], **options: Any) -> Any:
        run.append(command)
        return argparse.Namespace(returncode=next(codes))

    monkeypatch.setattr(subprocess, "run", called)
    options = ["real_suite.py", "--models", str(tmp_path), "--out", str(tmp_path / "out"), "--only", "ruler", "--quick"]
    monkeypatch.setattr(sys, "argv", options)
    for _ in range(3):
        real_suite.main()
    assert len(run) == 2
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2].partition(",")[0] for line in said] == ["exit code 1", "done"]
