"""Packed caches for the tests of the ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from forgeattention import ops
from forgeattention.codec import PAGE, Codec, CodecSpec
from forgeattention.ops import ExactTokens, PageTable
from forgeattention.ops.registry import status

ENCODER = "auto" if status("cpu")[0] else "reference"  # a GPU machine may lack the CPU kernels
DTYPES = ("float32", "float16", "bfloat16")
CODES = [
    (bits, code) for bits in (2, 3, 4) for code in ("scalar", "trellis4", "trellis8") if bits < 4 or code == "scalar"
]


def tensor(x: Any, dtype: str = "float32") -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(getattr(torch, dtype))


def relative(a: Any, b: Any) -> float:
    """Largest error of a over the largest magnitude of b."""
    a, b = (np.asarray(x.float() if isinstance(x, torch.Tensor) else x, np.float64) for x in (a, b))
    assert a.shape == b.shape
    assert np.array_equal(np.isfinite(a), np.isfinite(b))
    finite = np.isfinite(b)
    assert np.array_equal(a[~finite], b[~finite])
    a, b = a[finite], b[finite]
    return float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30))


@dataclass
class Case:
    """A packed cache of several rows in a poisoned pool, with exact tokens and queries."""

    codec: Codec
    table: PageTable
    exact: ExactTokens
    q: torch.Tensor
    scale: float

    def attend(self, backend: str = "auto", **changes: Any) -> Any:
        args = {"table": self.table, "exact": self.exact, "causal": True, "sink_logits": None, **changes}
        q = args.pop("q", self.q)
        table, exact = args.pop("table"), args.pop("exact")
        return ops.decode_attention(q, self.codec, table, exact, self.scale, backend=backend, **args)

    def row(self, b: int) -> Case:
        """The sequence b by itself, its tables cut to its own lengths."""
        n, e = int(self.table.lengths[b]), int(self.exact.lengths[b])
        table = PageTable(
            self.table.base,
            self.table.page_table[b : b + 1, : -(-n // PAGE)].clone(),
            self.table.lengths[b : b + 1].clone(),
            n,
        )
        exact = ExactTokens(
            self.exact.k[b : b + 1, :, :e], self.exact.v[b : b + 1, :, :e], self.exact.lengths[b : b + 1].clone(), e
        )
        return Case(self.codec, table, exact, self.q[b : b + 1].clone(), self.scale)


def make_case(
    spec: CodecSpec,
    head_dim: int = 64,
    kv_heads: int = 2,
    group: int = 3,
    lengths: tuple[int, ...] = (150, 0, 64),
    exact: tuple[int, ...] = (40, 7, 3),
    n: int = 1,
    dtype: str = "float32",
    seed: int = 0,
    centred: bool = False,
) -> Case:
    """Random tokens with a common direction of the keys. Whatever no row owns is 0xFF: memory between the pages, table
    entries past a row's pages, scales of tokens past a row's length, exact tokens past the exact length (NaN)."""
    rng = np.random.default_rng(seed)
    mu = {"k_mu": rng.standard_normal((kv_heads, head_dim)), "v_mu": rng.standard_normal(head_dim)} if centred else {}
    if spec.rotation == "custom":
        mats = np.eye(head_dim) + 0.3 * rng.standard_normal((2, kv_heads, head_dim, head_dim)) / head_dim**0.5
        mu |= {"k_matrix": mats[0], "v_matrix": mats[1]}
    codec = Codec(spec, head_dim, kv_heads, **mu)
    counts = [-(-length // PAGE) for length in lengths]
    size = codec.page_bytes
    pool = np.full((sum(counts) + 1) * (size + 32), 0xFF, np.uint8)
    places = rng.permutation(sum(counts)) * (size + 32) + 16
    offsets = np.full((len(lengths), max([1, *counts]) + 1), -1, np.int64)
    at = 0
    for b, count in enumerate(counts):
        if not count:
            continue
        own = places[at : at + count].astype(np.int64)
        at += count
        shape = (kv_heads, count * PAGE, head_dim)
        k = rng.standard_normal(shape) + 2 * rng.standard_normal((kv_heads, 1, head_dim))
        ops.encode(
            k.astype(np.float32), rng.standard_normal(shape).astype(np.float32), codec, pool, own, backend=ENCODER
        )
        offsets[b, :count] = own
        poison_scales(codec, pool, int(own[-1]), lengths[b] - (count - 1) * PAGE)
    most_exact, most_packed = max(exact, default=0), max(lengths, default=0)
    capacity = most_exact + 2
    k, v = rng.standard_normal((2, len(lengths), kv_heads, capacity, head_dim)).astype(np.float32)
    for b, length in enumerate(exact):
        k[b, :, length:] = v[b, :, length:] = np.nan
    q = 2 * rng.standard_normal((len(lengths), kv_heads * group, n, head_dim))
    max_length = most_packed + 5 if most_packed + 5 <= offsets.shape[1] * PAGE else most_packed
    return Case(
        codec,
        PageTable(
            torch.from_numpy(pool), torch.from_numpy(offsets), torch.tensor(lengths, dtype=torch.int32), max_length
        ),
        ExactTokens(tensor(k, dtype), tensor(v, dtype), torch.tensor(exact, dtype=torch.int32), most_exact),
        tensor(q, dtype),
        head_dim**-0.5,
    )


def poison_scales(codec: Codec, pool: Any, page: int, valid: int) -> None:
    """0xFF (NaN as fp16) in the scales of a page's tokens from `valid` on."""
    fmt = codec.format
    one = fmt.scale_bytes // PAGE
    for head in range(codec.kv_heads):
        record = page + head * fmt.record_bytes
        for start in (fmt.k_scale_offset, fmt.v_scale_offset):
            pool[record + start + valid * one : record + start + fmt.scale_bytes] = 0xFF
