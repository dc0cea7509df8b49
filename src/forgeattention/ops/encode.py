"""encode: keys and values to page records."""

from __future__ import annotations

from typing import Any

from ..codec.codec import Codec
from ..codec.spec import PAGE
from .arrays import dtype_of, traced
from .checks import check_codec, check_index, check_vectors, describe, fail
from .dispatch import select


def encode(k: Any, v: Any, codec: Codec, out: Any | None, offsets: Any, *, backend: str = "auto") -> None:
    """Encode whole pages.

    Args:
        k, v: [kv_heads, 64 n, head_dim], float32, float16 or bfloat16; any strides with a contiguous last axis.
        codec: the layer's codec.
        out: contiguous uint8 array that takes the pages, or None when `offsets` are absolute addresses.
        offsets: int64 [n], byte offset in `out` of each page of kv_heads records. Pages must not overlap.
        backend: "auto" or a backend's name.

    Raises:
        ValueError: a wrong shape or dtype, an offset outside `out`, NaN or infinity, vectors whose scale exceeds
            the scale format. Nothing is written then. (CUDA reports values lazily: see backends/cuda/pages.py.)
    """
    if traced():
        from . import library

        return library.encode(k, v, codec, out, offsets, backend)
    check_codec("encode", codec)
    check_vectors("encode", "k", k, codec, 3, codec.kv_heads)
    check_vectors("encode", "v", v, codec, 3, codec.kv_heads)
    tokens = k.shape[1]
    if tokens % PAGE or v.shape[1] != tokens or dtype_of(v) != dtype_of(k):
        raise fail("encode", f"k and v alike with a multiple of {PAGE} tokens", f"{describe(k)} and {describe(v)}")
    check_index("encode", "offsets", offsets, "int64", (tokens // PAGE,))
    if out is not None and dtype_of(out) != "uint8":
        raise fail("encode", "out uint8", describe(out))
    launch = select("encode", k, backend)
    if tokens:
        launch(k, v, codec, out, offsets)
