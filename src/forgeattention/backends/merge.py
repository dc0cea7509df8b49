"""Attention over two disjoint sets of tokens, joined in any array module's operations (Milakov and Gimelshein, arXiv
1805.02867)."""

from __future__ import annotations

from typing import Any

from ..ops.arrays import is_torch


def merge_in(xp: Any, o1: Any, lse1: Any, o2: Any, lse2: Any) -> tuple[Any, Any]:
    """`ops.merge` in the operations of `xp`: numpy, torch or mlx.core."""
    lse = xp.logaddexp(lse1, lse2)
    finite = xp.where(lse == -xp.inf, xp.zeros_like(lse), lse)
    w1, w2 = xp.exp(lse1 - finite)[..., None], xp.exp(lse2 - finite)[..., None]
    o = o1 * w1 + o2 * w2
    return (o.to(o1.dtype) if is_torch(o) else o.astype(o1.dtype)), lse
