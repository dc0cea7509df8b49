"""A packed layer of a transformers cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import CacheLayerMixin

from ...cache import LayerCache
from ...cache.steps import StaticSteps
from ...codec import Codec
from ...eviction import EvictingCache
from ...sparse import SparseLayer
from . import attention as hf_attention

if TYPE_CHECKING:
    from .cache import ForgeCache

DECODE_TOKENS = 8
"""A step of at most so many tokens is one call of `ops.decode_attention`."""

Keep = NDArray[np.bool_]


class PackedLength(int):
    """A number of keys that tells the mask function which packed layer it was asked for."""

    layer: PackedLayer


class PackedStates:
    """What a packed layer's `update` gives in place of keys and values: tokens that the attention function will
    append."""

    def __init__(self, layer: PackedLayer, k: torch.Tensor, v: torch.Tensor) -> None:
        self.layer = layer
        self.k = k
        self.v = v
        self.appended = False
        self.past: LayerCache | None = None

    def __getattr__(self, name: str) -> NoReturn:
        raise ValueError(f"[forge] expected attn_implementation='forge' with a ForgeCache; got one reading .{name}")

    def to(self, device: torch.device) -> PackedStates:
        """What layers that share keys ask for before they use them."""
        if torch.device(device) != self.k.device:
            raise ValueError(f"[forge] expected layers that share keys on one device, {self.k.device}; got {device}")
        return self

    def attend(self, q: torch.Tensor, mask: Any, scale: float, sinks: torch.Tensor | None) -> torch.Tensor:
        """Attention of the new tokens over the whole sequence; the first call appends them.

        Args:
            q: [batch, q_heads, m, head_dim], the queries of the last m new tokens.
            mask: what `forge_mask` gave, or a mask that says the same.
            scale: softmax scale.
            sinks: extra logits [q_heads], or None.

        Returns:
            [batch, q_heads, m, head_dim] in q's dtype.
        """
        layer, n = self.layer, self.k.shape[2]
        cache = layer.cache
        assert cache is not None
        if layer.steps is not None:
            if not self.appended:
                layer.steps.append(self.k, self.v)
                self.appended = True
            return layer.steps.attend(q, scale, sinks)
        keep = layer.owner.new_tokens(mask, layer, n, self.appended)
        if not self.appended:
            cache.prepare(q, scale, n, keep)
        step = min(DECODE_TOKENS, cache.codec.spec.window)
        if keep is None and (n == 1 or (n <= step and (layer.seen or self.appended))) and self.past is None:
            self._append(keep)
            return cache.attend(q, scale, causal=q.shape[2] > 1, sink_logits=sinks)[0]
        # The device attends to the past while what was asked of the new values comes back.
        confirm = None if self.appended else cache.check(self.k, self.v, keep)
        # Layers that share these keys attend later, when the cache has moved on.
        past = self.past
        if past is None:
            past = cache.fork() if layer.shared else cache
        out = hf_attention.chunk(past, q, self.k, self.v, keep, scale, sinks)
        if layer.shared:
            self.past = past
        self._append(keep, confirm)
        return out

    def _append(self, keep: Keep | None, confirm: Callable[[], int] | None = None) -> None:
        if not self.appended:
            assert self.layer.cache is not None
            self.layer.cache.append(self.k, self.v, keep, confirm)
            self.layer.record(self.k.shape[2], keep)
            self.appended = True


class PackedLayer(CacheLayerMixin):
    """One packed full-attention layer of a `ForgeCache`.

    Attributes:
        cache: the tokens, or None before the first update.
        seen: positions that transformers has seen, padding included.
        steps: while a decode graph runs or is captured, what takes the new tokens in place of `cache`.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, owner: ForgeCache, codec: Codec | None = None, shared: bool = False) -> None:
        super().__init__()
        # Weak, so that a dropped cache gives its pages back at once and not at the next garbage collection.
        self._owner = weakref.ref(owner)
        self.codec = codec
        self.sparse: SparseLayer | None = None
        self.shared = shared
        self.cache: LayerCache | None = None
        self.steps: StaticSteps | None = None
        self.seen = 0
        # Runs of positions: a number where all rows have real tokens, else bool [batch, positions].
        self._runs: list[int | Keep] = []

    @property
    def owner(self) -> ForgeCache:
        owner = self._owner()
        assert owner is not None
        return owner

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        k, v = key_states, value_states
        if k.ndim != 4 or k.shape != v.shape:
            shapes = f"{list(k.shape)} and {list(v.shape)}"
            raise ValueError(f"[forge] expected keys and values of one 4-D shape; got {shapes}")
        codec = self.codec or self.owner.codec(k.shape[3], k.shape[1])
        limit, backend = self.owner.max_pages, self.owner.backend
        options = self.owner.evicting(self)
        make = self.owner.make_layer if options is None else partial(EvictingCache.like, **options)
        self.cache = make(k, codec, max_pages=limit, backend=backend)
        self.cache.sparse = self.sparse
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Takes keys and values [batch, kv_heads, n, head_dim]; gives the handle that the attention function "forge"
        reads."""
        if self.cache is None:
            self.lazy_initialization(key_states, value_states)
        states = PackedStates(self, key_states.detach(), value_states.detach())
        return states, states

    def record(self, n: int, keep: Keep | None) -> None:
        self.seen += n
        last = self._runs[-1] if self._runs else None
        if keep is not None:
            self._runs.append(keep)
        elif isinstance(last, int):
            self._runs[-1] = last + n
        else:
            self._runs.append(n)

    @property
    def padded(self) -> bool:
        """Whether any position of any row is padding."""
        return any(not isinstance(run, int) for run in self._runs)

    def _set_runs(self, runs: list[int | Keep]) -> None:
        self._runs = [len(r[0]) if not isinstance(r, int) and r.all() else r for r in runs]

    def real(self, start: int, stop: int) -> Keep:
        """Which of the positions start..stop hold real tokens, [batch, stop - start]."""
        batch = self.cache.batch if self.cache is not None else 0
        runs = [np.ones((batch, r), np.bool_) if isinstance(r, int) else r for r in self._runs]
        return np.concatenate([np.ones((batch, 0), np.bool_), *runs], 1)[:, start:stop]

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if not self.owner.all_packed:
            return self.seen + query_length, 0
        length = PackedLength(self.seen + query_length)
        length.layer = self
        return length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last positions; see `LayerCache.trim` for what a cut inside a page costs."""
        n = -int(tokens_to_remove)  # some versions of transformers give a tensor
        if not 0 <= n <= self.seen:
            raise ValueError(f"[forge.crop] expected minus 0 to {self.seen} positions; got {tokens_to_remove}")
        if n == 0 or self.cache is None:
            return
        self.cache.trim(self.real(self.seen - n, self.seen).sum(1))
        self.seen -= n
        while n:
            last = self._runs.pop()
            size = last if isinstance(last, int) else last.shape[1]
            if size > n:
                self._runs.append(last - n if isinstance(last, int) else last[:, :-n])
            n -= min(size, n)
        self._set_runs(self._runs)

    def check_join(self, other: PackedLayer) -> None:
        """Raises what `join` would raise."""
        if self.cache is None or other.cache is None:
            raise ValueError("[cache.join] expected tokens in both caches; got an empty one")
        self.cache.check_join(other.cache)

    def join(self, other: PackedLayer) -> None:
        assert self.cache is not None
        assert other.cache is not None
        seen = max(self.seen, other.seen)
        runs = [np.pad(layer.real(0, layer.seen), ((0, 0), (seen - layer.seen, 0))) for layer in (self, other)]
        self.cache.join(other.cache)
        self.seen = seen
        self._set_runs([np.concatenate(runs)])

    def reset(self) -> None:
        self.cache = None
        self.is_initialized = False
        self.seen = 0
        self._runs = []

    def select(self, rows: list[int]) -> None:
        if self.cache is not None:
            self.cache.select(rows)
            self._set_runs([r if isinstance(r, int) else r[rows] for r in self._runs])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            self.select(np.repeat(np.arange(self.cache.batch), repeats).tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.cache is not None:
            self.select(torch.arange(self.cache.batch)[indices.cpu()].tolist())

    def offload(self) -> NoReturn:
        raise ValueError("[forge] expected a cache that stays on its device; got offloading")

    def fork(self, owner: ForgeCache, rows: list[int] | None) -> PackedLayer:
        other = PackedLayer(owner, self.codec, self.shared)
        other.sparse = self.sparse
        if self.cache is not None:
            other.cache = self.cache.fork(rows)
            other.is_initialized = True
        other.seen = self.seen
        other._set_runs([r if isinstance(r, int) or rows is None else r[rows] for r in self._runs])
        return other

    def state(self) -> dict[str, Any]:
        """The positions, and what eviction remembers, as JSON holds them."""
        runs = [r if isinstance(r, int) else r.astype(int).tolist() for r in self._runs]
        return {"runs": runs, "eviction": self.cache.state() if isinstance(self.cache, EvictingCache) else None}

    def restore(self, cache: LayerCache, state: dict[str, Any]) -> None:
        self.cache = cache
        self.cache.sparse = self.sparse
        runs = state["runs"]
        if isinstance(cache, EvictingCache) and state["eviction"] is not None:
            cache.set_state(state["eviction"])
        self.is_initialized = True
        self._set_runs([r if isinstance(r, int) else np.array(r, np.bool_) for r in runs])
        self.seen = sum(r if isinstance(r, int) else r.shape[1] for r in self._runs)
