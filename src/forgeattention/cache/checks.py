"""Whether the arrays of a saved layer fit its codec and each other: a file may have been made to look right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..codec import PAGE, Codec
from ..ops.arrays import FLOATS

HOST_DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}


def check_parts(parts: Mapping[str, Any], codec: Codec, dtype: Any) -> None:
    """Checks what `storage` keeps of a layer.

    Args:
        parts: the layer's arrays by name; None for one that the file lacks.
        codec: the layer's.
        dtype: name of the exact tokens' dtype.

    Raises:
        ValueError: an array of another shape or dtype, or numbers that no cache holds.
    """
    if dtype not in FLOATS:
        raise ValueError(f"[cache.load] expected a dtype of {FLOATS}; got {dtype!r}")
    spec, ints = codec.spec, np.dtype(np.int64)
    lengths = parts["lengths"]
    if lengths is None or lengths.dtype != ints or lengths.ndim != 2 or len(lengths) != 3:
        raise _wrong("lengths", "int64 [3, batch]", lengths)
    exact, packed, seen = lengths
    batch, most = lengths.shape[1], int(exact.max(initial=0))
    capacity = spec.sinks + spec.window + PAGE
    good = (exact >= 0) & (exact < capacity) & (packed >= 0) & (packed % PAGE == 0) & (seen >= exact + packed)
    good &= (exact >= np.minimum(seen, spec.sinks)) & (exact <= seen)
    if not good.all():
        raise ValueError(f"[cache.load] expected lengths of rows that a cache can hold; got {lengths.tolist()}")
    counts = packed // PAGE
    width = int(counts.max(initial=0))
    pages, table, starts = (parts[name] for name in ("pages", "table", "starts"))
    if pages is None or pages.dtype != np.uint8 or pages.ndim != 2 or pages.shape[1] != codec.page_bytes:
        raise _wrong("pages", f"uint8 [pages, {codec.page_bytes}]", pages)
    for name, array in (("table", table), ("starts", starts)):
        if array is None or array.dtype != ints or array.shape != (batch, width):
            raise _wrong(name, f"int64 [{batch}, {width}]", array)
    used = np.arange(width) < counts[:, None]
    if not ((table[used] >= 0) & (table[used] < len(pages))).all() or (table[~used] != -1).any():
        raise ValueError(f"[cache.load] expected a table of {len(pages)} pages; got others")
    # Pages lie behind the sinks, one after the other, before the recent tokens.
    steps = np.diff(starts, axis=1)[used[:, 1:]] if width else np.zeros(0)
    last = np.where(used, starts + PAGE, 0).max(1, initial=0)
    first = starts[used]
    if (first < spec.sinks).any() or (steps < PAGE).any() or (last > seen - np.maximum(exact - spec.sinks, 0)).any():
        raise ValueError("[cache.load] expected positions of pages in order; got others")
    want = (batch, codec.kv_heads, most, codec.head_dim)
    for name in ("k", "v"):
        if parts[name] is None or parts[name].dtype != np.dtype(HOST_DTYPES[dtype]) or parts[name].shape != want:
            raise _wrong(name, f"{HOST_DTYPES[dtype]} {list(want)}", parts[name])


def _wrong(name: str, want: str, got: Any) -> ValueError:
    have = "nothing" if got is None else f"{got.dtype} {list(got.shape)}"
    return ValueError(f"[cache.load] expected {name} {want}; got {have}")
