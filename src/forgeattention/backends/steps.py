"""A decode step of one token per row, in the framework's own operations: for backends without kernels of their own."""

from __future__ import annotations

from typing import Any

from ..codec.codec import Codec
from ..codec.spec import PAGE
from ..ops.arrays import to_numpy


def append_step(
    to_k: Any, to_v: Any, exact: Any, packed: Any, page_table: Any, encode_offsets: Any, tickets: Any, k: Any, v: Any,
    sinks: int, encode_at: int,
) -> None:  # fmt: skip
    """See `forgeattention.ops.append_step`."""
    capacity, pages = to_k.shape[2], page_table.shape[1]
    for row, (held, coded) in enumerate(zip(to_numpy(exact).tolist(), to_numpy(packed).tolist())):
        if held == capacity - 1:
            for buffer in (to_k, to_v):
                # The two slices overlap: what is read is copied first.
                buffer[row, :, sinks : held - PAGE] = buffer[row, :, sinks + PAGE : held] + 0
            held, coded = held - PAGE, coded + PAGE
        to_k[row, :, held], to_v[row, :, held] = k[row, :, 0], v[row, :, 0]
        exact[row], packed[row] = held + 1, coded
        at = coded // PAGE
        encode_offsets[row] = page_table[row, at] if held + 1 == encode_at and at < pages else -1


def encode_rows(encode: Any, k: Any, v: Any, codec: Codec, offsets: Any, out: Any) -> None:
    """`ops.encode_rows` by a backend's `encode`."""
    for row, offset in enumerate(to_numpy(offsets).tolist()):
        if offset >= 0:
            encode(k[row], v[row], codec, out, offsets[row : row + 1])
