"""A cache as a plain list of tokens, which the real one must agree with."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from forgeattention import reference
from forgeattention.cache import LayerCache
from forgeattention.codec import PAGE, Codec


@dataclass
class Row:
    """Tokens, (k, v) each [kv_heads, head_dim]: exact sinks, packed ones as their codes decode, exact recent ones."""

    codec: Codec
    sinks: list[Any] = field(default_factory=list)
    packed: list[Any] = field(default_factory=list)
    recent: list[Any] = field(default_factory=list)

    def append(self, tokens: list[Any]) -> None:
        spec = self.codec.spec
        for token in tokens:
            (self.sinks if len(self.sinks) < spec.sinks else self.recent).append(token)
            if len(self.recent) == spec.window + PAGE:
                page, self.recent = self.recent[:PAGE], self.recent[PAGE:]
                k, v = (np.stack([t[side] for t in page], 1) for side in (0, 1))
                k, v = reference.decode_pages(reference.encode(k, v, self.codec), self.codec)
                self.packed += [(k[:, i].astype(np.float32), v[:, i].astype(np.float32)) for i in range(PAGE)]

    def trim(self, n: int) -> None:
        for _ in range(n):
            if not self.recent and self.packed:
                cut = (len(self.packed) - 1) // PAGE * PAGE
                self.packed, self.recent = self.packed[:cut], self.packed[cut:]
            (self.recent or self.sinks).pop()

    def copy(self) -> Row:
        return Row(self.codec, *(copy.copy(x) for x in (self.sinks, self.packed, self.recent)))

    def __len__(self) -> int:
        return len(self.sinks) + len(self.packed) + len(self.recent)


def contents(cache: LayerCache, row: int) -> list[Any]:
    """(k, v) of each token of a row, the packed ones decoded, in the order sinks, packed, recent."""
    table, exact = cache.row(row)
    sinks = min(cache.codec.spec.sinks, exact.max_length)
    k, v = (np.asarray(cache.arrays.to_host(x))[0, :, : exact.max_length] for x in (exact.k, exact.v))
    tokens = [(k[:, i], v[:, i]) for i in range(exact.max_length)]
    middle = []
    if table is not None:
        pages = np.stack([np.asarray(cache.pool.page(page)) for page in cache.row_pages(row).tolist()])
        pk, pv = reference.decode_pages(pages.reshape(len(pages), cache.codec.kv_heads, -1), cache.codec)
        middle = [(pk[:, i].astype(np.float32), pv[:, i].astype(np.float32)) for i in range(table.max_length)]
    return tokens[:sinks] + middle + tokens[sinks:]


def assert_agrees(cache: LayerCache, rows: list[Row]) -> None:
    """Lengths on the host and on the device, and every token, are those of the plain rows."""
    assert cache.lengths.tolist() == [len(row) for row in rows]
    assert cache.packed_lengths.tolist() == [len(row.packed) for row in rows]
    host = cache.arrays.to_host
    assert host(cache.exact.lengths).tolist() == cache.exact_lengths.tolist()
    assert cache.exact.max_length == cache.exact_lengths.max(initial=0)
    if cache.table is None:
        assert not cache.packed_lengths.any()
    else:
        assert host(cache.table.lengths).tolist() == cache.packed_lengths.tolist()
        assert cache.table.max_length == cache.packed_lengths.max()
        for row in range(cache.batch):
            pages = cache.row_pages(row)
            addresses = host(cache.table.page_table)[row, : len(pages)].tolist()
            assert addresses == [cache.arrays.address(cache.pool.page(page)) for page in pages.tolist()]
    for row, plain in enumerate(rows):
        found, wanted = contents(cache, row), plain.sinks + plain.packed + plain.recent
        for (k, v), (plain_k, plain_v) in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(k, plain_k)
            np.testing.assert_array_equal(v, plain_v)
