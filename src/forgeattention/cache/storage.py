"""Saved caches: one safetensors file, replaced whole, with a checksum.

Per layer i the file holds "i.pages" uint8 [pages, page_bytes] (docs/format.md), "i.table" int64 [batch, most pages]
(indices into "i.pages", -1 past a row's last), "i.starts" like it (position of each page's first token), "i.lengths"
int64 [3, batch] (exact and packed tokens, and all that the row has come to), "i.k" and "i.v" [batch, kv_heads, most
exact tokens, head_dim] (bfloat16 as uint16 bit patterns). The metadata name the format, its version, the model, the
codecs and the SHA-256 of all else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codec import PAGE, Codec
from ..codec.spec import FORMAT_VERSION
from ..util.tensor_files import Tensors, expect, json_field, load_metadata, load_tensors, save_tensors
from .arrays import Arrays
from .checks import check_parts
from .layer import LayerCache
from .pool import PagePool

OP = "cache.load"
KIND = {"format": "forgeattention cache", "version": str(FORMAT_VERSION)}
PARTS = ("pages", "table", "starts", "lengths", "k", "v")


def save(path: str | os.PathLike[str], layers: Mapping[int, LayerCache], model: str, extra: Any = None) -> None:
    """Writes layers to a file, which is replaced only once the new one is complete on disk.

    Needs host memory for one copy of the packed cache.

    Args:
        path: the file.
        layers: by their number in the model.
        model: fingerprint of the model; `load` wants the same.
        extra: anything that JSON holds, given back by `load`.
    """
    tensors: Tensors = {}
    for number, layer in layers.items():
        tensors |= {f"{number}.{part}": array for part, array in zip(PARTS, _layer_tensors(layer))}
    metadata = {
        **KIND,
        "model": model,
        "codecs": json.dumps({str(n): layer.codec.fingerprint for n, layer in layers.items()}, sort_keys=True),
        "dtypes": json.dumps({str(n): layer.dtype for n, layer in layers.items()}, sort_keys=True),
        "extra": json.dumps(extra),
    }
    save_tensors(path, tensors, metadata, mode=0o600)  # what it holds can be somebody's prompt


def load(
    path: str | os.PathLike[str],
    codecs: Mapping[int, Codec],
    model: str,
    arrays: Arrays,
    *,
    max_pages: int | None = None,
    backend: str = "auto",
    options: Mapping[int, Mapping[str, Any]] | None = None,
) -> tuple[dict[int, LayerCache], Any]:
    """Reads what `save` wrote.

    Args:
        path: the file.
        codecs: codec of each layer, as when it was saved.
        model: fingerprint of the model.
        arrays: framework and device of the new caches.
        max_pages, backend: as for `LayerCache`.
        options: what the `LayerCache` of each layer is told beyond that; None for nothing.

    Returns:
        The layers, and the `extra` of `save`.

    Raises:
        ValueError: a file that is damaged or not of this format, another format version, model or codec.
    """
    metadata, tensors = load_tensors(path, OP, KIND | {"model": model})
    saved, dtypes, extra = (json_field(OP, metadata, name) for name in ("codecs", "dtypes", "extra"))
    expect(OP, "codecs", {str(n): c.fingerprint for n, c in codecs.items()}, saved)
    expect(OP, "layers with a dtype", sorted(saved), sorted(dtypes) if isinstance(dtypes, dict) else dtypes)
    layers = {}
    for number, codec in codecs.items():
        told = {"backend": backend, **({} if options is None else options[number])}
        parts = {part: tensors.get(f"{number}.{part}") for part in PARTS}
        check_parts(parts, codec, dtypes[str(number)])
        held = {part: tensor for part, tensor in parts.items() if tensor is not None}
        layers[number] = layer_from(held, codec, arrays, dtypes[str(number)], max_pages, **told)
    return layers, extra


def saved_extra(path: str | os.PathLike[str]) -> Any:
    """The `extra` of a saved cache, without its layers and before its checksum is looked at.

    Raises:
        ValueError: a file that is not of this format.
    """
    return json_field(OP, load_metadata(path, OP, KIND), "extra")


def _layer_tensors(layer: LayerCache) -> tuple[NDArray[Any], ...]:
    rows = [np.zeros(0, np.int64)] + [layer.row_pages(row) for row in range(layer.batch)]
    ids, index = np.unique(np.concatenate(rows), return_inverse=True)
    pages = np.empty((len(ids), layer.codec.page_bytes), np.uint8)
    for i, page in enumerate(ids.tolist()):
        pages[i] = layer.arrays.to_host(layer.pool.page(page))
    packed, exact = layer.packed_lengths, layer.exact_lengths
    counts = packed // PAGE
    table = np.full((layer.batch, counts.max(initial=0)), -1, np.int64)
    used = np.arange(table.shape[1]) < counts[:, None]
    table[used] = index
    starts = np.zeros_like(table)
    starts[used] = np.concatenate(rows[:1] + [layer.page_starts(row) for row in range(layer.batch)])
    tokens = []
    for array in (layer.exact.k, layer.exact.v):
        host = np.array(layer.arrays.to_host(array[:, :, : exact.max(initial=0)]))
        host[(np.arange(host.shape[2]) >= exact[:, None])[:, None].repeat(host.shape[1], 1)] = 0
        tokens.append(host)
    return pages, table, starts, np.stack([exact, packed, layer.lengths]), *tokens


def layer_from(
    parts: Mapping[str, Any], codec: Codec, arrays: Arrays, dtype: str, max_pages: int | None = None, **options: Any
) -> LayerCache:
    """A layer of its saved arrays, which are sound (`checks.check_parts`).

    Args:
        parts: by the names of `PARTS`; pages are a sequence, each of which the table names by its place.
        codec, arrays, dtype, options: as for `LayerCache`.
        max_pages: as for `PagePool`.
    """
    pages, table, starts, lengths = (parts[name] for name in PARTS[:4])
    pool = PagePool(codec.page_bytes, arrays, max_pages)
    ids = pool.alloc(len(pages))
    for page, data in zip(ids.tolist(), pages):
        pool.write(page, data)
    layer = LayerCache(codec, lengths.shape[1], arrays, dtype, pool=pool, **options)
    layer.restore(ids, table, starts, tuple(lengths), parts["k"], parts["v"])
    pool.free(ids)
    return layer
