"""Where the tokens of a paged engine's step lie: block tables to page offsets, exact blocks and the pages that fill.

A paged engine (vLLM) hands out fixed blocks of memory and says in a block table which blocks a sequence has. A sequence
has two kinds here: packed blocks of whole pages, and exact blocks of a few tokens each. This is the NumPy form of
kernels/cuda/page_tables.cu, which makes the same tables on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codec.codec import Codec
from ..codec.spec import PAGE

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Geometry:
    """How the blocks of a group of layers are laid out.

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

    def first_kept(self, tokens: int, slack: int = 0) -> int:
        """First token after the sinks that stays exact in a sequence of so many, of which `slack` may go again."""
        return max(tokens - slack - self.window, 0) // PAGE * PAGE

    def most_exact(self, new_tokens: int) -> int:
        """Most exact tokens of a row that `new_tokens` were added to in this step."""
        return self.sinks + self.window + PAGE - 1 + new_tokens


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of one layer.

    Attributes:
        codec: the layer's codec.
        pages: uint8 [bytes], to which page offsets are added.
        tokens: exact blocks [blocks, exact_block, kv_heads, 2 * head_dim], a token's key and value side by side.
    """

    codec: Codec
    pages: Any
    tokens: Any


def exact_block_tokens(packed_bytes: int, token_bytes: int) -> int:
    """Tokens of an exact block that is no larger than a packed one: the largest power of two that fits, 64 at most.

    Args:
        packed_bytes: of a packed block.
        token_bytes: of an exact token's key and value in all KV heads.
    """
    return min(PAGE, 1 << (packed_bytes // token_bytes).bit_length() - 1)


def fills(rows: int, tokens: int) -> int:
    """Places for the pages that a step of so many rows and new tokens may fill."""
    return rows + tokens // PAGE


@dataclass(frozen=True)
class PageTables:
    """The tables of one step.

    Attributes:
        page_table: int64 [rows, most pages], bytes of each row's packed pages, as in `ops.PageTable`.
        packed: int32 [rows], packed tokens.
        blocks: int32 [rows, most exact blocks].
        exact: int32 [rows], exact tokens in them.
        fill_offsets: int64 [fills], bytes of the pages that fill in this step, or -1 for none.
        fill_tokens: int32 [fills, 64], their tokens: the number among the step's new ones, or -1 - slot of an exact one
            (slot: block * exact_block + place). Undefined where there is no page.
    """

    page_table: I64
    packed: I32
    blocks: I32
    exact: I32
    fill_offsets: I64
    fill_tokens: I32


def page_tables(
    geometry: Geometry, starts: I64, lengths: I64, packed_table: I64, exact_table: I64, decode_rows: int
) -> PageTables:
    """Makes the tables of a step.

    A page fills when its last token arrives. A row with C tokens before the step reads its pages up to token C - window
    as packed, and also those whose exact blocks are gone; all later tokens are exact. The sinks lie in page 0 as well:
    encoded, they stand last in it (in their places stand copies of other tokens), and page 0 is the last of a row's
    pages, which end before them. So no token is attended twice.

    Args:
        geometry: of the blocks.
        starts: [rows + 1], where each row's new tokens start among the step's.
        lengths: [rows], tokens of each row, the new ones included.
        packed_table, exact_table: block tables [rows, most blocks]; block 0 stands for none.
        decode_rows: the first rows, whose exact tokens include the new ones; other rows attend to those directly.
    """
    g, b = geometry, geometry.exact_block
    rows = len(lengths)
    past = np.maximum(lengths - np.diff(starts), 0)
    last = np.where(np.arange(rows) < decode_rows, lengths, past)
    whole = np.maximum(past - g.window, 0) // PAGE
    for ahead in range(g.window // PAGE):
        page = np.maximum(past - g.window, 0) // PAGE + ahead
        gone = (page < past // PAGE) & (_take(exact_table, (page * PAGE + PAGE - 1) // b) == 0)
        whole = np.where(gone, page + 1, whole)

    order = np.broadcast_to(np.arange(max(1, whole.max(initial=0))), (rows, max(1, whole.max(initial=0))))
    if g.sink_blocks:
        order = np.where(order + 1 < whole[:, None], order + 1, 0)
    offsets = _offsets(g, packed_table, np.where(order < np.maximum(whole, 1)[:, None], order, 0))

    lead = np.where(whole > 0, g.sink_blocks, 0)
    count = lead + -(-last // b) - whole * PAGE // b
    column = np.arange(max(1, count.max(initial=0)))[None]
    index = np.where(column < lead[:, None], column, column + (whole * PAGE // b - lead)[:, None])
    blocks = _take(exact_table, np.where(column < count[:, None], index, 0))

    fill_offsets = np.full(fills(rows, int(starts[-1])), -1, np.int64)
    fill_tokens = np.zeros((len(fill_offsets), PAGE), np.int32)
    for r in np.flatnonzero(lengths // PAGE > past // PAGE):
        pages = np.arange(past[r] // PAGE, lengths[r] // PAGE)
        token = np.tile(np.arange(PAGE), (len(pages), 1))
        if pages[0] == 0 and g.sinks:
            token[0] = np.append(np.arange(g.sinks, PAGE), PAGE - b + np.arange(PAGE - g.sinks, PAGE) % b)
        token = token + pages[:, None] * PAGE
        held = -1 - (_take(exact_table[r : r + 1], token.reshape(1, -1) // b).reshape(token.shape) * b + token % b)
        at = slice(r + starts[r] // PAGE, r + starts[r] // PAGE + len(pages))
        present = _take(packed_table[r : r + 1], pages[None] // g.pages_per_block)[0] != 0
        fill_offsets[at] = np.where(present, _offsets(g, packed_table[r : r + 1], pages[None])[0], -1)
        fill_tokens[at] = np.where(token < past[r], held, starts[r] + token - past[r])
    return PageTables(
        offsets,
        np.maximum(whole * PAGE - g.sinks, 0).astype(np.int32),
        blocks.astype(np.int32),
        (lead * b + last - whole * PAGE).astype(np.int32),
        fill_offsets,
        fill_tokens,
    )


def _take(table: I64, index: I64) -> I64:
    """table[r, index[r]], 0 beyond its columns; index [rows] or [rows, n]."""
    flat = index.reshape(len(index), -1) if len(index) else index.reshape(0, 1)
    inside = flat < table.shape[1]
    taken = np.where(inside, np.take_along_axis(table, np.where(inside, flat, 0), 1), 0)
    return taken.reshape(index.shape).astype(np.int64)


def _offsets(g: Geometry, table: I64, pages: I64) -> I64:
    """Byte offsets of pages by their number in each row's sequence, both [rows, n]."""
    return _take(table, pages // g.pages_per_block) * g.block_bytes + pages % g.pages_per_block * g.page_bytes
