"""Keys and values whose widths are no head_dim of a record, laid out in records."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from ..codec import CodecSpec
from ..codec.spec import HEAD_DIMS


@dataclass(frozen=True)
class Tiles:
    """A token's channels cut into tiles, which are the vectors of its records.

    The channels of all key heads stand one after the other, zeros behind them up to a whole tile, and so do those of
    the values. The tiles of the narrower of the two come first; the first half of all tiles are keys of the records
    (whose codes are the more exact ones), the second half values, with a tile of zeros at the end where their number is
    odd.

    Attributes:
        kv_heads, k_dim, v_dim: of the model's keys and values.
        width: channels of a tile, one of `HEAD_DIMS`.
    """

    kv_heads: int
    k_dim: int
    v_dim: int
    width: int

    @classmethod
    def smallest(cls, spec: CodecSpec, kv_heads: int, k_dim: int, v_dim: int) -> Tiles:
        """The tiles whose records are the fewest bytes a token."""
        every = [cls(kv_heads, k_dim, v_dim, width) for width in HEAD_DIMS]
        return min(every, key=lambda tiles: tiles.page_bytes(spec))

    def page_bytes(self, spec: CodecSpec) -> int:
        """Bytes of 64 tokens."""
        return self.records * spec.page_format(self.width).record_bytes

    @cached_property
    def counts(self) -> tuple[int, int]:
        """Tiles of a token's keys and of its values."""
        k, v = (-(-self.kv_heads * dim // self.width) for dim in (self.k_dim, self.v_dim))
        return k, v

    @property
    def records(self) -> int:
        """Records of a page, each with a tile of keys and one of values."""
        return -(-sum(self.counts) // 2)

    def pack(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k [batch, kv_heads, n, k_dim] and v [batch, kv_heads, n, v_dim] as the records' keys and values, each
        [batch, records, n, width]."""
        batch, _, n, _ = k.shape
        out = k.new_zeros(batch, 2 * self.records, n, self.width)
        for at, x in zip(self._places(), (k, v)):
            flat = out.new_zeros(batch, n, (at.stop - at.start) * self.width)
            flat[..., : x.shape[1] * x.shape[3]] = x.transpose(1, 2).flatten(2)
            out[:, at] = flat.unflatten(2, (-1, self.width)).transpose(1, 2)
        return out[:, : self.records], out[:, self.records :]

    def unpack(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of `pack`."""
        half, found = self.records, []
        for at, dim in zip(self._places(), (self.k_dim, self.v_dim)):
            parts = k[:, at.start : min(at.stop, half)], v[:, max(at.start - half, 0) : max(at.stop - half, 0)]
            held = [part for part in parts if part.shape[1]]
            tiles = held[0] if len(held) == 1 else torch.cat(held, 1)
            flat = tiles.transpose(1, 2).flatten(2)[..., : self.kv_heads * dim]
            found.append(flat.unflatten(2, (self.kv_heads, dim)).transpose(1, 2))
        return found[0], found[1]

    def _places(self) -> tuple[slice, slice]:
        """The tiles of keys and of values among all."""
        k, v = self.counts
        return (slice(v, v + k), slice(0, v)) if v < k else (slice(0, k), slice(k, k + v))
