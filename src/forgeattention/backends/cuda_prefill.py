"""Prefill attention on CUDA: pages are decoded, a bounded number at a time and without rotating them back, into scratch
that torch's flash attention reads; the parts are joined by their log-sum-exp.

Decoding costs a few per cent of the products of a whole chunk of queries, so fusing it would gain
little: the queries of a KV head's group are folded into one long chunk, and each page is decoded once per chunk.
Row lengths are read on the host: unlike decode, prefill waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch

from ..codec.codec import Codec
from ..codec.spec import PAGE
from ..codec.transform import Transform
from ..ops.table import PageTable
from . import cuda

SCRATCH_PAGES = 256
"""Pages decoded at a time: 16384 tokens, 64 MiB in float16 for 8 KV heads of 128 channels."""
FLASH_HEAD_DIM = 256


def _per_head(codec: Codec, matrix: Any, device: Any) -> Any:
    t = torch.from_numpy(matrix).to(device)
    return t.expand(codec.kv_heads, *t.shape[1:])


class _Maps:
    """Transforms of queries and outputs as matrices [kv_heads, padded_dim, padded_dim] on the device."""

    def __init__(self, codec: Codec, device: Any) -> None:
        k, v = codec.k_transform, codec.v_transform
        self.q = _per_head(codec, k.inverse, device)  # q' = A^-T q, as rows: q A^-1
        self.out = _per_head(codec, v.inverse.transpose(0, 2, 1).copy(), device)
        self.k_mu, self.v_mu = self._mu(codec, k, device), self._mu(codec, v, device)

    @staticmethod
    def _mu(codec: Codec, t: Transform, device: Any) -> Any:
        return None if t.mu is None else torch.from_numpy(t.mu).to(device).expand(codec.kv_heads, -1)


def _flash(q: Any, k: Any, v: Any, scale: float) -> tuple[Any, Any]:
    """Attention of q [kv_heads, n, d] over all of k, v [kv_heads, tokens, d] in float16: out and lse in float32."""
    if q.shape[-1] <= FLASH_HEAD_DIM:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q[None], k[None], v[None], scale=scale)
        return out[0].float(), lse[0]
    s = scale * (q @ k.transpose(1, 2)).float()
    lse = torch.logsumexp(s, -1)
    return (torch.exp(s - lse[..., None]).to(v.dtype) @ v).float(), lse


def prefill_attention(q: Any, codec: Codec, table: PageTable, scale: float) -> tuple[Any, Any]:
    batch, q_heads, n, head_dim = q.shape
    kv_heads, padded = codec.kv_heads, codec.format.padded_dim
    group = q_heads // kv_heads
    out = torch.zeros((batch, q_heads, n, head_dim), dtype=torch.float32, device=q.device)
    lse = torch.full((batch, q_heads, n), -torch.inf, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    constants = cuda._constants_of(codec, q.device)
    if "prefill" not in constants.kernels:
        constants.kernels["prefill"] = _Maps(codec, q.device)
    maps = constants.kernels["prefill"]
    lengths = table.lengths.tolist()
    for row, length in enumerate(lengths):
        if not length:
            continue
        x = torch.nn.functional.pad(q[row].float(), (0, padded - head_dim)).reshape(kv_heads, group * n, padded)
        turned = (x @ maps.q).to(torch.float16)
        parts = []
        for first in range(0, length, SCRATCH_PAGES * PAGE):
            tokens = min(length - first, SCRATCH_PAGES * PAGE)
            pages = slice(first // PAGE, -(-(first + tokens) // PAGE))
            count = torch.full((1,), tokens, dtype=torch.int32, device=q.device)
            part = PageTable(table.base, table.offsets[row : row + 1, pages], count, tokens)
            k, v = cuda.decode_pages(codec, part, "float16", True)
            parts.append(_flash(turned, k[0], v[0], scale))
        y, total = parts[0]
        for o, l in parts[1:]:
            joined = torch.logaddexp(total, l)
            y = y * torch.exp(total - joined)[..., None] + o * torch.exp(l - joined)[..., None]
            total = joined
        y = y @ maps.out
        if maps.v_mu is not None:
            y = y + maps.v_mu[:, None]
        if maps.k_mu is not None:
            total = total + scale * torch.einsum("hnd,hd->hn", x, maps.k_mu)
        out[row] = y[..., :head_dim].reshape(q_heads, n, head_dim)
        lse[row] = total.reshape(q_heads, n)
    return out, lse
