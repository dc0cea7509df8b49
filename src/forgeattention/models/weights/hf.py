"""What a model's weights tell about its keys, without any text.

A key channel matters as much as queries look at it. With the input norm's gain folded into the projections, and inputs
of unit variance in all directions, channel j of a head's queries has the energy c_q[j] = sum of squares of row j of
W_q (plus its bias squared), and its keys' c_k[j]. RoPE turns pairs of channels into each other, so each gets its pair's
mean. From them come the diagonal t = (c_q / c_k)^(1/4), which evens out what a channel's error costs, and the Gram
matrix diag(c_q) by which the encoder shapes its errors. Both are folded out of what readers do per token.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ...codec.codec import Codec
from ...codec.spec import HEAD_DIMS, CodecSpec
from .fit import F64, KeyWeights, UnknownForm, fit, warn_of_unknown

if TYPE_CHECKING:
    import torch


_known: WeakKeyDictionary[Any, dict[int, KeyWeights | str]] = WeakKeyDictionary()
_codecs: WeakKeyDictionary[Any, dict[tuple[CodecSpec, int], Codec]] = WeakKeyDictionary()


def key_weights(model: torch.nn.Module) -> dict[int, KeyWeights | str]:
    """By layer number what the weights of a transformers model say, or why nothing can be said.

    Read once per model: after a change of its weights the codecs stay right, only less well fitted.
    """
    if model not in _known:
        found: dict[int, KeyWeights | str] = {}
        for layer in model.modules():
            attention = getattr(layer, "self_attn", None)
            number = getattr(attention, "layer_idx", None)
            if number is not None:
                try:
                    found[number] = _read(attention, getattr(layer, "input_layernorm", None))
                except UnknownForm as reason:
                    found[number] = str(reason)
        warn_of_unknown(found)
        _known[model] = found
    return _known[model]


def weight_codecs(model: torch.nn.Module, spec: CodecSpec, layers: Iterable[int]) -> dict[int, Codec]:
    """Codecs fitted to a model's weights, for those of the layers where that is possible; made once per model and
    spec."""
    if spec.rotation != "hadamard":
        return {}
    known, made = key_weights(model), _codecs.setdefault(model, {})
    out = {}
    for layer in layers:
        weights = known.get(layer)
        if isinstance(weights, KeyWeights):
            if (spec, layer) not in made:
                made[spec, layer] = weights.codec(spec)
            out[layer] = made[spec, layer]
    return out


def _read(attention: Any, norm: Any) -> KeyWeights:
    q, k, head_dim = _projections(attention)
    if getattr(attention, "v_head_dim", head_dim) != head_dim:
        raise UnknownForm("keys and values have heads of different widths")
    if head_dim not in HEAD_DIMS:
        raise UnknownForm(f"head_dim {head_dim} is not one of {HEAD_DIMS}")
    gain = _gain(norm, q[0].shape[1])
    pairs = _rope_pairs(attention, head_dim)
    c_q, c_k = (_energy(w, bias, gain, head_dim) for w, bias in (q, (k[0], None)))
    own = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    q_gain, k_gain = (None if n is None else _gain(n, head_dim) for n in own)
    return fit(c_q, c_k, pairs, q_gain, k_gain)


def _projections(attention: Any) -> tuple[tuple[Any, Any], tuple[Any, Any], int]:
    """Weight and bias of the query and of the key projection, and head_dim."""
    head_dim = getattr(attention, "head_dim", None)
    fused = getattr(attention, "qkv_proj", None)
    if not isinstance(head_dim, int):
        raise UnknownForm(f"{type(attention).__name__} names no head_dim")
    if fused is not None:
        config = getattr(attention, "config", None)
        if config is None:
            raise UnknownForm(f"{type(attention).__name__} names no config")
        heads, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        weight, bias = _matrix(fused)
        if weight.shape[0] != heads + 2 * kv:
            raise UnknownForm(f"{type(attention).__name__}.qkv_proj has {weight.shape[0]} rows, not {heads + 2 * kv}")
        cut = (slice(0, heads), slice(heads, heads + kv))
        q, k = ((weight[s], None if bias is None else bias[s]) for s in cut)
        return q, k, head_dim
    if getattr(attention, "q_proj", None) is None or getattr(attention, "k_proj", None) is None:
        raise UnknownForm(f"{type(attention).__name__} has no q_proj and k_proj")
    q, k = _matrix(attention.q_proj), _matrix(attention.k_proj)
    if any(w.shape[0] % head_dim for w, _ in (q, k)) or q[0].shape[0] % k[0].shape[0]:
        raise UnknownForm(f"{type(attention).__name__} projects to {q[0].shape[0]} and {k[0].shape[0]} channels")
    return q, k, head_dim


def _matrix(linear: Any) -> tuple[Any, Any]:
    weight = getattr(linear, "weight", None)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
        raise UnknownForm(f"{type(linear).__name__} holds no plain weights")
    bias = getattr(linear, "bias", None)
    return _own(weight.detach()), None if bias is None else _own(bias.detach())


def _own(tensor: Any) -> Any:
    """This rank's heads, where tensor parallelism has dealt them out."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _energy(weight: Any, bias: Any, gain: F64, head_dim: int) -> F64:
    """Energy of each output channel for inputs of unit variance, [heads, head_dim]."""
    import torch

    # In float64, so that every device finds the same diagonals.
    where = weight.device if weight.device.type == "cuda" else "cpu"
    energy = weight.to(where, torch.float64).square() @ torch.from_numpy(gain**2).to(where)
    if bias is not None:
        energy = energy + bias.to(where, torch.float64).square()
    return energy.cpu().numpy().reshape(-1, head_dim)


def _gain(norm: Any, dim: int) -> F64:
    """What a norm multiplies each of `dim` channels with; ones without a norm."""
    import torch

    if norm is None:
        return np.ones(dim)
    weight = getattr(norm, "weight", None)
    if weight is None or weight.shape != (dim,) or weight.is_meta:
        raise UnknownForm(f"{type(norm).__name__} has no gain of {dim} channels")
    # Of mean 0 and unit variance: norms only apply their gain, however the model stores it, and perhaps a bias.
    probe = torch.ones_like(weight)
    probe[::2] = -1
    with torch.no_grad():
        gain = (norm(probe) - norm(-probe)) / 2 * probe
    return gain.double().cpu().numpy()


def _rope_pairs(attention: Any, head_dim: int) -> NDArray[np.intp]:
    """[2, head_dim]: every channel, and the one that RoPE turns it into (itself if none)."""
    import torch

    config = getattr(attention, "config", None)
    rope = getattr(config, "rope_parameters", None) or {}
    part = getattr(config, "partial_rotary_factor", None) or (
        rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    )
    rotated = int(head_dim * (part or 1.0))
    rotate_half = getattr(sys.modules[type(attention).__module__], "rotate_half", None)
    if rotate_half is None or rotated % 2:
        raise UnknownForm(f"{type(attention).__module__} has no rotate_half to read RoPE's pairs from")
    partner = np.arange(head_dim)
    partner[:rotated] = np.abs(rotate_half(torch.arange(1, rotated + 1)[None])[0].numpy()) - 1
    if (partner[partner] != np.arange(head_dim)).any():
        raise UnknownForm(f"{type(attention).__module__}.rotate_half does not swap pairs")
    return np.stack([np.arange(head_dim), partner])
