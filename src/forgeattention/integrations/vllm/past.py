"""The past of prompts' chunks, decoded page by page for an attention kernel that reads pages of 64 plain tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...codec.spec import PAGE
from ...ops.registry import paged_steps
from ...ops.table import PageTable


@dataclass(frozen=True)
class Piece:
    """Some pages of the past, in the order of rows: packed tokens, then each row's exact ones.

    Attributes:
        pages: how many there are.
        page_table: int64 [pages, 1], bytes of the packed page.
        lengths: int32 [pages], packed tokens of it; 0 where the page holds exact tokens only.
        table: int32 [rows, most pages], numbers of a row's pages among these.
        used: int32 [rows], tokens of a row in these pages.
        most_used: host's bound of `used`.
        blocks, places: int64 [tokens], where exact tokens lie in the exact blocks.
        to_pages, to_places: int64 [tokens], where they go; page `pages` for those that are not in this piece.
    """

    pages: int
    page_table: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor
    used: torch.Tensor
    most_used: int
    blocks: torch.Tensor
    places: torch.Tensor
    to_pages: torch.Tensor
    to_places: torch.Tensor

    def load(self, blocks: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        """Decodes a layer's packed pages and copies its exact tokens into k, v [pages + 1, kv_heads, 64, head_dim]."""
        table = PageTable(blocks.pages, self.page_table, self.lengths, PAGE)
        paged_steps("cuda").decode_pages_into(blocks.codec, table, k[:-1], v[:-1])
        held = blocks.tokens[self.blocks, self.places]
        d = k.shape[-1]
        k.transpose(1, 2)[self.to_pages, self.to_places] = held[..., :d]
        v.transpose(1, 2)[self.to_pages, self.to_places] = held[..., d:]


class Past:
    """What the chunks of a step attend to besides themselves.

    Args:
        m: what vLLM says of the step.
        tables: of the step.
        most_pages: pages of a piece.
    """

    def __init__(self, m: Any, tables: Any, most_pages: int) -> None:
        first, device = m.decode_rows, m.starts.device
        self.starts = m.starts[first : m.rows + 1] - m.starts[first]
        new = np.diff(m.starts_host)[first:]
        past = (m.lengths_host[first:] - new).astype(np.int64)
        self.most_new = int(new.max())
        pages = -(-past // PAGE)
        row = np.repeat(np.arange(len(new)), pages)
        number = np.arange(len(row)) - np.repeat(np.cumsum(pages) - pages, pages)
        self.pieces = []
        for begin in range(0, len(row), most_pages):
            at = slice(begin, begin + most_pages)
            self.pieces.append(_piece(row[at], number[at], past, tables, first, m.rows, device))


def _piece(row: Any, number: Any, past: Any, tables: Any, first: int, rows: int, device: torch.device) -> Piece:
    g, count = tables.geometry, len(row)
    own = slice(first, rows)
    held = np.bincount(row, minlength=rows - first)
    base = np.cumsum(held) - held
    from_page = np.full(rows - first, 0)
    seen = np.flatnonzero(held)
    from_page[seen] = number[base[seen]]
    used = np.clip(past - from_page * PAGE, 0, held * PAGE)
    table = base[:, None] + np.minimum(np.arange(max(1, held.max())), np.maximum(held - 1, 0)[:, None])
    host = [row + first, number, base, from_page, held]
    rows_at, numbers, bases, froms, helds = (_to(x, torch.int64, device) for x in host)
    packed = tables.packed[own].long()
    lengths = (tables.packed[rows_at].long() - PAGE * numbers).clamp(0, PAGE)
    offsets = tables.page_table[rows_at, numbers.clamp(max=tables.page_table.shape[1] - 1)]
    # Exact token e of a row is its token packed + e here.
    e = torch.arange(g.sinks + g.window + PAGE - 1, device=device)
    token = packed[:, None] + e
    page = token // PAGE - froms[:, None]
    inside = (e < tables.exact[own, None]) & (page >= 0) & (page < helds[:, None])
    blocks = tables.blocks[own].long()[:, (e // g.exact_block).clamp(max=tables.blocks.shape[1] - 1)]
    places = (e % g.exact_block).expand_as(token)
    return Piece(
        count,
        torch.where(lengths > 0, offsets, 0)[:, None],
        lengths.int(),
        _to(table, torch.int32, device),
        _to(used, torch.int32, device),
        int(used.max()),
        torch.where(inside, blocks, 0).flatten(),
        places.flatten(),
        torch.where(inside, bases[:, None] + page, count).flatten(),
        torch.where(inside, token % PAGE, 0).flatten(),
    )


def _to(x: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(np.ascontiguousarray(x)).to(dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
