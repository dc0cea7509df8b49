"""Rotary position embedding: which channels turn together and how fast, as a model's config says."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]
C128 = NDArray[np.complex128]


@dataclass(frozen=True, eq=False)
class Rope:
    """The rotation of one kind of layer: at position p, pair f of the first `n_rot` channels turns by
    `frequencies[f] * p`; the other channels (partial RoPE) stay as they are.

    Attributes:
        frequencies: radians per position, [n_rot / 2].
        interleaved: pairs are channels (2 f, 2 f + 1); else (f, f + n_rot / 2), as in GPT-NeoX and Llama.
    """

    frequencies: F64
    interleaved: bool = False

    @property
    def n_rot(self) -> int:
        """Channels that are rotated."""
        return 2 * len(self.frequencies)

    def pairs(self, x: ArrayLike) -> C128:
        """The rotated channels of x [..., head_dim] as complex numbers [..., n_rot / 2]."""
        x64, half = np.asarray(x, np.float64), len(self.frequencies)
        if self.interleaved:
            return x64[..., 0 : 2 * half : 2] + 1j * x64[..., 1 : 2 * half : 2]
        return x64[..., :half] + 1j * x64[..., half : 2 * half]

    def channels(self, z: C128, head_dim: int) -> F64:
        """The inverse of `pairs`: [..., head_dim], zero where nothing is rotated."""
        out, half = np.zeros((*z.shape[:-1], head_dim)), len(self.frequencies)
        first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if self.interleaved else (
            slice(half), slice(half, 2 * half)
        )  # fmt: skip
        out[..., first], out[..., second] = z.real, z.imag
        return out

    def turn(self, positions: ArrayLike) -> C128:
        """e^(i frequency position), [..., n_rot / 2] for positions [...]."""
        return np.exp(1j * np.asarray(positions, np.float64)[..., None] * self.frequencies)


def rope_of(config: Any, head_dim: int | None = None) -> Rope:
    """The rotation of a model's full-attention layers.

    Args:
        config: of transformers (nested rope_parameters of several layer types included) or of mlx-lm.
        head_dim: where the config does not name it.

    Raises:
        ValueError: no rotary embedding, or a scaling whose frequencies depend on the sequence's length ("dynamic",
            "longrope").
    """
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    given = _parameters(config)
    theta = given.get("rope_theta") or getattr(config, "rope_theta", None)
    if theta is None:
        raise ValueError(f"[rope] expected a config with rope_theta; got {type(config).__name__}")
    dim = head_dim or getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    part = given.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    n_rot = int(dim * part)
    plain = float(theta) ** (-np.arange(0, n_rot, 2) / n_rot)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in _SCALED:
        raise ValueError(f"[rope] expected a rope_type of {sorted(_SCALED)}; got {kind!r}")
    return Rope(_SCALED[kind](plain, float(theta), n_rot, given, config), _interleaved(config))


def _parameters(config: Any) -> Mapping[str, Any]:
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(given, Mapping):
        given = vars(given)
    return given.get("full_attention", given)


def _interleaved(config: Any) -> bool:
    """transformers says it in the modelling file's rotate_half, mlx-lm in its config."""
    for name in ("rope_traditional", "rope_interleave"):
        value = getattr(config, name, None)
        if value is not None:
            return bool(value)
    where = type(config).__module__
    if not where.startswith("transformers."):
        return False
    module = importlib.import_module(where.replace(".configuration_", ".modeling_"))
    rotate_half = getattr(module, "rotate_half", None)
    if rotate_half is None:
        raise ValueError(f"[rope] expected a model with rotate_half; got {module.__name__} without")
    import torch

    return bool(rotate_half(torch.tensor([0.0, 1.0, 2.0, 3.0]))[0] == -1.0)


def _linear(plain: F64, theta: float, n_rot: int, given: Mapping[str, Any], config: Any) -> F64:
    return plain / float(given["factor"])


def _llama3(plain: F64, theta: float, n_rot: int, given: Mapping[str, Any], config: Any) -> F64:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, those between interpolated."""
    factor, low, high = (float(given[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = float(given["original_max_position_embeddings"]) * plain / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return plain * ((1 - smooth) / factor + smooth)


def _yarn(plain: F64, theta: float, n_rot: int, given: Mapping[str, Any], config: Any) -> F64:
    """YaRN (arXiv 2309.00071): a ramp between channels that turn `beta_fast` and `beta_slow` times in the original
    context. Its attention factor scales all scores alike and is no matter here."""
    original = float(given["original_max_position_embeddings"])
    factor = float(given.get("factor") or config.max_position_embeddings / original)

    def channel(turns: float) -> float:
        return n_rot * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(given.get("beta_fast") or 32), channel(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n_rot - 1)
    ramp = np.clip((np.arange(n_rot // 2) - low) / (high - low or 0.001), 0, 1)
    return plain * (ramp / factor + 1 - ramp)


_SCALED = {
    "default": lambda plain, *rest: plain,
    "mrope": lambda plain, *rest: plain,  # text alone has one position for all sections
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
