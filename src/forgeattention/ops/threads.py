"""How many threads the CPU kernels use."""

from __future__ import annotations

import os
import sys

_chosen: int | None = None


def set_num_threads(n: int | None) -> None:
    """Fix the number of threads of the CPU kernels; None follows torch again. Results do not depend on it."""
    global _chosen
    if n is not None and n < 1:
        raise ValueError(f"[set_num_threads] expected n >= 1 or None; got {n}")
    _chosen = n


def get_num_threads() -> int:
    """The number fixed by `set_num_threads`, else torch's if torch is loaded, else the number of processors."""
    if _chosen is not None:
        return _chosen
    torch = sys.modules.get("torch")
    get = getattr(torch, "get_num_threads", None)
    return get() if get is not None else os.cpu_count() or 1
