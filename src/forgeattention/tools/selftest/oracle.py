"""Every op on the device against the float64 oracle over the same bytes, and how long its first call takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import ops
from ...codec import PAGE, Codec
from ...codec.presets import PRESETS
from ...codec.spec import HEAD_DIMS, CodecSpec
from ...ops import ExactTokens, PageTable
from .arrays import Device, device

LIMITS = {"float32": 2e-3, "float16": 4e-3, "bfloat16": 2e-2}
"""Largest error over the largest magnitude of an op's result, by its dtype. GPUs may multiply float32 to 11 bits (TF32)
outside of the kernels, queries are 16-bit fixed point in some kernels, and a half-precision result is rounded once
more; a wrong result is wrong by about 1."""
ENCODE_LIMIT = 0.04
"""Excess of squared error over the oracle's encoder: a search may end in another branch, as good on average."""
LENGTHS = (2 * PAGE + 2, PAGE)
HEADS = 2


def cases(quick: bool) -> Iterator[tuple[str, CodecSpec, int, int]]:
    """(name, spec, head_dim, query heads of a KV head): every preset, code and head_dim at least once."""
    plain = {name: replace(spec, refine=False) for name, spec in PRESETS.items()}
    yield "balanced", PRESETS["balanced"], 128, 4
    if quick:
        return
    for name, spec in plain.items():
        yield f"{name}, not refined", spec, 64, 1
        yield f"{name}, not refined", spec, 128, 8
    for i, dim in enumerate(d for d in HEAD_DIMS if d not in (64, 128)):
        yield "balanced, not refined", plain["balanced"], dim, (2, 4, 5, 3)[i % 4]
    yield "2-bit scalar, 4-state trellis, log8 scales", _spec(2, "scalar", 3, "trellis4"), 64, 3
    yield "4-state trellis, 4-bit scalar, log8 scales", _spec(2, "trellis4", 4, "scalar"), 128, 2


def _spec(k_bits: int, k_code: Any, v_bits: int, v_code: Any) -> CodecSpec:
    return CodecSpec(k_bits=k_bits, k_code=k_code, v_bits=v_bits, v_code=v_code, scales="log8", refine=False)


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """The step: rows of the table, and whether all errors are within their limits."""
    where = device(asked["device"])
    rows: list[dict[str, Any]] = []
    for name, spec, dim, group in cases(asked["quick"]):
        for row in Checks(where, spec, dim, group).rows(where.dtypes[: 1 if asked["quick"] else None]):
            rows.append({"codec": name, "head_dim": dim, "group": group, **row})
    wrong = [row for row in rows if row.get("fault") or row["error"] > row["limit"]]
    said = sorted({row.get("fault") or f"{row['op']} is off by {row['error']:.1e}" for row in wrong})
    return {
        "status": "failed" if wrong else "passed",
        "reason": f"{len(wrong)} of {len(rows)} calls: {said[0]}" if wrong else f"{len(rows)} calls on {where.name}",
        "device": where.name,
        "backends": [f"{row['backend']}: {row['reason']}" for row in ops.report()],
        "rows": rows,
    }


class Checks:
    """The ops of one codec on one device.

    Args:
        where: the device.
        spec: how the pages are coded.
        dim: head_dim.
        group: query heads of a KV head.
    """

    def __init__(self, where: Device, spec: CodecSpec, dim: int, group: int) -> None:
        rng = np.random.default_rng(dim + group)
        self.where, self.codec, self.scale = where, Codec(spec, dim, HEADS), dim**-0.5
        self.pages = sum(-(-n // PAGE) for n in LENGTHS)
        shape = (HEADS, self.pages * PAGE, dim)
        k = rng.standard_normal(shape) + 2 * rng.standard_normal((HEADS, 1, dim))
        self.k, self.v = k.astype(np.float32), rng.standard_normal(shape).astype(np.float32)
        self.order = rng.permutation(self.pages).astype(np.int64) * self.codec.page_bytes
        self.q = rng.standard_normal((len(LENGTHS), HEADS * group, 4, dim)).astype(np.float32)
        self.exact = rng.standard_normal((2, len(LENGTHS), HEADS, 9, dim)).astype(np.float32)
        self.sinks = rng.standard_normal(HEADS * group).astype(np.float32)
        counts = [-(-n // PAGE) for n in LENGTHS]
        offsets = np.full((len(LENGTHS), max(counts) + 1), -1, np.int64)
        offsets[0, : counts[0]], offsets[1, : counts[1]] = np.split(self.order, counts[:1])
        self.page_table, self.lengths = offsets, np.array(LENGTHS, np.int32)

    def table(self, base: NDArray[np.uint8], where: Device | None) -> PageTable:
        put = (lambda x: x) if where is None else where.put
        return PageTable(put(base), put(self.page_table), put(self.lengths), max(LENGTHS))

    def rows(self, dtypes: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """Rows of `op`, `dtype`, `first_ms`, `again_ms`, `error`, `limit`, and `fault` where the op raised."""
        base = np.zeros(self.pages * self.codec.page_bytes, np.uint8)
        yield self.encode(base)
        if not base.any():  # the encoder failed: the oracle's pages serve the others
            ops.encode(self.k, self.v, self.codec, base, self.order, backend="reference")
        ours, theirs = self.table(base, self.where), self.table(base, None)
        codec, scale, put = self.codec, self.scale, self.where.put
        for dtype in dtypes:
            q, k, v = put(self.q, dtype), *(put(x, dtype) for x in self.exact)
            exact = ExactTokens(k, v, put(np.array([9, 6], np.int32)), 9)
            host_q, host_k, host_v = (self.where.host(x) for x in (q, k, v))
            known = ExactTokens(host_k, host_v, np.array([9, 6], np.int32), 9)

            for n, sinks in ((1, None), (4, self.sinks)):
                options: dict[str, Any] = {"causal": n > 1}
                given = None if sinks is None else put(sinks)
                yield self.check(
                    f"decode_attention, {n} token" + "s" * (n > 1),
                    dtype,
                    partial(
                        ops.decode_attention, q[:, :, :n], codec, ours, exact, scale, sink_logits=given, **options
                    ),
                    partial(
                        ops.decode_attention, host_q[:, :, :n], codec, theirs, known, scale, sink_logits=sinks,
                        backend="reference", **options,
                    ),
                )  # fmt: skip
            yield self.check(
                "prefill_attention",
                dtype,
                partial(ops.prefill_attention, q, codec, ours, scale),
                partial(ops.prefill_attention, host_q, codec, theirs, scale, backend="reference"),
            )
        yield from self.in_float32(ours, theirs)

    def in_float32(self, ours: PageTable, theirs: PageTable) -> Iterator[dict[str, Any]]:
        """The ops that give float32 whatever the queries are."""
        codec, scale, q = self.codec, self.scale, self.where.put(self.q)
        p = np.abs(self.q[..., :1]) * np.ones(max(LENGTHS), np.float32)
        pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "decode_pages": (
                lambda: ops.decode_pages(codec, ours),
                lambda: ops.decode_pages(codec, theirs, backend="reference"),
            ),
            "qk_scores": (
                lambda: ops.qk_scores(q, codec, ours, scale),
                lambda: ops.qk_scores(self.q, codec, theirs, scale, backend="reference"),
            ),
            "value_sum": (
                lambda: ops.value_sum(self.where.put(p), codec, ours),
                lambda: ops.value_sum(p, codec, theirs, backend="reference"),
            ),
            "sparse_threshold": (
                lambda: self.mass(self.kept(q, ours)[1]),
                lambda: self.mass(self.oracle_threshold(q, ours, theirs)),
            ),
            "sparse_attention": (
                lambda: self.sparse(q, ours),
                lambda: self.sparse_oracle(q, ours, theirs),
            ),
        }
        for name, (mine, oracle) in pairs.items():
            yield self.check(name, "float32", mine, oracle)

    def sparse(self, q: Any, table: PageTable) -> Any:
        scores, threshold = self.kept(q, table)
        return ops.sparse_attention(scores, threshold, self.codec, table)

    def sparse_oracle(self, q: Any, table: PageTable, known: PageTable) -> Any:
        """Of the device's own scores and threshold: a token at the border of the mass may fall to either side."""
        scores, threshold = (self.on_host(x) for x in self.kept(q, table))
        return ops.sparse_attention(scores, threshold, self.codec, known, backend="reference")

    def oracle_threshold(self, q: Any, table: PageTable, known: PageTable) -> Any:
        """Of the device's own scores."""
        scores = self.on_host(ops.sparse_scores(q, self.codec, table, self.scale))
        return ops.sparse_threshold(scores, known, top_p=0.9, backend="reference")

    def on_host(self, x: Any) -> Any:
        return type(x)(*(self.where.host(y) for y in vars(x).values()))

    @staticmethod
    def mass(threshold: Any) -> tuple[Any, Any]:
        return threshold.score, threshold.top

    def kept(self, q: Any, table: PageTable) -> tuple[Any, Any]:
        scores = ops.sparse_scores(q, self.codec, table, self.scale)
        return scores, ops.sparse_threshold(scores, table, top_p=0.9)

    def check(self, op: str, dtype: str, mine: Callable[[], Any], oracle: Callable[[], Any]) -> dict[str, Any]:
        row: dict[str, Any] = {"op": op, "dtype": dtype, "limit": LIMITS[dtype], "error": 0.0}
        try:
            found, row["first_ms"] = self._timed(mine)
            _, row["again_ms"] = self._timed(mine)
        except Exception as error:
            return {**row, "fault": _said(error)}
        wanted = oracle()
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        row["error"] = max(_relative(x, np.asarray(y)) for x, y in zip(found, wanted))
        return row

    def encode(self, base: NDArray[np.uint8]) -> dict[str, Any]:
        """Encodes the pages on the device; `base` takes their bytes. The error is the excess over the oracle's, and
        `differing` the share of bytes that differ."""
        codec, where = self.codec, self.where
        row: dict[str, Any] = {"op": "encode", "dtype": "float32", "limit": ENCODE_LIMIT, "error": 0.0}
        k, v, order = (where.put(x) for x in (self.k, self.v, self.order))
        out = where.put(base)

        def mine() -> Any:
            ops.encode(k, v, codec, out, order)
            return out

        try:
            (records,), row["first_ms"] = self._timed(mine)
            _, row["again_ms"] = self._timed(mine)
        except Exception as error:
            return {**row, "fault": _said(error)}
        base[:] = records
        wanted = np.zeros_like(base)
        ops.encode(self.k, self.v, codec, wanted, self.order, backend="reference")
        left = [self._squared_error(x) for x in (base, wanted)]
        return {**row, "error": max(0.0, left[0] / left[1] - 1), "differing": float((base != wanted).mean())}

    def _squared_error(self, base: NDArray[np.uint8]) -> float:
        whole = PageTable(base, self.order[None], np.array([self.pages * PAGE], np.int32), self.pages * PAGE)
        k, v = ops.decode_pages(self.codec, whole, backend="reference")
        return float(np.square(k[0] - self.k).sum() / np.square(self.k).sum() + np.square(v[0] - self.v).mean())

    def _timed(self, call: Callable[[], Any]) -> tuple[tuple[NDArray[Any], ...], float]:
        start = time.perf_counter()
        found = call()
        host = tuple(self.where.host(x) for x in (found if isinstance(found, tuple) else (found,)))
        return host, (time.perf_counter() - start) * 1e3


def _relative(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Largest error over the largest magnitude; infinite where finite and infinite elements do not agree."""
    finite = np.isfinite(wanted)
    if found.shape != wanted.shape or (found[~finite] != wanted[~finite]).any() or not np.isfinite(found[finite]).all():
        return 1e9
    found, wanted = found[finite], wanted[finite]
    return float(np.abs(found - wanted).max(initial=0) / max(np.abs(wanted).max(initial=0), 1e-30))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:4000]
