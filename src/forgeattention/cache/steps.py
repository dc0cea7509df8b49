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
        rows, buffer = cache.rows, cache.buffer
        self.max_tokens = rows.page_table.shape[1] * PAGE
        self._table = PageTable(cache.pool.base, rows.page_table, rows.device_packed, self.max_tokens)
        self._exact = ExactTokens(buffer.k, buffer.v, rows.device_exact, buffer.capacity)

    @property
    def current(self) -> bool:
        """Whether the cache still has the buffers that these steps use; rows that came or went replace them."""
        rows, buffer, table, exact = self._cache.rows, self._cache.buffer, self._table, self._exact
        pairs = ((rows.page_table, table.offsets), (rows.device_packed, table.lengths), (buffer.k, exact.k))
        return all(a is b for a, b in pairs)

    def make_room(self) -> None:
        """Packs what must leave the window before one more token.

        Raises:
            ValueError: a row with more than `max_tokens` packed tokens; a full pool.
        """
        cache = self._cache
        if cache.rows.most_exact + 1 < cache.buffer.capacity:
            return
        if cache.rows.most_packed + PAGE > self.max_tokens:
            raise ValueError(f"[static_steps] expected at most {self.max_tokens} packed tokens of a row; got more")
        cache.make_room(1)

    def is_step(self, n: int, keep: Any = None) -> bool:
        """Whether n new tokens are one step, as `LayerCache.is_step`: one token of every row is all that comes here."""
        return True

    def fork(self) -> LayerCache:
        """Never asked for: a step attends to what is held after it."""
        raise ValueError("[static_steps] expected a step of one token; got a chunk")

    def step(self, q: Any, k: Any, v: Any, scale: float, *, keep: Any = None, sink_logits: Any | None = None) -> Any:
        """Appends a token k, v [batch, kv_heads, 1, head_dim] to every row and attends, as `LayerCache.step`."""
        exact = self._exact
        ops.append_tokens(exact.k, exact.v, exact.lengths, k, v, backend=self._cache.backend)
        return self.attend(q, scale, sink_logits=sink_logits)[0]

    def attend(self, q: Any, scale: float, *, causal: bool = False, sink_logits: Any = None) -> tuple[Any, Any]:
        """Attention of q [batch, q_heads, 1, head_dim] over all that the device's lengths say."""
        cache = self._cache
        options: dict[str, Any] = {"causal": False, "sink_logits": sink_logits, "backend": cache.backend}
        return ops.decode_attention(q, cache.codec, self._table, self._exact, scale, **options)

    def advance(self) -> None:
        """Takes note of a token that the device has appended."""
        rows = self._cache.rows
        rows.note(rows.exact + 1, rows.packed, rows.seen + 1)

    def rewind(self) -> None:
        """Makes the device forget what was appended and not noted."""
        rows = self._cache.rows
        rows.set_lengths(rows.exact, rows.packed, rows.seen)
