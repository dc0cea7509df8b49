"""merge: joins attention over disjoint sets of tokens."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from .arrays import is_torch, traced
from .dispatch import find


def merge(o1: Any, lse1: Any, o2: Any, lse2: Any) -> tuple[Any, Any]:
    """Attention over the union of two disjoint sets of tokens.

    Args:
        o1, o2: [..., head_dim], attention over each set.
        lse1, lse2: [...], natural log-sum-exp of each set's scores; -inf for an empty set.

    Returns:
        o in o1's dtype and the joint lse.
    """
    if _in_one_launch(o1, lse1, o2):
        launch, _ = find("merge", "cuda", False)
        if launch is not None:
            return launch(o1, lse1, o2, lse2)
    xp: Any = np if isinstance(lse1, np.ndarray) else sys.modules["torch" if is_torch(lse1) else "mlx.core"]
    lse = xp.logaddexp(lse1, lse2)
    finite = xp.where(lse == -xp.inf, xp.zeros_like(lse), lse)
    w1, w2 = xp.exp(lse1 - finite)[..., None], xp.exp(lse2 - finite)[..., None]
    o = o1 * w1 + o2 * w2
    return (o.to(o1.dtype) if is_torch(o) else o.astype(o1.dtype)), lse


def _in_one_launch(o1: Any, lse1: Any, o2: Any) -> bool:
    """Whether the arrays are such as prefill has many of: on CUDA, o2 in float32."""
    if traced() or not is_torch(o1) or not o1.is_cuda or o1.ndim != 4 or o1.shape[3] % 2:
        return False
    float32 = sys.modules["torch"].float32
    return o2.dtype == float32 and lse1.dtype == float32 and o1.dtype.itemsize <= 4
