"""The decode table: attention of one new token beside MLX's own and mlx-lm's quantised caches."""

from __future__ import annotations

from typing import Any

from ...codec.presets import PRESETS
from .arrays import Skipped, device

CONTEXTS = {True: (4096, 16384, 65536), False: (512,)}
"""Tokens, on a GPU and on a CPU."""
HEADS = (32, 8, 128)
"""Query heads, KV heads, head_dim: those of Llama 3.1 8B."""


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """The step: a row a context."""
    where = device(asked["device"])
    if where.framework != "mlx":
        raise Skipped(f"{where.name}: `forgeattn bench decode` measures this device")
    from ..bench import metal

    copy = metal.copy_bandwidth()
    heads = (4, 2, 64) if asked["quick"] else HEADS
    rows = []
    for context in CONTEXTS[where.gpu][: 1 if asked["quick"] else None]:
        record = metal.measure(PRESETS["balanced"], 1, *heads, context, copy)
        rows.append(
            {
                "context": context,
                "ours_us": record["us"],
                "share_of_copy": record["share_of_copy"],
                **record["peers_us"],
                "ratio": record["ratio"],
                "error": record["rel_error"],
                "bytes": {"ours": record["packed_bytes"], **record["peers_bytes"]},
            }
        )
    wrong = [row for row in rows if not row["error"] < 0.01]
    worst = min(row["ratio"] for row in rows)
    said = f"copying memory at {copy:.0f} GB/s; the fastest peer takes {worst:.2f} times our time or more"
    status = "failed" if wrong else "passed"
    return {"status": status, "reason": "wrong results" if wrong else said, "copy_gb_s": copy, "rows": rows}
