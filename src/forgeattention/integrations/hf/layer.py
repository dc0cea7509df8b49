"""Packed layers of a transformers cache."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import CacheLayerMixin

from ...cache import LayerCache, PendingTokens
from ...cache.read import read_tokens
from ...cache.steps import StaticSteps
from ...codec import Codec
from ...codec.spec import stored_head_dim
from ...eviction import Evictor
from ...sparse import SparseLayer

if TYPE_CHECKING:
    from .cache import ForgeCache

Keep = NDArray[np.bool_]


class PackedLength(int):
    """A number of keys that tells the mask function which packed layer it was asked for."""

    layer: PackedLayer


class CodedLayer(CacheLayerMixin):
    """A layer of a `ForgeCache` whose tokens are in a `LayerCache`.

    Attributes:
        cache: the tokens, or None before the first update.
        seen: positions that transformers has seen, padding included.
        kv_heads, head_dims: heads, and channels of a head of keys and of values, as the model has them, or None before
            the first update; records may hold more channels (zeros).
        narrow: whether they do.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False
    sparse: SparseLayer | None = None
    steps: StaticSteps | None = None

    def __init__(self, owner: ForgeCache, codec: Codec | None = None, shared: bool = False) -> None:
        super().__init__()
        # Weak, so that a dropped cache gives its pages back at once and not at the next garbage collection.
        self._owner = weakref.ref(owner)
        self.codec = codec
        self.shared = shared
        self.cache: LayerCache | None = None
        self.kv_heads: int | None = None
        self.head_dims: tuple[int, int] | None = None
        self.narrow = False
        self.seen = 0
        # Runs of positions: a number where all rows have real tokens, else bool [batch, positions].
        self._runs: list[int | Keep] = []

    @property
    def owner(self) -> ForgeCache:
        owner = self._owner()
        assert owner is not None
        return owner

    @property
    def keys(self) -> torch.Tensor | None:
        """A tensor on the device "meta" with the shape that a stock layer's keys have; `read` gives real ones."""
        return self._shaped(0)

    @keys.setter
    def keys(self, value: None) -> None: ...

    @property
    def values(self) -> torch.Tensor | None:
        """Like `keys`."""
        return self._shaped(1)

    @values.setter
    def values(self, value: None) -> None: ...

    def _shaped(self, side: int) -> torch.Tensor | None:
        if self.cache is None or self.kv_heads is None or self.head_dims is None:
            return None
        shape = self.cache.batch, self.kv_heads, self.seen, self.head_dims[side]
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        k, v = key_states, value_states
        if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
            shapes = f"{list(k.shape)} and {list(v.shape)}"
            raise ValueError(f"[forge] expected keys and values [batch, kv_heads, tokens, head_dim]; got {shapes}")
        codec = self.codec_for(k.shape[1], k.shape[3], v.shape[3])
        options = self.owner.layer_options(self)
        self.cache = LayerCache.like(k, codec, max_pages=self.owner.max_pages, **options)
        self.kv_heads, self.head_dims = k.shape[1], (k.shape[3], v.shape[3])
        self.dtype, self.device = k.dtype, k.device
        self.is_initialized = True

    def codec_for(self, kv_heads: int, k_dim: int, v_dim: int) -> Codec:
        """The codec of heads of these widths.

        Raises:
            ValueError: widths that no record holds, a codec of other widths.
        """
        dim = stored_head_dim(k_dim, v_dim)
        codec = self.codec or self.owner.codec(dim, kv_heads)
        if codec.head_dim != dim:
            raise ValueError(
                f"[forge] expected a codec of {dim} channels for heads of {(k_dim, v_dim)}; got {codec.head_dim}"
            )
        self.narrow = (k_dim, v_dim) != (dim, dim)
        return codec

    def widened(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., channels] with zeros behind its channels, as wide as the records' heads."""
        assert self.cache is not None
        missing = self.cache.codec.head_dim - x.shape[-1]
        return torch.nn.functional.pad(x, (0, missing)) if missing > 0 else x

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

    def check_join(self, other: Any) -> None:
        """Raises what `join` would raise."""
        if self.cache is None or other.cache is None:
            raise ValueError("[cache.join] expected tokens in both caches; got an empty one")
        self.cache.check_join(other.cache)

    def join(self, other: Any) -> None:
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
        if not len(rows):
            self.reset()
        elif self.cache is not None:
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

    prefetch = offload

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens, [batch, kv_heads, tokens, channels], in the model's widths and new memory.

        Raises:
            ValueError: rows of different lengths.
        """
        if self.cache is None or self.kv_heads is None or self.head_dims is None:
            return torch.zeros(0), torch.zeros(0)
        held = self.cache.buffer.k
        shape = held.shape[0], held.shape[1], int(self.cache.rows.seen.max(initial=0)), held.shape[3]
        both = held.new_empty(shape), held.new_empty(shape)
        read_tokens(self.cache, *both)
        return self.as_the_model(*both)

    def as_the_model(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in the model's widths, of those in the records'."""
        assert self.head_dims is not None
        return (k[..., : self.head_dims[0]], v[..., : self.head_dims[1]]) if self.narrow else (k, v)

    def like(self, owner: ForgeCache) -> Any:
        """An empty layer of this kind of another owner."""
        return type(self)(owner, self.codec, self.shared)

    def fork(self, owner: ForgeCache, rows: list[int] | None) -> Any:
        """A layer of another owner with the given rows (None for all), which shares this one's pages."""
        other = self.like(owner)
        if self.cache is not None:
            other.cache = self.cache.fork(rows)
            other.kv_heads, other.head_dims = self.kv_heads, self.head_dims
            other.dtype, other.device = self.dtype, self.device
            other.narrow = self.narrow
            other.is_initialized = True
        other.seen = self.seen
        other._set_runs([r if isinstance(r, int) or rows is None else r[rows] for r in self._runs])
        return other

    def state(self) -> dict[str, Any]:
        """The positions, and what eviction remembers, as JSON holds them."""
        runs = [r if isinstance(r, int) else r.astype(int).tolist() for r in self._runs]
        eviction = self.cache.eviction if self.cache is not None else None
        return {
            "runs": runs,
            "kv_heads": self.kv_heads,
            "head_dims": self.head_dims,
            "eviction": eviction.state() if isinstance(eviction, Evictor) else None,
        }

    def restore(self, cache: LayerCache, state: dict[str, Any]) -> None:
        self.cache = cache
        self.dtype, self.device = cache.buffer.k.dtype, cache.buffer.k.device
        runs, (heads, (k_dim, v_dim)) = state["runs"], (state["kv_heads"], state["head_dims"])
        self.codec_for(heads, k_dim, v_dim)
        self.kv_heads, self.head_dims = heads, (k_dim, v_dim)
        if isinstance(cache.eviction, Evictor) and state["eviction"] is not None:
            cache.eviction.set_state(state["eviction"])
        self.is_initialized = True
        self._set_runs([r if isinstance(r, int) else np.array(r, np.bool_) for r in runs])
        self.seen = sum(r if isinstance(r, int) else r.shape[1] for r in self._runs)


class PackedLayer(CodedLayer):
    """A packed full-attention layer, whose attention reads the packed bits.

    Attributes:
        steps: while a decode graph runs or is captured, what takes the new tokens in place of `cache`.
    """

    def __init__(
        self,
        owner: ForgeCache,
        codec: Codec | None = None,
        shared: bool = False,
        sparse: SparseLayer | None = None,
    ) -> None:
        super().__init__(owner, codec, shared)
        self.sparse = sparse

    def like(self, owner: ForgeCache) -> PackedLayer:
        return PackedLayer(owner, self.codec, self.shared, self.sparse)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Takes keys and values [batch, kv_heads, n, head_dim]; gives the handle that the attention function "forge"
        reads."""
        if self.cache is None:
            self.lazy_initialization(key_states, value_states)
        k, v = key_states.detach(), value_states.detach()
        # Under autocast keys and values come in several dtypes; a stock cache keeps that of its first keys too.
        if k.dtype != self.dtype or v.dtype != self.dtype:
            k, v = k.to(self.dtype), v.to(self.dtype)
        if self.narrow:
            k, v = self.widened(k), self.widened(v)
        pending = PendingTokens(self, k, v)
        return pending, pending

    @property
    def target(self) -> LayerCache | StaticSteps:
        target = self.cache if self.steps is None else self.steps
        assert target is not None
        return target

    def real_tokens(self, tokens: PendingTokens, mask: Any, m: int) -> Keep | None:
        if mask is None and not (self.owner.mixed and self.padded):
            return None
        return self.owner.new_tokens(mask, self, tokens.k.shape[2], tokens.appended)

    def appended(self, tokens: PendingTokens, keep: Keep | None) -> None:
        if self.steps is None:  # replays of a graph are recorded one by one
            self.record(tokens.k.shape[2], keep)

    def abandoned(self, tokens: PendingTokens) -> None:
        """Nothing: positions count once the tokens are appended."""

    def attribute(self, tokens: PendingTokens, name: str) -> Any:
        if name == "to":  # layers that share keys ask for their device before they use them
            return partial(self._pending_to, tokens)
        raise ValueError(
            f"[forge] expected attn_implementation='forge' with a ForgeCache; got one reading .{name}: load the model "
            "with attn_implementation='forge', or call model.set_attn_implementation('forge')"
        )

    def _pending_to(self, tokens: PendingTokens, device: torch.device) -> PendingTokens:
        if torch.device(device) != tokens.k.device:
            raise ValueError(f"[forge] expected layers that share keys on one device, {tokens.k.device}; got {device}")
        return tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if not self.owner.all_packed:
            return self.seen + query_length, 0
        length = PackedLength(self.seen + query_length)
        length.layer = self
        return length, 0
