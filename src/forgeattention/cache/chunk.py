"""Attention of new tokens that are not appended: to the past of a cache and, causally, to themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..ops.arrays import is_mlx, is_torch

if TYPE_CHECKING:
    from .layer import LayerCache


def attend_chunk(
    past: LayerCache, q: Any, k: Any, v: Any, keep: NDArray[np.bool_] | None, scale: float, sink_logits: Any | None
) -> Any:
    """What `LayerCache.attend_chunk` does, by the arrays' framework.

    The packed past gives one part of the softmax, exact tokens another, and `ops.merge` joins them by their
    log-sum-exp.

    Raises:
        ValueError: arrays of a framework that has no such attention here.
    """
    if is_torch(q):
        from . import chunk_torch

        return chunk_torch.chunk(past, q, k, v, keep, scale, sink_logits)
    if is_mlx(q):
        from . import chunk_mlx

        return chunk_mlx.chunk(past, q, k, v, keep, scale, sink_logits)
    raise ValueError(f"[cache.attend_chunk] expected torch tensors or MLX arrays; got {type(q).__name__}")
