"""Caches of other systems, simulated: coded and decoded at once, stored in floating point, read by stock attention.

Only their fidelity is measured here. Each is written anew from its published description, named at its function. Every
one gets the same exact first tokens and recent window as ours, unless a measurement gives nobody any; rules of its own
that belong to a cache (layers left exact) are a variant of it with its bits counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from forgeattention.codec.transform import hadamard

BLOCK = 64
Coder = Callable[[torch.Tensor, int], torch.Tensor]
"""Codes and decodes states [..., tokens, head_dim] of the layer of this number."""


@dataclass(frozen=True)
class Peer:
    """One simulated cache.

    Attributes:
        effective_bits: per coded element, scales counted.
        keys, values: what it does to each.
        ends: so many first and as many last layers stay exact.
        block: tokens that it codes at once.
        source: where it is described.
        by_layer: whether coders differ from layer to layer.
    """

    name: str
    effective_bits: float
    keys: Coder
    values: Coder
    source: str
    ends: int = 0
    block: int = BLOCK
    by_layer: bool = False

    def bits(self, config: Any) -> float:
        """Mean over the layers of full attention, those that stay exact counted at 16 bits."""
        coded = len(coded_layers(config, self)) / len(full_attention_layers(config))
        return self.effective_bits * coded + 16 * (1 - coded)


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


def rotated(x: torch.Tensor, size: int, code: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`code` of runs of `size` channels turned by an orthonormal Hadamard matrix, and turned back."""
    h = _hadamard(size, x.device)
    return (code((x.float().unflatten(-1, (-1, size)) @ h).flatten(-2)).unflatten(-1, (-1, size)) @ h).flatten(-2)


@lru_cache(16)
def _hadamard(size: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(hadamard(size), dtype=torch.float32, device=device)


@lru_cache(8)
def _centroids(bits: int, steps: int = 200) -> torch.Tensor:
    """Lloyd-Max levels of the unit normal, float64 [2^bits], by fixed-point iteration."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    levels = torch.linspace(-2.5, 2.5, 2**bits, dtype=torch.float64)
    for _ in range(steps):
        inner = (levels[1:] + levels[:-1]) / 2
        edges = torch.cat([inner.new_tensor([-12.0]), inner, inner.new_tensor([12.0])])
        density, mass = normal.log_prob(edges).exp(), normal.cdf(edges)
        levels = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
    return levels


def turboquant_keys(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Keys of vLLM's TurboQuant "_nc" presets: a vector's fp16 norm, and its direction turned by Hadamard and rounded
    to Lloyd-Max levels of N(0, 1/d); decoded directions are brought back to norm 1 ("norm correction")."""
    dim = x.shape[-1]
    norm = x.float().norm(dim=-1, keepdim=True).clamp_min(1e-8)
    h, levels = _hadamard(dim, x.device), _centroids(bits).to(x.device, torch.float32) / math.sqrt(dim)
    coded = levels[torch.bucketize((x.float() / norm) @ h, (levels[1:] + levels[:-1]) / 2)]
    return (coded / coded.norm(dim=-1, keepdim=True)) @ h * norm.half().float()


def turboquant_values(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Values of vLLM's TurboQuant: uniform between a token's least and largest, fp16 step and zero."""
    y = x.float()
    low = y.amin(-1, keepdim=True)
    step = ((y.amax(-1, keepdim=True) - low) / (2**bits - 1)).clamp_min(1e-8)
    codes = ((y - low) / step + 0.5).floor().clamp(0, 2**bits - 1)
    return codes * step.half().float() + low.half().float()


KVARN_TILE = 128


def variance_normalised(x: torch.Tensor, bits: int, dim: int, passes: int = 16) -> torch.Tensor:
    """KVarN (arXiv 2606.03458; vLLM pull request 46812): in tiles of 128 tokens, channels turned by Hadamard, rows and
    columns brought to one standard deviation by alternating passes, then asymmetric rounding along `dim`: keys with a
    scale and a zero for each channel, values with those for each token."""
    h = _hadamard(x.shape[-1], x.device)
    y = (x.float() @ h).unflatten(-2, (-1, KVARN_TILE))
    scale = torch.ones_like(y[..., :1, :1])
    for i in range(passes):
        deviation = (y / scale).std(-1 - i % 2, keepdim=True).clamp(1e-6, 1e6)
        scale = scale * deviation
    z = y / scale
    low = z.amin(dim, keepdim=True)
    step = ((z.amax(dim, keepdim=True) - low) / (2**bits - 1)).clamp_min(1e-8)
    return (((z - low) / step).round() * step + low).mul(scale).flatten(-3, -2) @ h


def _both(name: str, bits: float, code: Callable[[torch.Tensor], torch.Tensor], source: str) -> Peer:
    def coder(x: torch.Tensor, layer: int) -> torch.Tensor:
        return code(x)

    return Peer(name, bits, coder, coder, source)


def _two(name: str, bits: float, keys: Callable[..., Any], values: Callable[..., Any], source: str) -> Peer:
    return Peer(name, bits, lambda x, layer: keys(x), lambda x, layer: values(x), source)


def _turboquant(k_bits: int, v_bits: int, dim: int) -> Peer:
    name = f"TurboQuant {k_bits}-bit (vLLM)" if k_bits == v_bits else f"TurboQuant K{k_bits}V{v_bits} (vLLM)"
    bits = (k_bits + v_bits) / 2 + 16 * 3 / (2 * dim)
    keys, values = partial(turboquant_keys, bits=k_bits), partial(turboquant_values, bits=v_bits)
    return _two(name, bits, keys, values, "vLLM 0.32, quantization/turboquant/config.py; arXiv 2504.19874")


def peers(head_dim: int) -> list[Peer]:
    """All that need no calibration, for heads of so many channels."""
    size = head_dim & -head_dim  # the largest power of two that divides it
    kivi = "arXiv 2402.02750"
    out = [
        *(
            _two(
                f"KIVI {b}-bit, groups of 32",
                b + 1.0,
                partial(affine, bits=b, group=32, dim=-2),
                partial(affine, bits=b, group=32, dim=-1),
                kivi,
            )
            for b in (2, 3, 4)
        ),
        *(
            _both(f"affine {b}-bit, groups of 64 (mlx-lm)", b + 0.5, partial(affine, bits=b, group=64, dim=-1), "mlx")
            for b in (3, 4, 8)
        ),
        *(
            _both(f"q{b}_0 (llama.cpp)", b + 0.5, partial(symmetric, bits=b), "llama.cpp, ggml-quants.c")
            for b in (4, 8)
        ),
        *(
            _two(
                f"q{b}_0 with Hadamard (llama.cpp)",
                b + 0.5,
                partial(rotated, size=size, code=partial(symmetric, bits=b)),
                partial(rotated, size=min(size, 64), code=partial(symmetric, bits=b)),
                "llama.cpp pull request 21038: the largest rotation for keys, of 64 channels for values",
            )
            for b in (4, 8)
        ),
        replace(
            _two(
                "KVarN K4V2, tiles of 128",
                3 + 16 * (3 * head_dim + 3 * KVARN_TILE) / (2 * KVARN_TILE * head_dim),
                partial(variance_normalised, bits=4, dim=-2),
                partial(variance_normalised, bits=2, dim=-1),
                "arXiv 2606.03458; vLLM pull request 46812",
            ),
            block=KVARN_TILE,
        ),
    ]
    if size == head_dim:
        for k, v in ((3, 3), (3, 4), (4, 4)):
            one = _turboquant(k, v, head_dim)
            out += [one, replace(one, name=f"{one.name}, 2 + 2 layers exact", ends=2)]
    return out


class PeerLayer(DynamicLayer):
    """A layer that codes all but its first and newest tokens, block by block, before it takes new ones."""

    def __init__(self, peer: Peer, layer: int, sinks: int, window: int) -> None:
        super().__init__()
        self.peer, self.layer, self.window, self.coded = peer, layer, window, sinks

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_initialized and self.keys.numel():
            self.catch_up()
        return super().update(key_states, value_states, *args, **kwargs)

    def catch_up(self) -> None:
        """Code the blocks that have left the window."""
        block = self.peer.block
        ready = (self.keys.shape[2] - self.window - self.coded) // block * block
        if ready > 0:
            span = slice(self.coded, self.coded + ready)
            for held, coder in ((self.keys, self.peer.keys), (self.values, self.peer.values)):
                held[:, :, span] = coder(held[:, :, span], self.layer).to(held.dtype)
            self.coded += ready


def full_attention_layers(config: Any) -> list[int]:
    """Numbers of the layers that a packed cache packs."""
    return [i for i, layer in enumerate(DynamicCache(config=config).layers) if type(layer) is DynamicLayer]


def coded_layers(config: Any, peer: Peer) -> list[int]:
    """Numbers of the layers that `peer` codes: those of full attention that are not among the model's first or last
    ones that it leaves exact."""
    layers = config.get_text_config(decoder=True).num_hidden_layers
    return [i for i in full_attention_layers(config) if peer.ends <= i < layers - peer.ends]


def make_cache(config: Any, peer: Peer, sinks: int = 4, window: int = 128) -> DynamicCache:
    """An empty DynamicCache whose layers of full attention are coded as `peer` does."""
    cache = DynamicCache(config=config)
    for i in coded_layers(config, peer):
        cache.layers[i] = PeerLayer(peer, i, sinks, window)
    return cache
