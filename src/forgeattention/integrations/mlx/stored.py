"""Caches of mlx-lm's prompt files, which have no checksum: what they say is checked before anything is made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from ...cache import LayerCache, MLXArrays
from ...cache.checks import check_parts
from ...cache.storage import layer_from
from ...codec import PAGE, Codec, CodecSpec
from ...ops.arrays import dtype_of
from .convert import codec_of

KNOWN: dict[str, type] = {"spec": str, "batched": bool, "position": list}
LAYER: dict[str, type] = {"head_dim": int, "kv_heads": int, "codec": str}


def read_fields(told: Any, wanted: Mapping[str, type]) -> dict[str, Any]:
    """The fields of a state's header, JSON as bytes.

    Args:
        told: uint8 [bytes].
        wanted: classes of fields by name; there may be others.

    Raises:
        ValueError: no JSON, or a field that is not there or of another class.
    """
    try:
        header = json.loads(bytes(told.tolist()))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"[mlx_lm] expected a packed cache's header; got {type(error).__name__}: {error}") from None
    if not isinstance(header, dict) or not all(isinstance(header.get(name), kind) for name, kind in wanted.items()):
        raise ValueError(f"[mlx_lm] expected a packed cache's header with {sorted(wanted)}; got another")
    return header


def read_header(told: Any, filled: bool) -> dict[str, Any]:
    """The header of a `PackedKVCache.state`; arguments and errors as of `read_fields`.

    Args:
        told: uint8 [bytes].
        filled: whether keys and values follow it.
    """
    header = read_fields(told, KNOWN | LAYER if filled else KNOWN)
    if not all(isinstance(x, int) and 0 <= x < 2**62 for x in header["position"]):
        raise ValueError(f"[mlx_lm] expected positions of rows; got {header['position']}")
    return header


def codec_said(header: dict[str, Any]) -> Codec:
    """The codec that a header describes. Raises ValueError where it describes none."""
    spec = CodecSpec.from_json(header["spec"])
    try:
        return codec_of(spec, header["head_dim"], header["kv_heads"], header.get("diagonal"))
    except (TypeError, IndexError) as error:
        raise ValueError(f"[mlx_lm] expected scales of key channels; got {type(error).__name__}: {error}") from None


def read_layer(arrays: Any, codec: Codec) -> LayerCache:
    """The layer that a state holds.

    Args:
        arrays: what follows the header: pages, table and positions, lengths, exact keys and values.
        codec: of the pages.

    Raises:
        ValueError: arrays that no cache holds.
    """
    if len(arrays) != 5 or not all(isinstance(x, mx.array) for x in arrays):
        raise ValueError(f"[mlx_lm] expected five arrays of a packed cache; got {len(arrays)}")
    pages, table, lengths, k, v = arrays
    frame, counts = MLXArrays(), np.array(lengths)
    if table.ndim != 3 or table.shape[0] != 2 or counts.ndim != 2 or len(counts) != 3:
        raise ValueError(f"[mlx_lm] expected a table and lengths of rows; got {table.shape} and {counts.shape}")
    width = max(0, int(counts[1].max(initial=0))) // PAGE
    numbers, starts = np.array(table)[..., :width]
    tokens = [frame.to_host(x) for x in (k, v)]
    host = np.array(pages, copy=False)
    parts: dict[str, Any] = {"pages": host, "table": numbers, "starts": starts, "lengths": counts}
    parts |= {"k": tokens[0], "v": tokens[1]}
    check_parts(parts, codec, dtype_of(k))
    used, rows = np.unique(numbers, return_inverse=True)
    shift = int(len(used) > 0 and used[0] < 0)
    parts |= {"pages": [pages[at] for at in used[shift:].tolist()], "table": rows.reshape(numbers.shape) - shift}
    return layer_from(parts, codec, frame, dtype_of(k))
