"""What a cache says of itself, in one shape for every engine.

A layer's entry holds `layer` (its number), `kind` ("packed", "decoded" for a packed layer that is read by decoding, or
the class of a stock cache), `positions` (tokens that
it has come to), `bits` (effective bits per packed element, None where nothing is packed), `bytes` (allocated),
`unpacked_bytes` (what its keys and values would take as they came) and, where pages are evicted, `eviction`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..codec import Codec
from .layer import LayerCache

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def packed_entry(
    layer: int,
    cache: LayerCache | None,
    codec: Codec | None,
    positions: int,
    shape: tuple[int, int, int] | None = None,
    kind: str = "packed",
) -> dict[str, Any]:
    """The entry of a packed layer.

    Args:
        layer: its number in the model.
        cache: its cache, or None before its first token.
        codec: its codec where that is known, or None.
        positions: tokens that it has come to, padding included as the engine counts it.
        shape: the model's kv_heads and channels of a head of keys and of values, where records hold more; the bits are
            per element of the model.
        kind: "packed" or "decoded".
    """
    codec = codec if cache is None else cache.codec
    wide = 1.0
    if codec is not None and shape is not None:
        wide = 2 * codec.kv_heads * codec.head_dim / (shape[0] * (shape[1] + shape[2]))
    entry = {
        "layer": layer,
        "kind": kind,
        "positions": positions,
        "bits": None if codec is None else codec.format.effective_bits * wide,
        "bytes": 0 if cache is None else cache.nbytes,
        "unpacked_bytes": 0 if cache is None else int(unpacked_bytes(cache) / wide),
    }
    if cache is not None and cache.eviction is not None:
        entry["eviction"] = cache.eviction.report(cache)
    return entry


def stock_entry(layer: int, kind: str, positions: int | None, nbytes: int) -> dict[str, Any]:
    """The entry of a layer with a cache of the engine's own."""
    return {
        "layer": layer, "kind": kind, "positions": positions, "bits": None, "bytes": nbytes, "unpacked_bytes": nbytes
    }  # fmt: skip


def totals(entries: Sequence[dict[str, Any]], of: int) -> dict[str, Any]:
    """The report of a whole cache: `layers`, `packed` (how many, and `decoded` those that are read
    by decoding), `of` (layers of the model), `bytes`,
    `unpacked_bytes`, and the sums of `eviction` where a layer has it."""
    out: dict[str, Any] = {
        "layers": list(entries),
        "packed": sum(entry["kind"] == "packed" for entry in entries),
        "decoded": sum(entry["kind"] == "decoded" for entry in entries),
        "of": of,
        "bytes": sum(entry["bytes"] for entry in entries),
        "unpacked_bytes": sum(entry["unpacked_bytes"] for entry in entries),
    }
    evicted = [entry["eviction"] for entry in entries if "eviction" in entry]
    if evicted:
        out["eviction"] = {name: sum(each[name] for each in evicted) for name in evicted[0]}
    return out


def unpacked_bytes(cache: LayerCache) -> int:
    """Bytes that the keys and values of all tokens so far would take in the cache's dtype."""
    codec = cache.codec
    return int(cache.rows.seen.sum()) * 2 * codec.kv_heads * codec.head_dim * ITEM_BYTES[cache.dtype]
