"""A layer whose pages are packed and whose model reads decoded keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...cache import LayerCache
from ...cache.read import read_tokens
from ...cache.tiles import Tiles
from ...codec import Codec
from ...codec.spec import stored_head_dim
from .attention import without_gradient
from .layer import CodedLayer

if TYPE_CHECKING:
    from .cache import ForgeCache


class Scratch:
    """Memory that the layers of a cache decode into one after the other, on each device for each dtype."""

    def __init__(self) -> None:
        self._flat: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in self._flat.values())

    def pair(self, shape: tuple[int, ...], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two tensors of a shape, which hold until the next call."""
        key, count = (like.device, like.dtype), torch.Size(shape).numel()
        flat = self._flat.get(key)
        if flat is None or len(flat) < 2 * count:
            self._flat.pop(key, None)  # before the new one is there, so that both never are
            with torch.inference_mode(False):
                flat = torch.empty(2 * count * 9 // 8, dtype=like.dtype, device=like.device)
            self._flat[key] = flat
        return flat[:count].view(shape), flat[count : 2 * count].view(shape)

    def clear(self) -> None:
        self._flat.clear()


class DecodedLayer(CodedLayer):
    """A packed layer of a model that computes attention in its own way, or with scores that no kernel computes.

    `update` gives keys and values as a stock cache does: those of packed tokens decoded anew at every call, into memory
    that all such layers share, the others as they came. They hold until another layer is updated. The tokens of a
    chunk see each other exactly and are packed afterwards.

    Args:
        given: whether the codec is the caller's own choice; one that was fitted is left out where it does not fit.

    Attributes:
        tiles: how keys and values lie in records of another width; None where records are as wide as heads.
    """

    def __init__(
        self, owner: ForgeCache, codec: Codec | None = None, shared: bool = False, given: bool = False
    ) -> None:
        super().__init__(owner, codec, shared)
        self.given = given
        self.tiles: Tiles | None = None

    def like(self, owner: ForgeCache) -> DecodedLayer:
        other = DecodedLayer(owner, self.codec, self.shared, self.given)
        other.tiles = self.tiles
        return other

    def codec_for(self, kv_heads: int, k_dim: int, v_dim: int) -> Codec:
        self.narrow, spec = False, self.owner.spec
        codec = self.codec
        if codec is not None and (codec.kv_heads, codec.head_dim) == (kv_heads, k_dim) and k_dim == v_dim:
            self.tiles = None
            return codec
        if codec is not None and self.given:
            raise ValueError(
                f"[forge] expected a codec of {kv_heads} heads of {k_dim} and {v_dim} channels; got one of "
                f"{codec.kv_heads} of {codec.head_dim}"
            )
        tiles = Tiles.smallest(spec, kv_heads, k_dim, v_dim)
        self.tiles = tiles
        if k_dim == v_dim:
            try:
                dim = stored_head_dim(k_dim, v_dim)
            except ValueError:
                dim = 0
            if dim and kv_heads * spec.page_format(dim).record_bytes <= tiles.page_bytes(spec):
                self.tiles, self.narrow = None, dim != k_dim
                return self.owner.codec(dim, kv_heads)
        return self.owner.codec(tiles.width, tiles.records)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Takes keys and values [batch, kv_heads, n, channels]; gives those of all tokens so far."""
        if self.cache is None:
            self.lazy_initialization(key_states, value_states)
        cache, n, past = self.cache, key_states.shape[2], self.seen
        assert cache is not None
        k, v = (self._coded(x) for x in (key_states, value_states))
        if self.tiles is not None:
            k, v = self.tiles.pack(k, v)
        elif self.narrow:
            k, v = self.widened(k), self.widened(v)
        if not past:
            cache.append(k, v)
            found = key_states, value_states
        elif cache.is_step(n):
            cache.append(k, v)
            found = self._all(cache, past + n)
        else:
            confirm = cache.check(k, v)
            found = self._all(cache, past + n, k, v)
            cache.append(k, v, None, confirm)
        self.record(n, None)
        if past and torch.is_grad_enabled() and key_states.requires_grad:
            return without_gradient(found[0], key_states), without_gradient(found[1], key_states)
        return found

    def _coded(self, x: torch.Tensor) -> torch.Tensor:
        """New keys or values in the cache's dtype, as encoders read them."""
        x = x.detach().to(self.dtype)
        return x if x.stride(-1) == 1 else x.contiguous()

    def _all(
        self, cache: LayerCache, total: int, k: torch.Tensor | None = None, v: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens of the cache and, behind them, of the given ones, `total` in all."""
        held = cache.buffer.k
        shape = held.shape[0], held.shape[1], total, held.shape[3]
        # Shared keys are read after other layers' updates, and those that a gradient goes through after the forward.
        if self.shared or torch.is_grad_enabled():
            both = held.new_empty(shape), held.new_empty(shape)
        else:
            both = self.owner.scratch.pair(shape, held)
        past = read_tokens(cache, *both)
        for to, new in zip(both, (k, v)):
            if new is not None:
                to[:, :, past:] = new
        return self.as_the_model(*both)

    def as_the_model(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().as_the_model(k, v) if self.tiles is None else self.tiles.unpack(k, v)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def check_join(self, other: Any) -> None:
        super().check_join(other)
        if self.seen != other.seen:
            raise ValueError(
                f"[cache.join] expected {self.seen} positions, since layers read by decoding know no padding; got "
                f"{other.seen}"
            )
