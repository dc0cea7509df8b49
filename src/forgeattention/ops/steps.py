"""append_step, encode_rows: a decode step of one token per row that lives on the device.

Their launches are the same at every step, so that a CUDA graph can hold them: which rows pack a page, and where to,
the device decides by its own lengths.
"""

from __future__ import annotations

from typing import Any

from ..codec.codec import Codec
from ..codec.spec import PAGE
from .arrays import Array, dtype_of
from .checks import check_codec, check_floats, check_index, check_vectors, describe, fail
from .decorator import op
from .registry import launch


def _append_fake(
    to_k: Any, to_v: Any, exact: Any, packed: Any, page_table: Any, encode_offsets: Any, tickets: Any, k: Any, v: Any,
    *, sinks: int, encode_at: int,
) -> None:  # fmt: skip
    return None


@op(fake=_append_fake, mutates=("to_k", "to_v", "exact", "packed", "encode_offsets", "tickets"))
def append_step(
    to_k: Array,
    to_v: Array,
    exact: Array,
    packed: Array,
    page_table: Array,
    encode_offsets: Array,
    tickets: Array,
    k: Array,
    v: Array,
    *,
    sinks: int,
    encode_at: int,
    backend: str = "auto",
) -> None:
    """Append a token to the exact tokens of every row, in place.

    A row that holds capacity - 1 tokens first gives up the 64 behind its sinks, whose page was coded before: the later
    ones move down, and 64 more tokens count as packed. MLX's arrays do not stay in place.

    Args:
        to_k, to_v: [batch, kv_heads, capacity, head_dim].
        exact: int32 [batch], exact tokens of each row, at most capacity - 1.
        packed: int32 [batch], packed tokens of each row.
        page_table: int64 [batch, max_pages], addresses; that of a row's next page must be there by the time it is
            coded.
        encode_offsets: int64 [batch], for `encode_rows`: gets the address of the next page of each row that has come
            to `encode_at` exact tokens, and -1 for the others.
        tickets: int32 [batch], scratch of zeros.
        k, v: [batch, kv_heads, 1, head_dim] in the dtype of to_k.
        sinks: tokens that stay at a row's start.
        encode_at: exact tokens at which a row's oldest 64 behind the sinks are coded; from sinks + 64 to capacity - 1.
        backend: "auto" or a backend's name.

    Raises:
        ValueError: shapes or dtypes that do not fit together, a number out of range.
    """
    name = "append_step"
    check_floats(name, "to_k", to_k, 4)
    batch, heads, capacity, dim = to_k.shape
    if tuple(to_v.shape) != tuple(to_k.shape) or dtype_of(to_v) != dtype_of(to_k):
        raise fail(name, f"to_v {describe(to_k)} like to_k", describe(to_v))
    for what, x in (("k", k), ("v", v)):
        check_index(name, what, x, dtype_of(to_k), (batch, heads, 1, dim))
    for what, x in (("exact", exact), ("packed", packed), ("tickets", tickets)):
        check_index(name, what, x, "int32", (batch,))
    check_index(name, "page_table", page_table, "int64", (batch, "max_pages"))
    check_index(name, "encode_offsets", encode_offsets, "int64", (batch,))
    if sinks < 0 or not sinks + PAGE <= encode_at < capacity:
        raise fail(name, f"sinks >= 0 and encode_at in [sinks + {PAGE}, {capacity})", f"{sinks} and {encode_at}")
    run = launch(name, to_k, backend)
    run(to_k, to_v, exact, packed, page_table, encode_offsets, tickets, k, v, sinks, encode_at)


def _encode_fake(k: Any, v: Any, codec: Codec, out: Any, offsets: Any) -> None:
    return None


@op(fake=_encode_fake, mutates=("out",))
def encode_rows(k: Array, v: Array, codec: Codec, out: Array | None, offsets: Array, *, backend: str = "auto") -> None:
    """Code 64 tokens of some rows, each into a page of its own, in one launch.

    Args:
        k, v: [batch, kv_heads, 64, head_dim] of one dtype, any strides with a contiguous last axis.
        codec: the layer's codec.
        out: uint8 array that takes the pages, or None when `offsets` are absolute addresses, as for `encode`.
        offsets: int64 [batch], where each row's page goes; a row with a negative one is left out.
        backend: "auto" or a backend's name.

    Raises:
        ValueError: a wrong shape or dtype; on the CPU also values that `encode` refuses.
    """
    name = "encode_rows"
    check_codec(name, codec)
    check_vectors(name, "k", k, codec, 4, codec.kv_heads)
    check_vectors(name, "v", v, codec, 4, codec.kv_heads)
    if k.shape[2] != PAGE or tuple(v.shape) != tuple(k.shape) or dtype_of(v) != dtype_of(k):
        raise fail(name, f"k and v alike with {PAGE} tokens", f"{describe(k)} and {describe(v)}")
    check_index(name, "offsets", offsets, "int64", (k.shape[0],))
    launch(name, k, backend)(k, v, codec, offsets, out)
