"""Every kind of launch that the host code makes, recorded from the launchers themselves and run by nobody: the arrays
have the right shapes and hold zeros."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from forgeattention.backends.metal import attention, pages, scores, sparse
from forgeattention.backends.metal.launch import Launch
from forgeattention.codec.codec import Codec
from forgeattention.codec.spec import HEAD_DIMS, PAGE, SCALE_RULES, CodecSpec
from forgeattention.ops.sparse import Scores, Threshold
from forgeattention.ops.table import ExactTokens, PageTable

from .msl import BFloat16

SIDES = [
    (2, "scalar"),
    (3, "scalar"),
    (4, "scalar"),
    (2, "trellis4"),
    (3, "trellis4"),
    (2, "trellis8"),
    (3, "trellis8"),
]
"""Bits and code of keys or values."""
DTYPES = ("float32", "float16", "bfloat16")
# (query heads of a KV head, queries): blocks of 1 to 4 rows, of one to three of them.
ROWS = [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (3, 2), (8, 3)]
# (batch, KV heads, pages): inputs of fewer than 8 elements, which MLX passes in constant memory, and of more.
SIZES = [(1, 1, 1), (1, 2, 3), (9, 1, 2), (2, 4, 9)]


class Recorder:
    """A device that keeps launches and gives zeros."""

    xp = np

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def run(self, launch: Launch) -> list[Any]:
        self.launches.append(launch)
        return [np.zeros(s, np.uint16 if d == "bfloat16" else d) for s, d in launch.outputs.values()]

    def taken(self) -> list[Launch]:
        """The launches since the last call, with the dtypes that arrays have in MLX, which has no 64-bit floats."""
        found, self.launches = self.launches, []
        return [replace(x, inputs={k: _as_mlx(a) for k, a in x.inputs.items()}) for x in found]


def _as_mlx(x: Any) -> Any:
    return x.astype(np.float32) if x.dtype == np.float64 else x


# Inputs that launchers pad to the size from which on MLX passes them in device memory. The kernels take both forms.
PADDED = (
    *(
        "bias",
        "page_table",
        "lengths",
        "exact_lengths",
        "sinks",
        "packed_ml",
        "top_k",
        "exact_lse",
        "threshold",
        "last",
    ),
    "top",
)


def small(launch: Launch) -> Launch:
    """The same launch with those inputs in constant memory."""
    few = {k: x.reshape(-1)[:4] for k, x in launch.inputs.items() if k in PADDED}
    return replace(launch, inputs={**launch.inputs, **few})


def codec(k: tuple[int, str], v: tuple[int, str], scales: str, head_dim: int, heads: int, **spec: Any) -> Codec:
    gram = spec.pop("gram", None)
    fields = {"k_bits": k[0], "k_code": k[1], "v_bits": v[0], "v_code": v[1], "scales": scales, "refine": False}
    return Codec(CodecSpec(**{**fields, **spec}), head_dim, heads, query_gram=gram)


def table(c: Codec, batch: int, count: int) -> PageTable:
    offsets, lengths = np.zeros((batch, count), np.int64), np.full(batch, count * PAGE, np.int32)
    return PageTable(np.zeros(c.page_bytes * count, np.uint8), offsets, lengths, count * PAGE)


def exact(c: Codec, batch: int, capacity: int, dtype: str) -> ExactTokens:
    x = np.zeros((batch, c.kv_heads, capacity, c.head_dim), np.uint16 if dtype == "bfloat16" else dtype)
    tokens: Any = BFloat16(x) if dtype == "bfloat16" else x
    return ExactTokens(tokens, tokens, np.full(batch, capacity, np.int32), capacity)


def attend(device: Recorder, c: Codec, size: tuple[int, int], rows: tuple[int, int], dtype: str, causal: bool) -> None:
    """`decode_attention`; `size` is (batch, pages)."""
    batch, _ = size
    q = np.zeros((batch, c.kv_heads * rows[0], rows[1], c.head_dim), np.float32)
    sinks = np.zeros(q.shape[1], np.float32) if causal else None
    attention.decode_attention(q, c, table(c, *size), exact(c, batch, 40, dtype), 0.1, causal, sinks, device)


def others(device: Recorder, c: Codec, size: tuple[int, int], rows: tuple[int, int], dtype: str, flag: bool) -> None:
    """Every other op but `encode`, once."""
    t = table(c, *size)
    q = np.zeros((size[0], c.kv_heads * rows[0], rows[1], c.head_dim), np.float32)
    attention.prefill_attention(q, c, t, 0.1, device)
    scores.qk_scores(q, c, t, 0.1, device)
    scores.value_sum(np.zeros((*q.shape[:3], t.max_length), np.float32), c, t, flag, device)
    pages.decode_pages(c, t, dtype, True, device)
    pages.decode_pages(c, t, "float32", False, device)
    found = sparse.sparse_scores(q, c, t, 0.1, device)
    assert isinstance(found, Scores)
    sparse.sparse_threshold(found, t, 3 if flag else None, None if flag else 0.9, None, device)
    f, i = np.zeros(q.shape[:3], np.float32), np.zeros(q.shape[:3], np.int32)
    sparse.sparse_attention(found, Threshold(f, i, i, f, f), c, t, None, device)
    pages.compact(t.base, t.page_table[0], c.page_bytes, device)


def encode(device: Recorder, c: Codec, count: int) -> None:
    k = np.zeros((c.kv_heads, PAGE * count, c.head_dim), np.float32)
    pages.encode(k, k, c, np.zeros(c.page_bytes * count, np.uint8), np.arange(count) * c.page_bytes, device)


def launches(full: bool = False) -> Iterator[Launch]:
    """Launches of all kernels.

    With `full`, every page format with every head_dim. Otherwise every head_dim with every code of keys and every code
    of values, and all else (numbers of rows, dtypes, causality, sizes, rules of `encode`) in turn beside them.
    """
    device, turn = Recorder(), 0
    for head_dim in HEAD_DIMS:
        formats = list(product(SIDES, SIDES, ("fp16", "log8")))
        if not full:
            formats = [(SIDES[i], SIDES[(i + 3) % 7], ("fp16", "log8")[(i + turn) % 2]) for i in range(7)]
        for k, v, scales in formats:
            batch, heads, count = SIZES[turn // 2 % len(SIZES)]
            rows, dtype, flag = ROWS[turn % len(ROWS)], DTYPES[turn % 3], turn % 4 < 2
            c = codec(k, v, scales, head_dim, heads)
            attend(device, c, (batch, count), rows, dtype, flag)
            others(device, c, (batch, count), rows, dtype, flag)
            rule = {"k_scale_rule": SCALE_RULES[turn % 3], "v_scale_rule": SCALE_RULES[turn // 3 % 3]}
            gram = np.eye(head_dim) if turn % 2 and head_dim <= 256 else None
            for refine in (False, True) if full else (turn % 3 > 0,):
                made = codec(k, v, scales, head_dim, heads, refine=refine, key_mean=turn % 4 > 0, gram=gram, **rule)
                encode(device, made, 1 + turn % 2)
            turn += 1
            found = device.taken()
            yield from found
            if turn % 3 == 0:
                yield from map(small, found)
        # Every number of rows, dtype and causality that decode_attention is compiled for.
        for (group, n), dtype, causal in product(ROWS[:4], DTYPES, (False, True)):
            c = codec(*formats[turn % len(formats)], head_dim, 1)
            attend(device, c, (1 + turn % 2, 1 + turn % 9), (group, n), dtype, causal)
            turn += 1
            yield from device.taken()
