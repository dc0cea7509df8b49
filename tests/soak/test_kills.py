"""Processes killed in the middle of saving: the file is the old one or the new one, never a part."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_files import KINDS, Kind

WRITTEN = ("saved cache", "budgets", "centres", "calibration")


@pytest.mark.parametrize("name", WRITTEN)
def test_killed_while_saving(name: str, tmp_path: Path, number: Callable[[str], int], counts: Counter[str]) -> None:
    kind: Kind = KINDS[name]()
    path = tmp_path / "file"
    kind.make(path)
    began = time.monotonic()
    kind.make(path)
    longest = 3 * (time.monotonic() - began)
    want = kind.read(path)
    rng = np.random.default_rng(0)
    for _ in range(number("kills") // len(WRITTEN)):
        child = os.fork()
        if child == 0:
            while True:
                kind.make(path)
        time.sleep(float(rng.uniform(0, longest)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert kind.read(path) == want
        counts["kills"] += 1
        unfinished = [x for x in tmp_path.iterdir() if x != path]
        counts["in the middle of a file"] += bool(unfinished)
        for left in unfinished:
            assert left.name.startswith(".file-")
            assert left.name.endswith(".part")
            left.unlink()


def test_a_first_save_that_is_killed_leaves_no_file_by_that_name(
    tmp_path: Path, number: Callable[[str], int], counts: Counter[str]
) -> None:
    kind: Kind = KINDS["saved cache"]()
    kind.make(tmp_path / "first")
    began = time.monotonic()
    kind.make(tmp_path / "first")
    longest = time.monotonic() - began
    rng = np.random.default_rng(0)
    for i in range(number("kills") // 4):
        path = tmp_path / f"file{i}"
        child = os.fork()
        if child == 0:
            kind.make(path)
            os._exit(0)
        time.sleep(float(rng.uniform(0, longest)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if path.exists():
            kind.read(path)
            counts["whole"] += 1
        else:
            counts["none"] += 1
