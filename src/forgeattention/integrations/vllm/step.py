"""Where the tokens of one engine step lie: block tables to page tables, block lists and slots, once for all layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ...codec.spec import PAGE

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """What all layers of an engine share.

    Attributes:
        window: newest tokens kept exact besides the unfinished page, a multiple of 64.
        page_bytes: bytes of one page of all KV heads.
        pages_per_block: pages of a packed block.
        block_bytes: bytes from one packed block to the next.
        exact_block: tokens of an exact block; divides 64.
        sink_blocks: exact blocks that stay at a sequence's start.
    """

    window: int
    page_bytes: int
    pages_per_block: int
    block_bytes: int
    exact_block: int
    sink_blocks: int

    @property
    def sinks(self) -> int:
        """Tokens that stay exact at a sequence's start."""
        return self.sink_blocks * self.exact_block


@dataclass(frozen=True)
class Pages:
    """Packed tokens of some rows, as in `ops.PageTable`: offsets int64 [rows, most pages], lengths int32 [rows]."""

    offsets: torch.Tensor
    lengths: torch.Tensor
    max_length: int


@dataclass(frozen=True)
class Exact:
    """Exact tokens of some rows: ids int64 [rows, most blocks], of which a row's first lengths[row] tokens count."""

    ids: torch.Tensor
    lengths: torch.Tensor
    max_length: int


@dataclass(frozen=True)
class Chunk:
    """A row with several new tokens, those from `start` to before `stop` of the step; None where it has none."""

    start: int
    stop: int
    pages: Pages | None
    exact: Exact | None


@dataclass(frozen=True)
class Step:
    """One engine step.

    Attributes:
        tokens: new tokens of all rows.
        blocks, slots: int64 [tokens], the exact block of each new token and its place there.
        encode_ids: int64 [pages * blocks per page], the exact blocks of the pages that this step completes.
        encode_offsets: int64 [pages], where those go.
        rows: the first rows, each with one new token.
        pages, exact: their packed and exact tokens, the new ones included.
        chunks: the other rows.
    """

    tokens: int
    blocks: torch.Tensor
    slots: torch.Tensor
    encode_ids: torch.Tensor
    encode_offsets: torch.Tensor
    rows: int
    pages: Pages | None
    exact: Exact | None
    chunks: tuple[Chunk, ...]

    @classmethod
    def make(cls, layout: Layout, starts: I64, lengths: I64, packed: I64, exact: I64, slots: torch.Tensor) -> Step:
        """Reads a batch.

        A page is encoded when its last token arrives. A row with C tokens before this step reads its pages up to
        token C - window as packed, all later tokens as exact. The sinks lie in page 0 as well: encoded, they stand
        last in it (in their places stand copies of other tokens), and page 0 is the last of a row's table, which ends
        before them. So no token is attended twice.

        Args:
            layout: the engine's layout.
            starts: [rows + 1], where each row's new tokens start among the step's.
            lengths: [rows], tokens of each row, the new ones included.
            packed, exact: block tables, [rows, most blocks].
            slots: int64 [tokens], places of the new tokens in the exact blocks.
        """
        new = np.diff(starts)
        past = lengths - new
        whole = np.maximum(past - layout.window, 0) // PAGE
        rows = int(np.argmax(new != 1)) if (new != 1).any() else len(new)
        b, device = layout.exact_block, slots.device
        first = slice(0, rows)
        chunks = []
        for r in range(rows, len(new)):
            if new[r]:
                row = slice(r, r + 1)
                pages = _pages(layout, packed[row], whole[row], device)
                held = _exact(layout, exact[row], whole[row], past[row], device) if past[r] else None
                chunks.append(Chunk(int(starts[r]), int(starts[r + 1]), pages, held))
        ids, offsets = _complete(layout, past, lengths, packed, exact)
        tokens = int(starts[-1])
        return cls(
            tokens,
            slots[:tokens] // b,
            slots[:tokens] % b,
            _tensor(ids, device),
            _tensor(offsets, device),
            rows,
            _pages(layout, packed[first], whole[first], device) if rows else None,
            _exact(layout, exact[first], whole[first], lengths[first], device) if rows else None,
            tuple(chunks),
        )


def _tensor(values: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device)


def _page_offsets(layout: Layout, table: I64, pages: I64) -> I64:
    """Byte offsets of pages by their number in each row's sequence, both [rows, n]."""
    blocks = np.take_along_axis(table, pages // layout.pages_per_block, 1)
    return blocks * layout.block_bytes + pages % layout.pages_per_block * layout.page_bytes


def _pages(layout: Layout, table: I64, whole: I64, device: torch.device) -> Pages | None:
    most = int(whole.max())
    if not most:
        return None
    order = np.broadcast_to(np.arange(most), (len(whole), most))
    if layout.sink_blocks:
        order = np.where(order < whole[:, None] - 1, order + 1, 0)
    else:
        order = np.where(order < whole[:, None], order, 0)
    lengths = np.maximum(whole * PAGE - layout.sinks, 0)
    offsets = _page_offsets(layout, table, order)
    return Pages(_tensor(offsets, device), _tensor(lengths.astype(np.int32), device), int(lengths.max()))


def _exact(layout: Layout, table: I64, whole: I64, end: I64, device: torch.device) -> Exact:
    b = layout.exact_block
    lead = np.where(whole > 0, layout.sink_blocks, 0)[:, None]
    first, last = (whole * PAGE // b)[:, None], (-(-end // b))[:, None]
    column = np.arange(int((lead + last - first).max()))[None]
    index = np.where(column < lead, column, np.minimum(column - lead + first, last - 1))
    lengths = lead[:, 0] * b + end - whole * PAGE
    ids = np.take_along_axis(table, index, 1)
    return Exact(_tensor(ids, device), _tensor(lengths.astype(np.int32), device), int(lengths.max()))


def _complete(layout: Layout, past: I64, lengths: I64, packed: I64, exact: I64) -> tuple[I64, I64]:
    """The exact blocks of the pages that a step completes, and where the pages go."""
    per_page, sinks = PAGE // layout.exact_block, layout.sink_blocks
    ids, offsets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for r in np.flatnonzero(lengths // PAGE > past // PAGE):
        pages = np.arange(past[r] // PAGE, lengths[r] // PAGE)
        index = pages[:, None] * per_page + np.arange(per_page)
        if pages[0] == 0 and sinks:
            index[0] = np.append(np.arange(sinks, per_page), np.full(sinks, per_page - 1))
        ids.append(exact[r, index].reshape(-1))
        offsets.append(_page_offsets(layout, packed[r : r + 1], pages[None])[0])
    return np.concatenate(ids), np.concatenate(offsets)
