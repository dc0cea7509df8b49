"""How many queries share one read of the packed tokens: what fits in a thread's registers, or what was measured on this
machine to be fastest (`forgeattn bench decode --device metal --tune`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from ...util.files import write_json
from ...util.folders import cache_folder

CHOICES = (1, 2, 4, 8)
"""Most rows of a block that `--tune` tries. A row is a query of one of the query heads of a KV head."""
# A thread of an M1 or M2 has 128 registers. Sums and queries of 4 rows take 88 to 112 of them up to head_dim 256; at
# head_dim 512 those of 2 rows take 124. More are right too, but spill.
DEFAULT, WIDE = 4, 2

_override: list[int] = []


def plan_file() -> Path:
    """Where measured choices are kept, by the GPU's name and padded head_dim."""
    return cache_folder("metal") / "plans.json"


def most_rows(padded_dim: int) -> int:
    """Most rows of a block for a padded head_dim."""
    if _override:
        return _override[-1]
    return measured().get(padded_dim) or (WIDE if padded_dim == 512 else DEFAULT)


@contextmanager
def override(rows: int) -> Iterator[None]:
    """Within it, `rows` is what `most_rows` gives: for measuring."""
    _override.append(rows)
    try:
        yield
    finally:
        _override.pop()


def gpu_name() -> str | None:
    """The name of this machine's Metal GPU; None without one."""
    import mlx.core as mx

    return mx.device_info(mx.gpu)["device_name"] if mx.metal.is_available() else None


@cache
def measured() -> dict[int, int]:
    """What was kept for this machine's GPU, by padded head_dim. A file that cannot be read counts as none."""
    try:
        name = gpu_name()
    except ImportError:
        return {}
    kept = _read().get(name, {}) if name is not None else {}
    return {int(dim): rows for dim, rows in kept.items() if dim.isdecimal() and rows in CHOICES}


def keep(name: str, rows: Mapping[int, int]) -> Path:
    """Adds choices, by padded head_dim, for the GPU of that name to the user's file, and gives the file."""
    plans = _read()
    plans[name] = {**plans.get(name, {}), **{str(dim): most for dim, most in rows.items()}}
    path = plan_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, plans)
    measured.cache_clear()
    return path


def _read() -> dict[str, dict[str, int]]:
    try:
        plans = json.loads(plan_file().read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return plans if isinstance(plans, dict) and all(isinstance(x, dict) for x in plans.values()) else {}
