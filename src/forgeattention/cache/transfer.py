"""Packed pages and whole rows as bytes, to send to another process or to set aside (docs/format.md, "Transfer").

A prefill machine exports a row and a decoding one imports it; an offloader exports pages and imports them later, on the
same or another device. Bytes are the pages themselves: about a fifth of the FP16 keys and values.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codec import PAGE, Codec
from ..codec.spec import FORMAT_VERSION
from ..ops.arrays import FLOATS
from .arrays import Arrays
from .layer import LayerCache
from .pool import Ids, PagePool

MAGIC = b"FORGEKV\0"
VERSION = 1
HEADER = struct.Struct("<8sHHI16sIIIHHB7x")
"""Magic, version, page format's version, header bytes, codec's fingerprint, pages, bytes per page, exact tokens,
KV heads, head_dim, dtype of the exact tokens (index in `FLOATS`), padding."""
CHECKSUM = 32
HOST_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def export_row(layer: LayerCache, row: int = 0) -> bytes:
    """One row of a cache: its pages and its exact tokens.

    Raises:
        ValueError: a row that is not there, or of which tokens were evicted.
    """
    if not 0 <= row < layer.batch:
        raise ValueError(f"[cache.export] expected a row in [0, {layer.batch}); got {row}")
    _, exact = layer.row(row)
    held = exact.max_length + int(layer.packed_lengths[row])
    if held != layer.lengths[row]:
        raise ValueError(f"[cache.export] expected all {layer.lengths[row]} tokens; got {held}, others were evicted")
    tokens = [np.ascontiguousarray(layer.arrays.to_host(x[0, :, : exact.max_length])) for x in (exact.k, exact.v)]
    return _pack(layer.codec, layer.pool, layer.row_pages(row), layer.dtype, exact.max_length, tokens)


def import_row(
    data: bytes | memoryview,
    codec: Codec,
    arrays: Arrays,
    *,
    pool: PagePool | None = None,
    max_pages: int | None = None,
    backend: str = "auto",
) -> LayerCache:
    """A cache of one row from what `export_row` gave; `LayerCache.join` adds it to others.

    Args:
        data: the bytes.
        codec: the layer's codec, equal to the exporter's.
        arrays: framework and device of the new cache.
        pool, max_pages, backend: as for `LayerCache`.

    Raises:
        ValueError: damaged bytes, another codec or version; a full pool.
    """
    parts = _unpack(data, codec)
    pool = PagePool(codec.page_bytes, arrays, max_pages) if pool is None else pool
    layer = LayerCache(codec, 1, arrays, parts.dtype, pool=pool, backend=backend)
    held = parts.k.shape[1]
    packed, most = len(parts.pages) * PAGE, layer.exact.k.shape[2]
    if held >= most or (packed and held < codec.spec.sinks):
        raise ValueError(f"[cache.import] expected the exact tokens of a whole row, fewer than {most}; got {held}")
    ids = _store(parts.pages, pool)
    table = np.arange(len(ids))[None]
    lengths = np.array([held]), np.array([packed]), np.array([held + packed])
    layer.restore(ids, table, codec.spec.sinks + PAGE * table, lengths, parts.k[None], parts.v[None])
    pool.free(ids)
    return layer


def export_pages(codec: Codec, pool: PagePool, ids: Ids) -> bytes:
    """Pages of a pool alone.

    Args:
        codec: of the pages.
        pool: where they are.
        ids: which, [pages]; `LayerCache.row_pages` names a row's.
    """
    none = np.zeros((codec.kv_heads, 0, codec.head_dim), np.float32)
    return _pack(codec, pool, np.asarray(ids, np.int64), "float32", 0, [none, none])


def import_pages(data: bytes | memoryview, codec: Codec, pool: PagePool) -> Ids:
    """Puts exported pages into a pool; gives their new ids, [pages], each with one reference.

    Raises:
        ValueError: damaged bytes, another codec or version; a full pool, which then is as it was.
    """
    if pool.page_bytes != codec.page_bytes:
        raise ValueError(f"[cache.import] expected a pool of {codec.page_bytes} byte pages; got {pool.page_bytes}")
    return _store(_unpack(data, codec).pages, pool)


@dataclass(frozen=True)
class _Parts:
    """pages uint8 [pages, page_bytes]; k, v [kv_heads, tokens, head_dim] (bfloat16 as uint16)."""

    pages: NDArray[np.uint8]
    dtype: str
    k: NDArray[Any]
    v: NDArray[Any]


def _pack(codec: Codec, pool: PagePool, ids: Ids, dtype: str, count: int, tokens: list[NDArray[Any]]) -> bytes:
    header = HEADER.pack(
        MAGIC,
        VERSION,
        FORMAT_VERSION,
        HEADER.size,
        bytes.fromhex(codec.fingerprint),
        len(ids),
        codec.page_bytes,
        count,
        codec.kv_heads,
        codec.head_dim,
        FLOATS.index(dtype),
    )
    pages = [pool.arrays.to_host(pool.page(page)).tobytes() for page in ids.tolist()]
    body = b"".join([header, *pages, *(x.tobytes() for x in tokens)])
    return body + hashlib.sha256(body).digest()


def _unpack(data: bytes | memoryview, codec: Codec) -> _Parts:
    view = memoryview(data).cast("B")
    if len(view) < HEADER.size + CHECKSUM or bytes(view[:8]) != MAGIC:
        raise ValueError(f"[cache.import] expected exported bytes; got {len(view)} bytes of something else")
    body, claimed = view[:-CHECKSUM], bytes(view[-CHECKSUM:])
    if hashlib.sha256(body).digest() != claimed:
        raise ValueError("[cache.import] expected undamaged bytes; got another checksum than theirs")
    _, version, layout, size, fingerprint, pages, page_bytes, count, heads, dim, dtype = HEADER.unpack(
        body[: HEADER.size]
    )
    got = (version, layout, size, fingerprint.hex(), page_bytes, heads, dim)
    want = (VERSION, FORMAT_VERSION, HEADER.size, codec.fingerprint, codec.page_bytes, codec.kv_heads, codec.head_dim)
    for name, have, expected in zip(
        ("version", "page format", "header bytes", "codec", "bytes per page", "KV heads", "head_dim"), got, want
    ):
        if have != expected:
            raise ValueError(f"[cache.import] expected {name} {expected!r}; got {have!r}")
    if dtype >= len(FLOATS):
        raise ValueError(f"[cache.import] expected a dtype below {len(FLOATS)}; got {dtype}")
    host = np.dtype(HOST_DTYPES[FLOATS[dtype]])
    exact = count * heads * dim * host.itemsize
    if len(body) != HEADER.size + pages * page_bytes + 2 * exact:
        raise ValueError(
            f"[cache.import] expected {HEADER.size + pages * page_bytes + 2 * exact} bytes; got {len(body)}"
        )
    at = HEADER.size + pages * page_bytes
    k, v = (
        np.frombuffer(body[start : start + exact], host).reshape(heads, count, dim).copy() for start in (at, at + exact)
    )
    # Copied, as torch takes no arrays that cannot be written to.
    return _Parts(
        np.frombuffer(body[HEADER.size : at], np.uint8).reshape(pages, page_bytes).copy(), FLOATS[dtype], k, v
    )


def _store(pages: NDArray[np.uint8], pool: PagePool) -> Ids:
    ids = pool.alloc(len(pages))
    for page, data in zip(ids.tolist(), pages):
        pool.write(page, data)
    return ids
