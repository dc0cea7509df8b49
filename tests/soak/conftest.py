"""Long tests, which `make soak` runs and pytest's usual run leaves out. What they did is counted in build/soak."""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import forgeattention  # noqa: E402
from forgeattention.util.files import write_json  # noqa: E402

NUMBERS = {
    "cases": (10_000, "random cases of each op, and a hundredth as many histories of each kind of cache"),
    "files": (10_000, "damaged files of each kind that is read"),
    "kills": (200, "processes killed while they save"),
    "minutes": (60, "minutes of decoding, and of serving"),
}
COUNTS: dict[str, Counter[str]] = {}
BEGAN = time.strftime("%Y-%m-%d-%H%M%S", time.gmtime())


def pytest_addoption(parser: pytest.Parser) -> None:
    for name, (default, what) in NUMBERS.items():
        parser.addoption(f"--{name}", type=int, default=default, help=f"{what} (default {default})")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(0))


@pytest.fixture
def number(request: pytest.FixtureRequest) -> Callable[[str], int]:
    """A number of the command line, by its name."""
    return lambda name: request.config.getoption(f"--{name}")


@pytest.fixture
def counts(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """What a test counts, for the log."""
    made = COUNTS[request.node.name] = Counter()
    began = time.monotonic()
    yield made
    made["seconds"] = round(time.monotonic() - began)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.outcome != "passed":
        COUNTS.setdefault(report.nodeid.rpartition("::")[2], Counter())[report.outcome] += 1


def pytest_runtest_teardown(item: pytest.Item) -> None:
    _write(item.config)


def pytest_sessionstart(session: pytest.Session) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an ended run logs what it did


def pytest_sessionfinish(session: pytest.Session) -> None:
    _write(session.config)


def _write(config: pytest.Config) -> None:
    """The log of this run, so that parts may be run one after the other."""
    if not COUNTS:
        return
    folder = Path(config.rootpath) / "build" / "soak"
    folder.mkdir(parents=True, exist_ok=True)
    log: dict[str, Any] = {
        "versions": {
            "forgeattention": forgeattention.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "options": {name: config.getoption(f"--{name}") for name in NUMBERS},
        "tests": {name: dict(found) for name, found in sorted(COUNTS.items())},
    }
    write_json(folder / f"{BEGAN}-{os.getpid()}.json", log)
