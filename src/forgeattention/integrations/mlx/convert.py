"""Arrays and codecs on their way into and out of a packed layer of mlx-lm."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ...codec import Codec, CodecSpec
from ...codec.spec import HEAD_DIMS

I64 = NDArray[np.int64]


def packed_width(k_dim: int, v_dim: int) -> int:
    """The head_dim of the packed cache of a layer: the smallest that holds its keys and its values. What is missing is
    filled up with zeros, which cost as much memory as the rest.

    Raises:
        ValueError: none is so large.
    """
    fitting = [dim for dim in HEAD_DIMS if dim >= max(k_dim, v_dim)]
    if not fitting:
        raise ValueError(f"[mlx_lm] expected head_dims up to {max(HEAD_DIMS)}; got {k_dim} of keys, {v_dim} of values")
    return min(fitting)


def widened(x: mx.array, width: int) -> mx.array:
    """x [..., dim] with zeros behind, [..., width]."""
    missing = width - x.shape[-1]
    return x if missing == 0 else mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def codec_of(spec: CodecSpec, head_dim: int, kv_heads: int, diagonal: Any) -> Codec:
    """The codec of a spec with scales of key channels `diagonal` [kv_heads, padded_dim], or without."""
    scales = None if diagonal is None else np.array(diagonal)[:, :head_dim]
    return Codec(spec, head_dim, kv_heads, k_diagonal=scales)


def readable(spec: CodecSpec, codec: Codec) -> Codec:
    """What a saved cache tells of a codec: the spec and the scales of key channels; it reads the same pages, unless the
    codec has matrices or centres of its own."""
    return codec_of(spec, codec.head_dim, codec.kv_heads, codec.k_transform.diagonal)


def json_array(header: dict[str, Any]) -> mx.array:
    """A header as JSON, in uint8."""
    return mx.array(np.frombuffer(json.dumps(header).encode(), np.uint8))


def integers(values: Any) -> I64:
    """Whole numbers of an MLX array or a sequence, on the host."""
    return np.array(values.tolist() if isinstance(values, mx.array) else list(values), np.int64)
