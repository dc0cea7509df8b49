"""The caches that fidelity.py compares: presets, what each choice of the default is worth, and the field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import peer_caches
from transformers import DynamicCache

from forgeattention import CodecSpec
from forgeattention.codec import Codec
from forgeattention.codec.presets import PRESETS
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.models.calibration import Calibration, codecs_for
from forgeattention.models.shape import head_dim
from forgeattention.tools.calibrate import coded_cache


@dataclass(frozen=True)
class Candidate:
    """A cache to measure.

    Attributes:
        make: makes an empty one for a model.
        implementation: transformers attention implementation that it needs; None is the model's own.
        kind: "exact", "preset", "calibrated", "variant" (ours otherwise; only its KL is measured) or "peer".
        simulated: the simulation behind it, for a peer that is one.
        spec: for a packed cache of ours.
    """

    name: str
    effective_bits: float
    make: Callable[[Any], Any]
    implementation: str | None
    kind: str
    simulated: peer_caches.Peer | None = None
    spec: CodecSpec | None = None


def ours(
    name: str, spec: CodecSpec, head_dim: int, backend: str, *, fitted: bool = True, kind: str = "variant"
) -> Candidate:
    """A packed cache; with `fitted` its codecs are read off the model's weights."""
    bits = spec.page_format(head_dim).effective_bits

    def make(model: Any) -> Any:
        return ForgeCache(model if fitted else model.config, spec, backend=backend)

    return Candidate(name, bits, make, "forge", kind, spec=spec)


def decoded(
    name: str, spec: CodecSpec, head_dim: int, backend: str, *, fitted: bool = True, kind: str = "variant"
) -> Candidate:
    """The same pages, coded by the native kernels and read through decode_pages and stock attention, on any device."""

    @lru_cache(2)
    def codecs(model: Any) -> dict[int, Codec]:
        return codecs_for(model, spec, peer_caches.full_attention_layers(model.config), fitted)

    def make(model: Any) -> Any:
        return coded_cache(model, {i: (codec, "kv") for i, codec in codecs(model).items()}, backend="cpu")

    return Candidate(name, spec.page_format(head_dim).effective_bits, make, None, kind, spec=spec)


def calibrated(model: Any, file: Path, backend: str, decoded: bool) -> Candidate:
    """A packed cache with the bits and Gram matrices of a calibration file, named after it."""
    calibration = Calibration.load(file, model)
    codecs = calibration.codecs(model)
    bits = sum(codec.format.effective_bits for codec in codecs.values()) / len(codecs)

    def make(model: Any) -> Any:
        if decoded:
            return coded_cache(model, {i: (codec, "kv") for i, codec in codecs.items()}, backend="cpu")
        return ForgeCache(model, calibration.spec, codecs=codecs, backend=backend)

    return Candidate(f"calibrated: {file.stem}", bits, make, None if decoded else "forge", "calibrated")


def peer(cache: peer_caches.Peer, config: Any, sinks: int, window: int) -> Candidate:
    """A simulated cache of the field, with our exact first tokens and recent window, for models of this config."""

    def make(model: Any) -> Any:
        return peer_caches.make_cache(model.config, cache, sinks, window)

    return Candidate(cache.name, cache.bits(config), make, None, "peer", cache)


EXACT = Candidate("exact", 16.0, lambda model: DynamicCache(config=model.config), None, "exact")


SETS = ("quick", "full", "field")
FEW = ("KIVI 3-bit, groups of 32", "affine 4-bit, groups of 64 (mlx-lm)")


def candidates(
    model: Any,
    which: str,
    backend: str = "auto",
    ours: Callable[..., Candidate] = ours,
    *,
    sinks: int = 4,
    window: int = 128,
) -> list[Candidate]:
    """The caches of a set.

    Args:
        model: a transformers causal language model.
        which: "quick" (presets and a few others), "full" (also what each choice of the default is worth), or "field"
            (presets and every peer).
        backend: of our caches.
        ours: makes our candidates; `decoded` for pages that stock attention reads.
        sinks, window: exact first and newest tokens, of every cache.

    Raises:
        ValueError: an unknown set.
    """
    if which not in SETS:
        raise ValueError(f"[candidates] expected a set in {SETS}; got {which!r}")
    dim = head_dim(model)
    norm: dict[str, Any] = {"k_scale_rule": "norm", "v_scale_rule": "norm"}
    base: dict[str, Any] = {
        "key_mean": False,
        "scales": "fp16",
        "k_code": "scalar",
        "v_code": "scalar",
        "refine": False,
    }

    def one(name: str, spec: CodecSpec, kind: str = "variant", fitted: bool = True) -> Candidate:
        spec = replace(spec, sinks=sinks, window=window)
        return ours(name, spec, dim, backend, fitted=fitted, kind=kind)

    out = [EXACT, *(one(f"preset {name}", spec, "preset") for name, spec in PRESETS.items())]
    if which == "field":
        return out + [peer(cache, model.config, sinks, window) for cache in peer_caches.peers(dim)]
    out += [
        one("balanced, V trellis8", CodecSpec(v_code="trellis8")),
        one("balanced, not fitted to the model", CodecSpec(), fitted=False),
        one("scalar 3 bits, page mean, plain encoder", CodecSpec(k_code="scalar", refine=False), fitted=False),
        one("TurboQuant-style: Hadamard, 3 bits", CodecSpec(**norm, **base), "peer", False),
        one("origin: planar 45 degrees, 3 bits", CodecSpec(rotation="planar", **norm, **base), "peer", False),
    ]
    if which == "full":
        four = {**norm, **base, "k_bits": 4, "v_bits": 4}
        out += [
            one("balanced, plain encoder", CodecSpec(refine=False)),
            one("balanced, not fitted, plain encoder", CodecSpec(refine=False), fitted=False),
            one("balanced, K trellis4", CodecSpec(k_code="trellis4")),
            one("balanced, other signs", CodecSpec(seed=2)),
            one("scalar 3 bits, page mean", CodecSpec(k_code="scalar")),
            one("K 4 bits, V 3 bits scalar", CodecSpec(k_bits=4)),
            one("K 3 bits, V 2 bits trellis8", CodecSpec(v_bits=2, v_code="trellis8")),
            one("K 2 bits, V 3 bits", CodecSpec(k_bits=2)),
            one("K 4 bits, V 2 bits trellis8", CodecSpec(k_bits=4, v_bits=2, v_code="trellis8")),
            one("scalar 2 bits", CodecSpec(k_bits=2, v_bits=2, k_code="scalar")),
            one("scalar 4 bits", CodecSpec(k_bits=4, v_bits=4)),
            one("TurboQuant-style: Hadamard, 4 bits", CodecSpec(**four), "peer", False),
            one("origin: planar 45 degrees, 4 bits", CodecSpec(rotation="planar", **four), "peer", False),
        ]
    simulated = [cache for cache in peer_caches.peers(dim) if which == "full" or cache.name in FEW]
    return out + [peer(cache, model.config, sinks, window) for cache in simulated]


def chosen(every: list[Candidate], only: list[str] | None) -> list[Candidate]:
    """Those whose name is one of `only`, or holds one that ends in "*", in that order; all if None.

    Raises:
        ValueError: a name that fits none.
    """
    if only is None:
        return every
    fits = {text: [c for c in every if c.name == text or (text[-1:] == "*" and text[:-1] in c.name)] for text in only}
    if unknown := [text for text, found in fits.items() if not found]:
        raise ValueError(f"[candidates] expected names of {[c.name for c in every]}; got {unknown}")
    return list({c.name: c for found in fits.values() for c in found}.values())
