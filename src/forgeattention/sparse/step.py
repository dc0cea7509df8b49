"""A decode step of one layer that reads what matters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..codec import PAGE, Codec
from ..ops.arrays import from_numpy, to_numpy
from ..ops.table import ExactTokens, PageTable
from .pages import attend_pages
from .spec import SparseSpec

TILE = 4
"""Pages of a tile: the unit in which skipping is counted."""


@dataclass(frozen=True, eq=False)
class SparseStep:
    """What one step did, as arrays on the device; reading `statistics` waits for it.

    Attributes:
        codec: the layer's codec.
        tokens: packed tokens of each row, int32 [batch].
        kept: tokens attended by each query, int32 [batch, q_heads, n].
        dropped: their complement's share of the mass, float32 [batch, q_heads, n]; of a fast step an estimate.
        live: bool [batch, q_heads, n, pages], pages that each query needs.
        read: bool [batch, kv_heads, pages], pages whose values are read.
        fast: whether the keys of pages that are not read are not read either, but for their means.
    """

    codec: Codec
    tokens: Any
    kept: Any
    dropped: Any
    live: Any
    read: Any
    fast: bool

    def statistics(self) -> dict[str, float]:
        """Means over queries: `kept_tokens`, `dropped_mass` and its largest `dropped_mass_worst`; the shares
        `tiles_skipped` of 256-token tiles and `pages_skipped` of pages that a query head does not need, `pages_unread`
        that no head of a KV head needs; `bytes_read` of packed tokens and `bytes_dense`, what dense attention reads."""
        fmt, lengths = self.codec.format, to_numpy(self.tokens).astype(np.int64)
        pages = -(-lengths // PAGE)
        live, read = to_numpy(self.live), to_numpy(self.read)
        padded = np.pad(live, [(0, 0)] * 3 + [(0, -live.shape[-1] % TILE)])
        tiles: Any = padded.reshape(*live.shape[:3], -1, TILE).any(-1)
        queries = live.shape[1] * live.shape[2]
        total, total_tiles = int(pages.sum()), int((-(-pages // TILE)).sum())
        used = int(read.sum())
        tail = fmt.record_bytes if self.fast else fmt.record_bytes - fmt.v_offset
        ahead = fmt.padded_dim if self.fast else fmt.v_offset
        dropped = to_numpy(self.dropped)
        return {
            "kept_tokens": float(to_numpy(self.kept).mean()),
            "dropped_mass": float(dropped.mean()),
            "dropped_mass_worst": float(dropped.max()),
            "tiles_skipped": 1 - float(tiles.sum()) / (queries * total_tiles),
            "pages_skipped": 1 - float(live.sum()) / (queries * total),
            "pages_unread": 1 - used / (self.codec.kv_heads * total),
            "bytes_read": float(ahead * self.codec.kv_heads * total + tail * used),
            "bytes_dense": float(self.codec.page_bytes * total),
        }


@dataclass(eq=False)
class SparseLayer:
    """A spec bound to one layer of one model.

    Attributes:
        spec: the choices.
        budgets: int32 [q_heads] on the host for a spec with budgets, else None.
        log: None, or a list to which every step adds its `SparseStep.statistics`; then every step waits.
    """

    spec: SparseSpec
    budgets: NDArray[np.int32] | None = None
    log: list[dict[str, float]] | None = None
    _placed: dict[str, Any] = field(default_factory=dict)

    def attend(
        self,
        q: Any,
        codec: Codec,
        table: PageTable,
        exact: ExactTokens,
        scale: float,
        causal: bool,
        sink_logits: Any | None,
        backend: str,
    ) -> tuple[Any, Any, SparseStep]:
        """`ops.decode_attention` over the tokens that matter; also what was done."""
        if self.spec.fast:
            out, lse, step = self._fast(q, codec, table, exact, scale, causal, sink_logits, backend)
        else:
            out, lse, step = self._exact(q, codec, table, exact, scale, causal, sink_logits, backend)
        if self.log is not None:
            self.log.append(step.statistics())
        return out, lse, step

    def _exact(
        self,
        q: Any,
        codec: Codec,
        table: PageTable,
        exact: ExactTokens,
        scale: float,
        causal: bool,
        sinks: Any,
        backend: str,
    ) -> tuple[Any, Any, SparseStep]:
        other = ops.decode_attention(q, codec, None, exact, scale, causal=causal, sink_logits=sinks, backend=backend)
        scores = ops.sparse_scores(q, codec, table, scale, backend=backend)
        top_k = self.spec.top_k if self.budgets is None else self._budgets(scores.scores)
        threshold = ops.sparse_threshold(
            scores, table, top_k=top_k, top_p=self.spec.top_p, exact_lse=other[1], backend=backend
        )
        out, lse = ops.sparse_attention(scores, threshold, codec, table, other=other, backend=backend)
        live = scores.pages[..., 0] >= threshold.score[..., None]
        batch, _, _, pages = live.shape
        read = live.reshape(batch, codec.kv_heads, -1, pages).any(2)
        return out, lse, SparseStep(codec, table.lengths, threshold.kept, threshold.dropped, live, read, False)

    def _fast(
        self,
        q: Any,
        codec: Codec,
        table: PageTable,
        exact: ExactTokens,
        scale: float,
        causal: bool,
        sinks: Any,
        backend: str,
    ) -> tuple[Any, Any, SparseStep]:
        out, lse, read, dropped = attend_pages(q, codec, table, exact, scale, causal, sinks, self.spec, backend)
        batch, heads, n = q.shape[:3]
        group = heads // codec.kv_heads
        live = read[:, :, None, None].repeat(group, 2) if isinstance(read, np.ndarray) else None
        if live is None:
            live = read.repeat_interleave(group, 1)[:, :, None].expand(batch, heads, n, read.shape[2])
        else:
            live = np.broadcast_to(live, (batch, codec.kv_heads, group, n, read.shape[2]))
            live = live.reshape(batch, heads, n, -1)
        kept = live.sum(-1) * PAGE
        return out, lse, SparseStep(codec, table.lengths, kept, dropped, live, read, True)

    def _budgets(self, like: Any) -> Any:
        key = str(getattr(like, "device", "host"))
        if key not in self._placed:
            self._placed[key] = from_numpy(self.budgets, like, "int32")
        return self._placed[key]


def sparse_means(entries: list[dict[str, float]]) -> dict[str, float]:
    """Statistics of several layers or steps as one: bytes are added, worst cases kept, the rest averaged."""
    if not entries:
        return {}
    out = {}
    for name in entries[0]:
        values = [entry[name] for entry in entries]
        joined = sum(values) if name.startswith("bytes") else max(values) if name.endswith("worst") else np.mean(values)
        out[name] = float(joined)
    return out
