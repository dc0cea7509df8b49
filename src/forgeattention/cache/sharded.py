"""Context parallelism: the pages of one very long sequence, dealt out over processes.

Page p of a row lies on rank p mod world. Every rank attends to its own pages, rank 0 also to the exact tokens, and one
all-gather of (o, log-sum-exp) per layer joins the parts in rank order, so that every rank has the same result, bit for
bit that of one process that merges the same parts (`ops.merge`; Milakov and Gimelshein, arXiv 1805.02867).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..ops.arrays import is_torch
from ..ops.table import PageTable

if TYPE_CHECKING:
    from .layer import LayerCache

I64 = NDArray[np.int64]
Part = tuple[Any, Any]


def merge_parts(parts: Sequence[Part]) -> Part:
    """Attention over the union of disjoint sets of tokens, merged in order.

    Args:
        parts: (o [..., head_dim], natural log-sum-exp [...]) of each set.
    """
    o, lse = parts[0]
    for part in parts[1:]:
        o, lse = ops.merge(o, lse, *part)
    return o, lse


def merge_ranks(o: Any, lse: Any, group: Any = None) -> Part:
    """Every rank's part of an attention, merged in rank order with one all-gather.

    Args:
        o: float32 [..., head_dim], torch or MLX, of one shape on all ranks.
        lse: float32 [...], natural log-sum-exp; -inf where a rank attends to nothing.
        group: a torch.distributed process group or an mx.distributed group; None for all ranks.

    Raises:
        RuntimeError: with gloo, a rank that is gone, or that sends nothing within the group's timeout. The group
            is then of no more use. With NCCL torch's watchdog ends the process.
    """
    if is_torch(o):
        import torch
        from torch import distributed

        mine = torch.cat([o, lse[..., None]], -1).contiguous()
        every = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
        try:
            distributed.all_gather(every, mine, group=group)
        except RuntimeError as error:
            raise RuntimeError(
                f"[context_parallel] expected a part of every one of {len(every)} ranks; rank "
                f"{distributed.get_rank(group)} got {error}"
            ) from error
        return merge_parts([(x[..., :-1].contiguous(), x[..., -1].contiguous()) for x in every])
    mx = sys.modules["mlx.core"]
    mine = mx.concatenate([o, lse[..., None]], -1)
    ranks = mx.distributed.all_gather(mine[None], group=group)
    return merge_parts([(ranks[i][..., :-1], ranks[i][..., -1]) for i in range(ranks.shape[0])])


class Sharding:
    """One rank's part in a layer's cache of one very long row: its share of the pages, and all exact tokens.

    Given to `LayerCache` (or `ForgeCache`) as `sharding`. Every rank appends the same tokens and attends with the same
    queries at the same time.

    Args:
        group: as for `merge_ranks`; torch only.
    """

    def __init__(self, group: Any = None) -> None:
        from torch import distributed

        self.group = group
        self.rank, self.world = distributed.get_rank(group), distributed.get_world_size(group)

    def check_rows(self, rows: I64 | None, batch: int) -> None:
        if batch != 1 or (rows is not None and len(rows) != 1):
            raise ValueError(f"[context_parallel] expected one row; got {batch if rows is None else rows.tolist()}")

    def keeps(self, first: int, count: int) -> NDArray[np.bool_]:
        return (first + np.arange(count)) % self.world == self.rank

    def check_trim(self, drop: int, recent: int, pages: int) -> None:
        if pages and not 0 <= drop <= recent:
            raise ValueError(f"[context_parallel] expected to trim at most {recent} recent tokens; got {drop}")

    def attend(self, cache: LayerCache, q: Any, scale: float, causal: bool, sink_logits: Any) -> Part:
        first = self.rank == 0
        o, lse = ops.decode_attention(
            q,
            cache.codec,
            cache.table,
            cache.exact if first else None,
            scale,
            causal=causal and first,
            sink_logits=sink_logits if first else None,
            backend=cache.backend,
        )
        o, lse = merge_ranks(o.float(), lse, self.group)
        return o.to(q.dtype), lse

    def attend_packed(self, cache: LayerCache, q: Any, table: PageTable | None, scale: float) -> Part | None:
        if not cache.rows.pages_seen(0):
            return None
        if table is None:
            empty = q.float() * 0
            part = empty, empty[..., 0] - np.inf
        else:
            part = ops.prefill_attention(q, cache.codec, table, scale, backend=cache.backend)
        return merge_ranks(part[0].float(), part[1], self.group)
