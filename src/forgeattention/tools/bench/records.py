"""The form in which every `forgeattn bench decode` saves a measured shape."""

from __future__ import annotations

import statistics
from typing import Any

from ...codec import Codec


def record(
    device: str,
    shape: tuple[int, int, int, int, int],
    codec: Codec,
    size: int,
    limit_gb_s: float,
    times: dict[str, list[float]],
    rel_error: float,
) -> dict[str, Any]:
    """One measured shape.

    Args:
        device: where it ran.
        shape: batch, q_heads, kv_heads, head_dim, context.
        codec: of the packed cache.
        size: bytes of the packed cache.
        limit_gb_s: bandwidth that the machine reaches, for `share_of_copy`.
        times: seconds of every call, by name; "ours" is the packed cache, all others are peers.
        rel_error: of the result, against the reference.
    """
    us = {name: statistics.median(seconds) * 1e6 for name, seconds in times.items()}
    best = us.pop("ours")
    names = ("batch", "q_heads", "kv_heads", "head_dim", "context")
    return {
        "op": "decode_attention",
        "device": device,
        "shape": {**dict(zip(names, shape)), "q_len": 1},
        "k_bits": codec.spec.k_bits,
        "v_bits": codec.spec.v_bits,
        "us": best,
        "us_min": min(times["ours"]) * 1e6,
        "gb_s": size / best / 1e3,
        "share_of_copy": size / limit_gb_s / 1e3 / best,
        "peers_us": us,
        "peers_us_min": {name: min(seconds) * 1e6 for name, seconds in times.items() if name != "ours"},
        "ratio": min(us.values()) / best,
        "rel_error": rel_error,
        "packed_bytes": size,
        "effective_bits": codec.format.effective_bits,
    }
