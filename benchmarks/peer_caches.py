"""Caches of other systems, simulated: coded and decoded at once, stored in floating point, read by stock attention.

Only their fidelity is measured here. Every one gets the same exact first tokens and recent window as ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

BLOCK = 64


def affine(x: torch.Tensor, bits: int, group: int, dim: int) -> torch.Tensor:
    """Asymmetric rounding in groups along `dim` with a minimum and a step per group, as mlx-lm does (dim -1, groups of
    64) and KIVI (arXiv 2402.02750: keys per channel, dim -2, values per token, dim -1; groups of 32)."""
    y = x.transpose(dim, -1)
    g = y.unflatten(-1, (-1, group))
    low = g.amin(-1, keepdim=True)
    step = ((g.amax(-1, keepdim=True) - low) / (2**bits - 1)).clamp_min(1e-8)
    return (((g - low) / step).round() * step + low).flatten(-2).transpose(dim, -1)


def symmetric(x: torch.Tensor, bits: int, group: int = 32) -> torch.Tensor:
    """llama.cpp's q4_0 and q8_0: groups of 32 along the channels, one fp16 step. q4_0 spans -8..7 with the element of
    largest magnitude at -8; q8_0 spans -127..127."""
    g = x.unflatten(-1, (-1, group))
    if bits == 8:
        step = (g.abs().amax(-1, keepdim=True) / 127).half().float().clamp_min(1e-8)
        return ((g / step).round() * step).flatten(-2)
    top = g.gather(-1, g.abs().argmax(-1, keepdim=True))
    step = (top / -8).half().float()
    step = torch.where(step == 0, torch.full_like(step, 1e-8), step)
    return ((g / step).round().clamp(-8, 7) * step).flatten(-2)


@dataclass(frozen=True)
class Peer:
    """One simulated cache: bits per element with its scales counted, and what it does to keys and values."""

    name: str
    effective_bits: float
    keys: Callable[[torch.Tensor], torch.Tensor]
    values: Callable[[torch.Tensor], torch.Tensor]


def _affine_peer(bits: int) -> Peer:
    def both(x: torch.Tensor) -> torch.Tensor:
        return affine(x, bits, 64, -1)

    return Peer(f"affine {bits}-bit, groups of 64 (mlx-lm)", bits + 32 / 64, both, both)


def _kivi_peer(bits: int) -> Peer:
    return Peer(
        f"KIVI {bits}-bit, groups of 32",
        bits + 32 / 32,
        lambda x: affine(x, bits, 32, -2),
        lambda x: affine(x, bits, 32, -1),
    )


def _ggml_peer(bits: int) -> Peer:
    def both(x: torch.Tensor) -> torch.Tensor:
        return symmetric(x, bits)

    return Peer(f"q{bits}_0 (llama.cpp)", bits + 16 / 32, both, both)


PEERS = [
    *(_kivi_peer(b) for b in (2, 3, 4)),
    *(_affine_peer(b) for b in (3, 4, 8)),
    *(_ggml_peer(b) for b in (4, 8)),
]


class PeerLayer(DynamicLayer):
    """A layer that codes all but its first and newest tokens, in blocks of 64, before it takes new ones."""

    def __init__(self, peer: Peer, sinks: int, window: int) -> None:
        super().__init__()
        self.peer, self.window, self.coded = peer, window, sinks

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_initialized and self.keys.numel():
            ready = (self.keys.shape[2] - self.window - self.coded) // BLOCK * BLOCK
            if ready > 0:
                span = slice(self.coded, self.coded + ready)
                self.keys[:, :, span] = self.peer.keys(self.keys[:, :, span])
                self.values[:, :, span] = self.peer.values(self.values[:, :, span])
                self.coded += ready
        return super().update(key_states, value_states, *args, **kwargs)


def make_cache(config: Any, peer: Peer, sinks: int = 4, window: int = 128) -> DynamicCache:
    """An empty DynamicCache whose layers are coded as `peer` does."""
    cache = DynamicCache()
    cache.layers = [PeerLayer(peer, sinks, window) for _ in range(config.num_hidden_layers)]
    cache.layer_class_to_replicate = None
    return cache
