"""The exact tokens of a batch of rows: sinks and recent ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ops.table import ExactTokens
from .arrays import Arrays
from .rows import I64, RowTable


class ExactBuffer:
    """Keys and values of the exact tokens. How many a row has, its `RowTable` says.

    Attributes:
        k, v: [batch, kv_heads, capacity, head_dim]; entries past a row's last token mean nothing.
    """

    def __init__(self, arrays: Arrays, k: Any, v: Any) -> None:
        self.arrays = arrays
        self.k, self.v = k, v
        self._steps: Any = None
        self._last: ExactTokens | None = None

    @classmethod
    def empty(cls, arrays: Arrays, shape: tuple[int, int, int, int], dtype: str) -> ExactBuffer:
        """A buffer of [batch, kv_heads, capacity, head_dim]."""
        return cls(arrays, arrays.zeros(shape, dtype), arrays.zeros(shape, dtype))

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for; at so many its oldest recent ones leave in a page."""
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        return self.arrays.nbytes(self.k) + self.arrays.nbytes(self.v)

    def tokens(self, rows: RowTable) -> ExactTokens:
        """What the ops are told of these tokens."""
        last, most = self._last, rows.most_exact
        if last is None or last.lengths is not rows.device_exact:
            last = ExactTokens(self.k, self.v, rows.device_exact, most)
        elif last.max_length != most:
            last = last.grown(most)
        self._last = last
        return last

    def row_tokens(self, rows: RowTable, row: int) -> ExactTokens:
        """The same of one row, as a batch of one."""
        one = slice(row, row + 1)
        return ExactTokens(self.k[one], self.v[one], rows.device_exact[one], int(rows.exact[row]))

    def write(self, rows: RowTable, k: Any, v: Any) -> None:
        """Writes k, v [batch, kv_heads, n, head_dim] behind the tokens of every row, which have room."""
        n = k.shape[2]
        if rows.uniform:
            end = rows.most_exact
            self.k[:, :, end : end + n] = k
            self.v[:, :, end : end + n] = v
            return
        if self._steps is None:
            self._steps = [self.arrays.index(np.arange(x)) for x in (rows.batch, self.capacity)]
        row, at = self._steps[0][:, None], rows.device_exact[:, None] + self._steps[1][:n]
        self.k[row, :, at] = k.swapaxes(1, 2)
        self.v[row, :, at] = v.swapaxes(1, 2)

    def replace(self, row: int, k: Any, v: Any, held: int, sinks: int, gone: int) -> int:
        """Appends to a row of `held` tokens k, v [kv_heads, n, head_dim], and drops the `gone` oldest of its recent
        and the new ones.

        Returns:
            Tokens that the row has then.
        """
        left, total = max(held - sinks - gone, 0), held + k.shape[1] - gone
        for buffer, new in ((self.k, k), (self.v, v)):
            if not gone:
                buffer[row, :, held:total] = new
                continue
            if held < sinks:
                buffer[row, :, held:sinks] = new[:, : sinks - held]
            if left:
                buffer[row, :, sinks : sinks + left] = self.arrays.copy(buffer[row, :, sinks + gone : held])
            buffer[row, :, sinks + left : total] = new[:, k.shape[1] - (total - sinks - left) :]
        return total

    def recent(self, row: int, start: int, held: int, count: int, k: Any, v: Any) -> tuple[Any, Any]:
        """`count` tokens from index `start` of a row of `held` tokens on, and from the new ones k, v where those end,
        [kv_heads, count, head_dim]."""
        end = start + count
        return tuple(
            self.arrays.concat([buffer[row, :, start : min(held, end)], new[:, : max(end - held, 0)]], 1)
            for buffer, new in ((self.k, k), (self.v, v))
        )

    @contextmanager
    def restored(self, rows: RowTable, regions: Sequence[tuple[int, slice]]) -> Iterator[None]:
        """Puts regions, (row, tokens) each, back to what they were if the body fails before `rows` has changed."""
        before = rows.seen
        saved = [(at, *(self.arrays.copy(x[at[0], :, at[1]]) for x in (self.k, self.v))) for at in regions]
        try:
            yield
        except BaseException:
            if rows.seen is before:
                for (row, part), k, v in saved:
                    self.k[row, :, part], self.v[row, :, part] = k, v
            raise

    def take(self, index: I64) -> ExactBuffer:
        """A buffer whose row i is row `index[i]` of this one."""
        return ExactBuffer(self.arrays, self.arrays.take(self.k, index), self.arrays.take(self.v, index))

    def joined(self, other: ExactBuffer, dtype: str) -> ExactBuffer:
        """A buffer of this one's rows and another's."""
        pair = []
        for ours, theirs in ((self.k, other.k), (self.v, other.v)):
            both = self.arrays.empty((len(ours) + len(theirs), *ours.shape[1:]), dtype)
            both[: len(ours)], both[len(ours) :] = ours, theirs
            pair.append(both)
        return ExactBuffer(self.arrays, *pair)

    def fill(self, k: NDArray[Any], v: NDArray[Any]) -> None:
        """Writes the first tokens of every row from host arrays [batch, kv_heads, n, head_dim]."""
        for buffer, tokens in ((self.k, k), (self.v, v)):
            self.arrays.assign(buffer, tokens, (slice(None), slice(None), slice(tokens.shape[2])))
