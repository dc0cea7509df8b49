"""`forgeattn bench decode`: attention of one new token over a packed context, on the device that the user names."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

DEVICES = ("cpu", "metal")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every context and batch of the command line; prints a table and returns the records, `env` first.

    Raises:
        ValueError: a device that has no measurement here, or that this machine lacks.
    """
    if args.device not in DEVICES:
        known = " or ".join(DEVICES)
        raise ValueError(f"[bench] expected --device {known} (benchmarks/ has CUDA's); got {args.device!r}")
    return importlib.import_module(f"{__package__}.{args.device}").decode(args)
