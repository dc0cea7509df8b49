"""Codecs fitted to an mlx-lm model's weights: the same as `models.weights.hf` finds in transformers' form of it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from ...codec import Codec, CodecSpec
from ...codec.spec import HEAD_DIMS
from .fit import F64, KeyWeights, UnknownForm, fit, warn_of_unknown

NORMS = ("input_layernorm", "attention_norm", "operator_norm", "pre_mixer_norm", "pre_attn_norm", "ln_1", "norm")
"""Attributes of a layer that hold the norm before its attention; a layer without one has attention before its norms."""


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """One full-attention layer, as a call of its attention showed it.

    Attributes:
        q_heads, kv_heads: numbers of heads.
        k_dim, v_dim: channels of a key and of a value.
        dtype: of queries, by MLX's name.
        module: the module that wrote to the cache: the layer's attention.
    """

    q_heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: str
    module: Any


class _Known:
    """What was read of one model, and the codecs made of it."""

    def __init__(self, layers: dict[int, KeyWeights | str]) -> None:
        self.layers = layers
        self.codecs: dict[tuple[CodecSpec, int], Codec] = {}


_known: dict[int, _Known] = {}  # by identity, since MLX's modules are dicts


def weight_codecs(model: Any, spec: CodecSpec, layers: Mapping[int, LayerAttention]) -> dict[int, Codec]:
    """Codecs fitted to a model's weights, for those of the layers where that is possible; made once per model and
    spec. Quantised weights are taken as they decode.

    Args:
        model: mlx-lm's model.
        spec: how the cache is coded.
        layers: its full-attention layers by their number in the prompt cache.
    """
    if spec.rotation != "hadamard":
        return {}
    if id(model) not in _known:
        _known[id(model)] = _Known(key_weights(model, layers))
        weakref.finalize(model, _known.pop, id(model), None)
    known, out = _known[id(model)], {}
    for layer in layers:
        weights = known.layers.get(layer)
        if isinstance(weights, KeyWeights):
            if (spec, layer) not in known.codecs:
                known.codecs[spec, layer] = weights.codec(spec)
            out[layer] = known.codecs[spec, layer]
    return out


def key_weights(model: Any, layers: Mapping[int, LayerAttention]) -> dict[int, KeyWeights | str]:
    """By layer number what the weights say, or why nothing can be said; the reasons are logged."""
    blocks = list(model.layers)
    found: dict[int, KeyWeights | str] = {}
    for number, layer in layers.items():
        try:
            found[number] = _read(layer, _norm_before(blocks, layer.module))
        except UnknownForm as reason:
            found[number] = str(reason)
    if layers:
        warn_of_unknown(found)
    return found


def _norm_before(blocks: list[Any], attention: Any) -> Any:
    """The norm whose output the attention reads; None without one."""
    for block in blocks:
        if isinstance(block, nn.Module) and any(child is attention for child in block.children().values()):
            norms = (getattr(block, name, None) for name in NORMS)
            return next((norm for norm in norms if isinstance(norm, nn.Module)), None)
    raise UnknownForm(f"{type(attention).__name__} is not a part of a layer")


def _read(layer: LayerAttention, norm: Any) -> KeyWeights:
    attention, dim, name = layer.module, layer.k_dim, type(layer.module).__name__
    if dim not in HEAD_DIMS or layer.v_dim != dim:
        raise UnknownForm(f"{name} has head_dim {dim} of keys and {layer.v_dim} of values")
    q, k = _projections(layer, name)
    gain = _gain(norm, q[0].shape[1])
    c_q, c_k = (_energy(w, bias, gain, dim) for w, bias in (q, (k[0], None)))
    q_gain, k_gain = (_own_norm(attention, side, c, dim) for side, c in (("q", c_q), ("k", c_k)))
    return fit(c_q, c_k, _rope_pairs(attention, dim), q_gain, k_gain)


Matrix = tuple[F64, F64 | None]
"""Weight [out, in] and bias of a projection."""


def _projections(layer: LayerAttention, name: str) -> tuple[Matrix, Matrix]:
    """The query and the key projection: two matrices, or rows of one that holds queries, keys and values in turn."""
    attention, dim = layer.module, layer.k_dim
    heads, kv = layer.q_heads * dim, layer.kv_heads * dim
    if (fused := getattr(attention, "qkv_proj", None)) is not None:
        weight, bias = _linear(fused, name)
        if weight.shape[0] != heads + 2 * kv:
            raise UnknownForm(f"{name}.qkv_proj has {weight.shape[0]} rows, not {heads + 2 * kv}")
        cut = (slice(0, heads), slice(heads, heads + kv))
        q, k = ((weight[rows], None if bias is None else bias[rows]) for rows in cut)
        return q, k
    q, k = (_linear(getattr(attention, f"{side}_proj", None), name) for side in "qk")
    if q[0].shape[0] == 2 * heads:
        # Each head's queries, then what gates its output.
        rows = (np.arange(layer.q_heads)[:, None] * 2 * dim + np.arange(dim)).reshape(-1)
        q = (q[0][rows], None if q[1] is None else q[1][rows])
    if q[0].shape[0] != heads or k[0].shape[0] != kv:
        raise UnknownForm(f"{name} projects to {q[0].shape[0]} and {k[0].shape[0]} channels, not {heads} and {kv}")
    return q, k


def _linear(linear: Any, name: str) -> Matrix:
    if isinstance(linear, nn.QuantizedLinear):
        biases = linear.get("biases")
        weight = mx.dequantize(
            linear.weight, linear.scales, biases, linear.group_size, linear.bits, getattr(linear, "mode", "affine")
        )
    elif type(linear) is nn.Linear:
        weight = linear.weight
    elif type(linear).__name__ == "LoRALinear" and hasattr(linear, "lora_a"):
        weight, bias = _linear(linear.linear, name)
        return weight + linear.scale * (_float64(linear.lora_b).T @ _float64(linear.lora_a).T), bias
    else:
        raise UnknownForm(f"{name} has no plain q_proj and k_proj, nor a plain qkv_proj")
    return _float64(weight), _float64(linear.bias) if "bias" in linear else None


def _float64(x: mx.array) -> F64:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def _energy(weight: F64, bias: F64 | None, gain: F64, head_dim: int) -> F64:
    """Energy of each output channel for inputs of unit variance, [heads, head_dim]."""
    energy = np.square(weight) @ gain**2
    if bias is not None:
        energy = energy + bias**2
    return energy.reshape(-1, head_dim)


def _own_norm(attention: Any, side: str, energy: F64, dim: int) -> F64 | None:
    """The gain of a norm over the channels of a head, or None. A norm over the channels of all heads is applied to
    `energy` [heads, dim] in place."""
    names = {"q": ("q_norm", "query_layernorm", "q_layernorm"), "k": ("k_norm", "key_layernorm", "k_layernorm")}[side]
    norm = next((found for name in names if (found := getattr(attention, name, None)) is not None), None)
    if norm is None:
        return None
    weight = getattr(norm, "weight", None)
    if weight is not None and weight.shape == (energy.size,) != (dim,):
        energy *= energy.size / energy.sum() * _gain(norm, energy.size).reshape(energy.shape) ** 2
        return None
    return _gain(norm, dim)


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
