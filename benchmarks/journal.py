"""A file of finished work, one line of JSON each, so that a measurement that was cut off goes on where it was."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Journal:
    """Results by name.

    Args:
        file: where they are kept; None keeps them in memory alone. A last line that is cut off is left out.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.known: dict[str, Any] = {}
        for line in file.read_text().splitlines() if file is not None and file.is_file() else ():
            try:
                name, result = json.loads(line)
            except ValueError:
                continue
            self.known[name] = result

    def get(self, name: str) -> Any:
        """The result of this name, or None."""
        return self.known.get(name)

    def add(self, name: str, result: Any) -> Any:
        """Keeps a result, at once in the file too, and gives it back."""
        self.known[name] = result
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            cut = self.file.is_file() and not self.file.read_bytes().endswith(b"\n")
            with self.file.open("a") as file:
                file.write("\n" if cut and self.file.stat().st_size else "")
                file.write(json.dumps([name, result]) + "\n")
        return result


def run_step(
    journal: Journal,
    name: str,
    command: Sequence[str],
    log: Path,
    limit: float,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Runs a step as a process of its own, tells how it ended, and notes it in the journal if it succeeded.

    Args:
        journal: of the suite.
        name: of the step.
        command: its command line.
        log: file that what it prints is added to.
        limit: seconds after which it is ended.
        environment: of the process; None for this one's.
    """
    begun = time.time()
    with log.open("a") as out:
        try:
            done = subprocess.run(command, stdout=out, stderr=out, timeout=limit, env=environment, check=False)
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = 124
    took = time.time() - begun
    print(f"{name}: {'done' if code == 0 else f'exit code {code}, see {log}'}, {took:.0f} s", flush=True)
    if code == 0:
        journal.add(name, {"seconds": took})
