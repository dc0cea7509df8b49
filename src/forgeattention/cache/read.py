"""All tokens of a cache as keys and values, for models that compute attention themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import ops

if TYPE_CHECKING:
    from .layer import LayerCache


def read_tokens(cache: LayerCache, k: Any, v: Any) -> int:
    """Writes the tokens of rows of one length in their order: sinks, decoded pages, recent tokens.

    Args:
        cache: one that neither evicts nor shards.
        k, v: contiguous [batch, kv_heads, n, head_dim] in the cache's dtype; the first tokens are written, as many as
            each row holds.

    Returns:
        How many tokens a row holds.

    Raises:
        ValueError: rows of different lengths, arrays that do not fit. Nothing is written then.
    """
    rows = cache.rows
    if not rows.uniform:
        raise ValueError(f"[cache.read] expected rows of one length; got {rows.seen.tolist()}")
    exact, packed, table = rows.most_exact, rows.most_packed, rows.table
    sinks = min(cache.codec.spec.sinks, exact)
    if table is not None:
        ops.decode_into(cache.codec, table, k, v, sinks, backend=cache.backend)
    for to, held in ((k, cache.buffer.k), (v, cache.buffer.v)):
        to[:, :, :sinks] = held[:, :, :sinks]
        to[:, :, sinks + packed : packed + exact] = held[:, :, sinks:exact]
    return packed + exact
