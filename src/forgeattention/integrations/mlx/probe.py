"""What each layer of an mlx-lm model hands to attention, found by one unevaluated pass through the model.

MLX evaluates nothing before it is asked to, so a pass over a few tokens costs no arithmetic and reads no weights: it
tells shapes, and whether the model leaves its keys to mlx-lm's attention, before a prompt is read.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import mlx.core as mx
from mlx_lm.models import cache as stock

from ...models.weights.mlx import LayerAttention

TOKENS = (2, 1)
"""Sizes of the calls of a probe: models take other paths for a prompt than for one token."""


class Refusal(ValueError):
    """A model that a packed cache cannot serve; the text says why."""


class ProbedStates:
    """What a probed cache gives in place of keys and values."""

    def __init__(self, cache: ProbedCache, k: mx.array, v: mx.array) -> None:
        self.cache = cache
        self.k = k
        self.v = v

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, _, dim = self.k.shape
        return batch, heads, self.cache.offset, dim

    @property
    def dtype(self) -> mx.Dtype:
        return self.k.dtype

    def astype(self, dtype: mx.Dtype) -> ProbedStates:
        """Itself: the packed layer computes in the queries' dtype."""
        return self

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Refusal(f"its attention reads .{name} of the cached keys")

    def attend(self, q: mx.array, mask: Any, scale: float, sinks: Any) -> mx.array:
        """Zeros of the output's shape; notes the layer's heads."""
        batch, q_heads, n, _ = q.shape
        _, kv_heads, _, k_dim = self.k.shape
        if q.shape[3] != k_dim or q_heads % kv_heads:
            raise Refusal(f"its queries {q.shape} do not fit its keys {self.k.shape}")
        if mask is None and n > 1:
            raise Refusal("its attention is not causal")
        if self.cache.found is None:
            name = str(q.dtype).rpartition(".")[2]
            module = self.cache.module
            self.cache.found = LayerAttention(q_heads, kv_heads, k_dim, self.v.shape[3], name, module)
        return mx.zeros((batch, q_heads, n, self.v.shape[3]), q.dtype)


class ProbedCache(stock.KVCache):
    """Stands in for a KVCache during a probe and keeps nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: LayerAttention | None = None
        self.module: Any = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        # Nothing else ties a cache to a layer: some models have fewer caches than layers.
        self.module = sys._getframe(1).f_locals.get("self")
        self.offset += keys.shape[2]
        self._states = ProbedStates(self, keys, values)
        return self._states, self._states

    def keys_and_values(self) -> tuple[Any, Any]:
        return self._states, self._states


_probed: dict[int, dict[tuple[int, int], LayerAttention] | str] = {}  # by identity, since MLX's modules are dicts


def probe(
    model: Any, make: Callable[[Any], Sequence[Any]], packs: Callable[[Any], bool]
) -> dict[tuple[int, int], LayerAttention]:
    """The full-attention layers of a model; found once per model. mlx-lm must be patched.

    Args:
        model: mlx-lm's model.
        make: mlx-lm's own make_prompt_cache.
        packs: whether a layer of what `make` gives has a cache of keys and values that could be packed.

    Returns:
        By (position in the prompt cache, position in a CacheList or 0): every cache that attention was called with.

    Raises:
        ValueError: the model computes with its keys itself.
    """
    if id(model) not in _probed:
        try:
            _probed[id(model)] = _probe(model, make, packs)
        except Refusal as reason:
            _probed[id(model)] = str(reason)
        weakref.finalize(model, _probed.pop, id(model), None)
    found = _probed[id(model)]
    if isinstance(found, str):
        kind = getattr(getattr(model, "args", None), "model_type", None) or type(model).__module__.rpartition(".")[2]
        raise ValueError(f"[mlx_lm] expected a model that leaves its keys to mlx-lm's attention; got {kind}: {found}")
    return found


def _probe(
    model: Any, make: Callable[[Any], Sequence[Any]], packs: Callable[[Any], bool]
) -> dict[tuple[int, int], LayerAttention]:
    layers, probed = [], {}
    for i, layer in enumerate(make(model)):
        if packs(layer):
            parts = list(getattr(layer, "caches", [layer]))
            for j, part in enumerate(parts):
                if type(part) is stock.KVCache:
                    parts[j] = probed[i, j] = ProbedCache()
            layer = stock.CacheList(*parts) if hasattr(layer, "caches") else parts[0]
        layers.append(layer)
    if not probed:
        return {}
    try:
        for n in TOKENS:
            model(mx.zeros((1, n), dtype=mx.int32), cache=layers)
    except Refusal:
        raise
    except Exception as error:
        # Not an array, the handle breaks whatever computes with it.
        cause = str(error).partition("\n")[0].partition(". The following")[0]
        raise Refusal(f"its attention computes with the cached keys itself ({cause})") from error
    return {at: cache.found for at, cache in probed.items() if cache.found is not None}
