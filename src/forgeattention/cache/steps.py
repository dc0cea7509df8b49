"""One-token steps whose launches never change, so that a CUDA graph of them can be replayed."""

from __future__ import annotations

from typing import Any

from .. import ops
from ..codec import PAGE
from ..ops.table import ExactTokens, PageTable
from .layer import LayerCache


class StaticSteps:
    """Steps of a `LayerCache` that read and write its lengths on the device alone.

    Each step is `make_room` on the host, then `append` and `attend` (which a graph may hold), then `advance` on the
    host. What the cache holds afterwards is what `LayerCache.append` and `attend` would have left.

    Args:
        cache: its page table is widened to `max_tokens`; no pages are taken for them yet.
        max_tokens: most packed tokens of a row.

    Raises:
        ValueError: a framework whose arrays have no addresses.
    """

    def __init__(self, cache: LayerCache, max_tokens: int) -> None:
        if not cache.arrays.addressable:
            raise ValueError("[static_steps] expected arrays with addresses; got a framework that moves them")
        self._cache = cache
        cache.reserve(max_tokens)
        width = cache._offsets.shape[1]
        self.max_tokens = width * PAGE
        self._table = PageTable(cache.pool.base, cache._offsets, cache._packed_device, self.max_tokens)
        self._exact = ExactTokens(cache._k, cache._v, cache._exact_device, cache._k.shape[2])

    @property
    def current(self) -> bool:
        """Whether the cache still has the buffers that these steps use; rows that came or went replace them."""
        cache, table, exact = self._cache, self._table, self._exact
        pairs = ((cache._offsets, table.offsets), (cache._packed_device, table.lengths), (cache._k, exact.k))
        return all(a is b for a, b in pairs)

    def make_room(self) -> None:
        """Packs what must leave the window before one more token.

        Raises:
            ValueError: a row with more than `max_tokens` packed tokens; a full pool.
        """
        cache = self._cache
        if cache._exact_max + 1 < cache.capacity:
            return
        if int(cache._packed.max()) + PAGE > self.max_tokens:
            raise ValueError(f"[static_steps] expected at most {self.max_tokens} packed tokens of a row; got more")
        cache.make_room(1)

    def append(self, k: Any, v: Any) -> None:
        """Adds a token k, v [batch, kv_heads, 1, head_dim] to every row, on the device."""
        cache = self._cache
        ops.append_tokens(cache._k, cache._v, cache._exact_device, k, v, backend=cache.backend)

    def attend(self, q: Any, scale: float, sink_logits: Any) -> Any:
        """Attention of q [batch, q_heads, 1, head_dim] over all that the device's lengths say."""
        cache = self._cache
        options: dict[str, Any] = {"causal": False, "sink_logits": sink_logits, "backend": cache.backend}
        return ops.decode_attention(q, cache.codec, self._table, self._exact, scale, **options)[0]

    def advance(self) -> None:
        """Takes note of a token that the device has appended."""
        self._cache.advance(1)

    def rewind(self) -> None:
        """Makes the device forget what was appended and not noted."""
        self._cache.advance(0)
