"""Codecs fitted to an mlx-lm model's weights: the same as `models.weights.hf` finds in transformers' form of it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from ...codec import Codec, CodecSpec
from ...codec.spec import HEAD_DIMS
from .fit import F64, KeyWeights, UnknownForm, fit, warn_of_unknown

HEADS = (("n_heads", "n_kv_heads"), ("num_attention_heads", "num_key_value_heads"), ("num_heads", "num_kv_heads"))
"""Attributes in which attention modules keep their numbers of heads."""


class _Known:
    """What was read of one model, and the codecs made of it."""

    def __init__(self, layers: dict[int, KeyWeights | str]) -> None:
        self.layers = layers
        self.codecs: dict[tuple[CodecSpec, int], Codec] = {}


_known: dict[int, _Known] = {}  # by identity, since MLX's modules are dicts


def weight_codecs(model: Any, spec: CodecSpec, layers: Iterable[int]) -> dict[int, Codec]:
    """Codecs fitted to a model's weights, for those of the layers where that is possible; made once per model and
    spec. Quantised weights are taken as they decode."""
    if spec.rotation != "hadamard":
        return {}
    if id(model) not in _known:
        _known[id(model)] = _Known(key_weights(model))
        weakref.finalize(model, _known.pop, id(model), None)
    known, out = _known[id(model)], {}
    for layer in layers:
        weights = known.layers.get(layer)
        if isinstance(weights, KeyWeights):
            if (spec, layer) not in known.codecs:
                known.codecs[spec, layer] = weights.codec(spec)
            out[layer] = known.codecs[spec, layer]
    return out


def key_weights(model: Any) -> dict[int, KeyWeights | str]:
    """By layer number what the weights say, or why nothing can be said."""
    found: dict[int, KeyWeights | str] = {}
    for number, layer in enumerate(model.layers):
        attention = getattr(layer, "self_attn", None)
        if attention is not None:
            try:
                found[number] = _read(attention, getattr(layer, "input_layernorm", None))
            except UnknownForm as reason:
                found[number] = str(reason)
    warn_of_unknown(found)
    return found


def _read(attention: Any, norm: Any) -> KeyWeights:
    name = type(attention).__name__
    q, k = (_linear(getattr(attention, f"{side}_proj", None), name) for side in "qk")
    numbers = [(getattr(attention, a, None), getattr(attention, b, None)) for a, b in HEADS]
    heads, kv_heads = next((n for n in numbers if all(isinstance(x, int) for x in n)), (0, 0))
    if not heads or not kv_heads or heads % kv_heads:
        raise UnknownForm(f"{name} names no numbers of heads")
    head_dim = k[0].shape[0] // kv_heads
    if q[0].shape[0] != heads * head_dim or k[0].shape[0] != kv_heads * head_dim or head_dim not in HEAD_DIMS:
        raise UnknownForm(
            f"{name} projects to {q[0].shape[0]} and {k[0].shape[0]} channels for {heads}/{kv_heads} heads"
        )
    gain = _gain(norm, q[0].shape[1])
    c_q, c_k = (_energy(w, bias, gain, head_dim) for w, bias in (q, (k[0], None)))
    own = (getattr(attention, f"{side}_norm", None) for side in "qk")
    q_gain, k_gain = (None if n is None else _gain(n, head_dim) for n in own)
    return fit(c_q, c_k, _rope_pairs(attention, head_dim), q_gain, k_gain)


def _linear(linear: Any, name: str) -> tuple[F64, F64 | None]:
    """Weight [out, in] and bias of a projection."""
    if isinstance(linear, nn.QuantizedLinear):
        biases = linear.get("biases")
        weight = mx.dequantize(
            linear.weight, linear.scales, biases, linear.group_size, linear.bits, getattr(linear, "mode", "affine")
        )
    elif type(linear) is nn.Linear:
        weight = linear.weight
    else:
        raise UnknownForm(f"{name} has no plain q_proj and k_proj")
    return _float64(weight), _float64(linear.bias) if "bias" in linear else None


def _float64(x: mx.array) -> F64:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def _energy(weight: F64, bias: F64 | None, gain: F64, head_dim: int) -> F64:
    """Energy of each output channel for inputs of unit variance, [heads, head_dim]."""
    energy = np.square(weight) @ gain**2
    if bias is not None:
        energy = energy + bias**2
    return energy.reshape(-1, head_dim)


def _gain(norm: Any, dim: int) -> F64:
    """What a norm multiplies each of `dim` channels with; ones without a norm."""
    if norm is None:
        return np.ones(dim)
    weight = getattr(norm, "weight", None)
    if weight is None or weight.shape != (dim,):
        raise UnknownForm(f"{type(norm).__name__} has no gain of {dim} channels")
    # Of mean 0 and unit variance: norms only apply their gain, however the model stores it, and perhaps a bias.
    probe = mx.where(mx.arange(dim) % 2 == 0, -1.0, 1.0).astype(weight.dtype)
    return _float64((norm(probe) - norm(-probe)) / 2 * probe)


def _rope_pairs(attention: Any, head_dim: int) -> NDArray[np.intp]:
    """[2, head_dim]: every channel, and the one that RoPE turns it into (itself if none)."""
    own = np.arange(head_dim)
    rope = getattr(attention, "rope", None)
    if rope is None:
        raise UnknownForm(f"{type(attention).__name__} has no rope to read pairs from")
    turned = np.abs(np.array(rope(mx.eye(head_dim)[None, :, None], offset=1)[0, :, 0]))
    turned[own, own] = 0
    partner = np.where(turned.any(1), turned.argmax(1), own)
    if (partner[partner] != own).any():
        raise UnknownForm(f"{type(rope).__name__} does not turn pairs")
    return np.stack([own, partner])
