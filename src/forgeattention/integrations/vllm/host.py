"""A step on the CPU: tables in NumPy, exact tokens gathered, prompts' chunks one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ... import ops
from ...cache.chunk_torch import attend
from ...codec.spec import PAGE
from ...ops.page_tables import Geometry, page_tables
from ...ops.table import ExactTokens, PageTable
from .metadata import Metadata


class HostStep:
    """One engine step of a group of layers.

    Args:
        geometry: of the group's blocks.
        packed, exact: what vLLM says of the step for the packed and for the exact blocks.
    """

    def __init__(self, geometry: Geometry, packed: Metadata, exact: Metadata) -> None:
        m = self.packed = packed
        packed_table, exact_table = (x.table[: m.rows].numpy().astype(np.int64) for x in (packed, exact))
        lengths = packed.lengths[: m.rows].numpy().astype(np.int64)
        self.tables = page_tables(geometry, m.starts_host, lengths, packed_table, exact_table, m.decode_rows)
        self._block = geometry.exact_block
        slots = exact.slots[: m.tokens]
        self._kept = torch.nonzero(slots >= geometry.exact_block).flatten()
        self._slots = slots[self._kept]
        filled = self.tables.fill_offsets >= 0
        self._fill_offsets = torch.from_numpy(self.tables.fill_offsets[filled])
        self._fill_tokens = torch.from_numpy(self.tables.fill_tokens[filled].astype(np.int64)).flatten()

    def append(self, layer: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        """Writes new tokens [tokens, kv_heads, head_dim] to the exact blocks, and encodes the pages that they fill."""
        self.packed.keep(layer, key, value)
        both = torch.cat([key[: self.packed.tokens], value[: self.packed.tokens]], -1)
        if len(self._fill_offsets):
            new = self._fill_tokens >= 0
            page = both.new_empty(len(new), *both.shape[1:])
            page[new] = both[self._fill_tokens[new]]
            held = -1 - self._fill_tokens[~new]
            page[~new] = layer.blocks.tokens[held // self._block, held % self._block]
            k, v = page.transpose(0, 1).split(key.shape[-1], -1)
            ops.encode(k, v, layer.codec, layer.blocks.pages, self._fill_offsets)
        layer.blocks.tokens[self._slots // self._block, self._slots % self._block] = both[self._kept]

    def attend(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """Attends query [tokens, heads, head_dim] into `out` of the same shape.

        Rows that decode are one call of `ops.decode_attention`; others go one by one, as chunks that attend to the past
        and causally to themselves. A layer that shares another's keys and values has none to give.
        """
        m = self.packed
        if m.decode_rows:
            at = slice(0, m.decode_rows * m.decode_tokens)
            shape = m.decode_rows, m.decode_tokens, *query.shape[1:]
            q = query[at].view(shape).transpose(1, 2)
            table, exact = self._past(layer, slice(0, m.decode_rows))
            done, _ = ops.decode_attention(q, layer.codec, table, exact, layer.scale, sink_logits=layer.sink_logits)
            out[at] = done.transpose(1, 2).reshape(out[at].shape)
        key, value = m.given(layer, key, value)
        for row in range(m.decode_rows, m.rows):
            at = slice(int(m.starts_host[row]), int(m.starts_host[row + 1]))
            if at.start == at.stop:
                continue
            assert key is not None
            assert value is not None
            q, k, v = (x[at].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
            table, exact = self._past(layer, slice(row, row + 1))
            packed = None if table is None else ops.prefill_attention(q, layer.codec, table, layer.scale)
            done = attend(q, k, v, exact, packed, layer.scale, layer.sink_logits)
            out[at] = done[0].transpose(0, 1)

    def _past(self, layer: Any, rows: slice) -> tuple[PageTable | None, ExactTokens | None]:
        """Packed and exact tokens of some rows; None where no row has any."""
        t, table, exact = self.tables, None, None
        packed, most = t.packed[rows], int(t.packed[rows].max())
        if most:
            offsets = np.ascontiguousarray(t.page_table[rows, : -(-most // PAGE)])
            lengths = torch.from_numpy(np.ascontiguousarray(packed))
            table = PageTable(layer.blocks.pages, torch.from_numpy(offsets), lengths, most, uniform=len(packed) == 1)
        most = int(t.exact[rows].max())
        if most:
            ids = torch.from_numpy(t.blocks[rows, : -(-most // self._block)].astype(np.int64))
            held = layer.blocks.tokens[ids].flatten(1, 2).transpose(1, 2)
            k, v = held.split(held.shape[-1] // 2, -1)
            exact = ExactTokens(k, v, torch.from_numpy(np.ascontiguousarray(t.exact[rows])), most)
        return table, exact
