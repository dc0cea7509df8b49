"""A paged engine's block manager in small: rows take, share and give back blocks as vLLM's do with the packed cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from forgeattention.codec import PAGE
from forgeattention.ops.page_tables import Geometry

I64 = NDArray[np.int64]


@dataclass
class Row:
    """A sequence. `names` are its tokens, which two rows have in common as far as they share a prefix."""

    names: list[tuple[int, int]] = field(default_factory=list)
    packed: list[int] = field(default_factory=list)
    exact: list[int] = field(default_factory=list)
    shared: int = 0  # tokens of a prefix hit, whose blocks are another row's


@dataclass(frozen=True)
class Batch:
    """What an engine says of one step, with the row numbers in its order."""

    rows: list[int]
    starts: I64
    lengths: I64
    packed_table: I64
    exact_table: I64
    slots: I64
    decode_rows: int


class Engine:
    """Hands out blocks; block 0 is the null block.

    Args:
        geometry: of the blocks.
        random: chooses blocks.
        blocks: how many there are.
        slack: new tokens up to which a row keeps all of them exact.
    """

    def __init__(self, geometry: Geometry, random: np.random.Generator, blocks: int, slack: int) -> None:
        self.geometry, self.random, self.slack = geometry, random, slack
        self.free = list(range(1, blocks))
        self.rows: dict[int, Row] = {}
        self.keep: set[int] = set()  # blocks of ended rows that a prefix hit may still use
        self.born = 0

    def take(self) -> int:
        return self.free.pop(int(self.random.integers(len(self.free))))

    def add(self) -> int:
        self.rows[self.born] = Row()
        self.born += 1
        return self.born - 1

    def hit(self, parent: int, tokens: int) -> int:
        """A new row that shares a prefix with another: its pages and sinks, and no other exact tokens."""
        g, row = self.geometry, self.rows[self.add()]
        block = PAGE * g.pages_per_block
        other = self.rows[parent]
        row.names = other.names[:tokens]
        row.packed = other.packed[: tokens // block]
        row.exact = [0] * (tokens // g.exact_block)
        row.exact[: g.sink_blocks] = other.exact[: g.sink_blocks]
        row.shared = tokens
        self.keep |= {*row.packed, *row.exact}
        return self.born - 1

    def end(self, number: int) -> None:
        row = self.rows.pop(number)
        self.free += [b for b in {*row.packed, *row.exact} if b and b not in self.keep]

    def step(self, news: dict[int, int], decode_tokens: int = 1) -> Batch:
        """Gives rows so many new tokens: first those that decode, with `decode_tokens` each."""
        g, b = self.geometry, self.geometry.exact_block
        order = sorted(news, key=lambda number: news[number] != decode_tokens)
        slots: list[int] = []
        for number in order:
            row, new = self.rows[number], news[number]
            past, length = len(row.names), len(row.names) + new
            # Blocks that no later step reads go back.
            for i in range(g.sink_blocks, g.first_kept(past) // b):
                if row.exact[i]:
                    if row.exact[i] not in self.keep:
                        self.free.append(row.exact[i])
                    row.exact[i] = 0
            # A chunk takes no blocks for tokens that its pages will hold.
            for i in range(len(row.exact), -(-length // b)):
                skipped = i >= g.sink_blocks and (i + 1) * b <= g.first_kept(length, self.slack)
                row.exact.append(0 if skipped else self.take())
            block = PAGE * g.pages_per_block
            row.packed += [self.take() for _ in range(len(row.packed), -(-length // block))]
            slots += [row.exact[i // b] * b + i % b for i in range(past, length)]
            row.names += [(number, i) for i in range(past, length)]
        chosen = [self.rows[number] for number in order]
        tables = [np.zeros((len(order), max(len(t) for t in of)), np.int64) for of in self.tables(chosen)]
        for table, of in zip(tables, self.tables(chosen)):
            for i, known in enumerate(of):
                table[i, : len(known)] = known
        starts = np.cumsum([0, *(news[number] for number in order)])
        lengths = np.array([len(row.names) for row in chosen])
        ones = sum(news[number] == decode_tokens for number in order)
        return Batch(order, starts, lengths, tables[0], tables[1], np.array(slots), ones)

    @staticmethod
    def tables(rows: list[Row]) -> tuple[list[list[int]], list[list[int]]]:
        return [row.packed for row in rows], [row.exact for row in rows]
