"""A decode step of one layer that reads what matters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..codec import PAGE, Codec
from ..ops.arrays import from_numpy, to_numpy
from ..ops.table import ExactTokens, PageTable, Threshold
from .pages import attend_pages, estimated_drop
from .spec import SparseSpec

TILE = 4
"""Pages of a tile: the unit in which skipping is counted."""


@dataclass(frozen=True, eq=False)
class SparseStep:
    """What one step did, as arrays on the device; reading `statistics` waits for it.

    Attributes:
        codec: the layer's codec.
        tokens: packed tokens of each row, int32 [batch].
        exact: of an exact step the pages' statistics (`ops.Scores.pages`) and the threshold, else None.
        fast: of a step by page means their scores, which pages were read, bool [batch, kv_heads, pages], and the
            log-sum-exp of what was attended; else None.
    """

    codec: Codec
    tokens: Any
    exact: tuple[Any, Threshold] | None = None
    fast: tuple[Any, Any, Any] | None = None

    def statistics(self) -> dict[str, float]:
        """Means over queries: `kept_tokens`, `dropped_mass` and its largest `dropped_mass_worst`; the shares
        `tiles_skipped` of 256-token tiles and `pages_skipped` of pages that a query head does not need, `pages_unread`
        that no head of a KV head needs; `bytes_read` of packed tokens and `bytes_dense`, what dense attention reads."""
        fmt, lengths = self.codec.format, to_numpy(self.tokens).astype(np.int64)
        pages = -(-lengths // PAGE)
        if self.exact is not None:
            stats, threshold = self.exact
            live = to_numpy(stats)[..., 0] >= to_numpy(threshold.score)[..., None]
            read = live.reshape(len(live), self.codec.kv_heads, -1, live.shape[-1]).any(2)
            dropped, kept = to_numpy(threshold.dropped), to_numpy(threshold.kept)
            ahead, tail = fmt.v_offset, fmt.record_bytes - fmt.v_offset
        else:
            assert self.fast is not None
            means, read, lse = (to_numpy(x) for x in self.fast)
            live = np.repeat(read, means.shape[1] // read.shape[1], 1)[:, :, None].repeat(means.shape[2], 2)
            dropped, kept = estimated_drop(means, read, lse), live.sum(-1) * PAGE
            ahead, tail = fmt.padded_dim, fmt.record_bytes
        padded = np.pad(live, [(0, 0)] * 3 + [(0, -live.shape[-1] % TILE)])
        tiles: Any = padded.reshape(*live.shape[:3], -1, TILE).any(-1)
        queries = live.shape[1] * live.shape[2]
        total, total_tiles = int(pages.sum()), int((-(-pages // TILE)).sum())
        used = int(read.sum())
        return {
            "kept_tokens": float(kept.mean()),
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

    @property
    def min_context(self) -> int:
        """Packed tokens of a row below which it is read whole."""
        return self.spec.min_context

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
        return out, lse, SparseStep(codec, table.lengths, exact=(scores.pages, threshold))

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
        out, lse, read, means = attend_pages(q, codec, table, exact, scale, causal, sinks, self.spec, backend)
        return out, lse, SparseStep(codec, table.lengths, fast=(means, read, lse))

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
