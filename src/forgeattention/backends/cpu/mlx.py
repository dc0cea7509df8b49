"""MLX arrays in host memory: the native CPU kernels on the arrays' own memory. Every op waits for its arguments."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ...codec.codec import Codec
from ...ops.arrays import dtype_of
from ...ops.table import ExactTokens, PageTable, Scores, Threshold
from ..mlx.merge import merge
from . import attention, pages, scores, sparse


class _Bits:
    """A bfloat16 array, which NumPy does not have, described to the CPU backend by its bit patterns."""

    dtype = "bfloat16"

    def __init__(self, x: Any) -> None:
        self._array = np.array(x.view(sys.modules["mlx.core"].uint16), copy=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._array, name)


def _host(x: Any) -> Any:
    """The array's memory, evaluated; nothing is copied, and what is written there is seen by MLX."""
    return _Bits(x) if dtype_of(x) == "bfloat16" else np.array(x, copy=False)


def _rows(x: Any) -> Any:
    """As `_host`, with a contiguous last axis, which MLX does not promise of a lazy array."""
    found = _host(x)
    if x.shape[-1] > 1 and found.strides[-1] != found.itemsize:
        found = _host(sys.modules["mlx.core"].contiguous(x))
    return found


def _table(table: PageTable) -> PageTable:
    base = None if table.base is None else _host(table.base)
    return PageTable(base, np.ascontiguousarray(_host(table.page_table)), _flat(table.lengths), table.max_length)


def _flat(x: Any) -> Any:
    return np.ascontiguousarray(_host(x))


def _mlx(x: Any, dtype: str) -> Any:
    mx = sys.modules["mlx.core"]
    return mx.array(x).astype(getattr(mx, dtype))


def encode(k: Any, v: Any, codec: Codec, out: Any | None, offsets: Any) -> None:
    pages.encode(_rows(k), _rows(v), codec, None if out is None else _host(out), _flat(offsets))


def compact(base: Any | None, offsets: Any, page_bytes: int) -> Any:
    return _mlx(pages.compact(None if base is None else _host(base), _flat(offsets), page_bytes), "uint8")


def decode_pages(codec: Codec, table: PageTable, dtype: str, rotated: bool) -> tuple[Any, Any]:
    made = "float16" if dtype == "float16" else "float32"
    k, v = pages.decode_pages(codec, _table(table), made, rotated)
    return _mlx(k, dtype), _mlx(v, dtype)


def decode_attention(
    q: Any,
    codec: Codec,
    table: PageTable | None,
    exact: ExactTokens | None,
    scale: float,
    causal: bool,
    sink_logits: Any | None,
) -> tuple[Any, Any]:
    if exact is not None:
        exact = ExactTokens(_rows(exact.k), _rows(exact.v), _flat(exact.lengths), exact.max_length)
    sinks = None if sink_logits is None else _flat(sink_logits)
    tokens = None if table is None else _table(table)
    out, lse = attention.decode_attention(_float(q), codec, tokens, exact, scale, causal, sinks)
    return _mlx(out, dtype_of(q)), _mlx(lse, "float32")


def _float(q: Any) -> Any:
    """Queries as the kernel reads them, so that its result has a dtype that NumPy knows."""
    return _rows(q.astype(sys.modules["mlx.core"].float32) if dtype_of(q) == "bfloat16" else q)


def prefill_attention(q: Any, codec: Codec, table: PageTable, scale: float) -> tuple[Any, Any]:
    out, lse = attention.prefill_attention(_float(q), codec, _table(table), scale)
    return _mlx(out, "float32"), _mlx(lse, "float32")


def qk_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    return _mlx(scores.qk_scores(_float(q), codec, _table(table), scale), "float32")


def value_sum(p: Any, codec: Codec, table: PageTable) -> Any:
    return _mlx(scores.value_sum(_flat(p), codec, _table(table)), "float32")


def sparse_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Scores:
    made = sparse.sparse_scores(_float(q), codec, _table(table), scale)
    return Scores(_mlx(made.scores, "float32"), _mlx(made.pages, "float32"))


def page_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    return _mlx(sparse.page_scores(_float(q), codec, _table(table), scale), "float32")


def sparse_threshold(scores: Scores, table: PageTable, top_k: Any, top_p: float | None, exact_lse: Any) -> Threshold:
    given = top_k if top_k is None or isinstance(top_k, int) else _flat(top_k)
    lse = None if exact_lse is None else _flat(exact_lse)
    made = sparse.sparse_threshold(_host_scores(scores), _table(table), given, top_p, lse)
    score, dropped, top = (_mlx(x, "float32") for x in (made.score, made.dropped, made.top))
    return Threshold(score, _mlx(made.last, "int32"), _mlx(made.kept, "int32"), dropped, top)


def sparse_attention(
    scores: Scores, threshold: Threshold, codec: Codec, table: PageTable, other: tuple[Any, Any] | None
) -> tuple[Any, Any]:
    names = ("score", "last", "kept", "dropped", "top")
    limits = Threshold(*(_flat(getattr(threshold, name)) for name in names))
    out, lse = (
        _mlx(x, "float32") for x in sparse.sparse_attention(_host_scores(scores), limits, codec, _table(table), None)
    )
    if other is None:
        return out, lse
    o, joined = merge(out, lse, *other)
    return o.astype(other[0].dtype), joined


def _host_scores(scores: Scores) -> Scores:
    return Scores(_flat(scores.scores), _flat(scores.pages))
