"""Context parallelism: the pages of one very long sequence, dealt out over processes.

Page p of a row lies on rank p mod world. Every rank attends to its own pages, rank 0 also to the exact tokens, and one
all-gather of (o, log-sum-exp) per layer joins the parts in rank order, so that every rank has the same result, bit for
bit that of one process that merges the same parts (`ops.merge`; Milakov and Gimelshein, arXiv 1805.02867).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from .. import ops
from ..codec import PAGE
from ..ops.arrays import is_torch
from . import LayerCache

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


class ShardedCache(LayerCache):
    """One rank's share of one layer's cache: its pages, and all exact tokens. Batches of one row.

    Every rank appends the same tokens and attends with the same queries at the same time.

    Args:
        group: as for `merge_ranks`; torch only.
        codec, arrays, dtype, options: as for `LayerCache`.
    """

    def __init__(
        self, codec: Any, batch: int, arrays: Any, dtype: str = "float32", *, group: Any = None, **options: Any
    ) -> None:
        from torch import distributed

        if batch != 1:
            raise ValueError(f"[context_parallel] expected one row; got {batch}")
        self.group = group
        self.rank, self.world = distributed.get_rank(group), distributed.get_world_size(group)
        self.pages_dealt = 0
        super().__init__(codec, batch, arrays, dtype, **options)

    @property
    def lengths(self) -> Any:
        return self._exact + PAGE * self.pages_dealt

    def attend(self, q: Any, scale: float, *, causal: bool = True, sink_logits: Any = None) -> Part:
        first = self.rank == 0
        o, lse = ops.decode_attention(
            q,
            self.codec,
            self.table,
            self.exact if first else None,
            scale,
            causal=causal and first,
            sink_logits=sink_logits if first else None,
            backend=self.backend,
        )
        o, lse = merge_ranks(o.float(), lse, self.group)
        return o.to(q.dtype), lse

    def attend_packed(self, q: Any, table: Any, scale: float) -> Part | None:
        if not self.pages_dealt:
            return None
        part = super().attend_packed(q, table, scale)
        if part is None:
            empty = q.float() * 0
            part = empty, empty[..., 0] - np.inf
        return merge_ranks(part[0].float(), part[1], self.group)

    def _commit(self, plans: Any) -> None:
        super()._commit(plans)
        new = plans[0].pages
        if not len(new):
            return
        mine = (self.pages_dealt + np.arange(len(new))) % self.world == self.rank
        held = int(self._packed[0]) // PAGE - len(new)
        kept = np.concatenate([self._ids[0, :held], new[mine]])
        self.pool.free(new[~mine])
        self.pages_dealt += len(new)
        self._starts[0, : len(kept)] = np.append(self._starts[0, :held], self._starts[0, held : held + len(new)][mine])
        self._ids[0, : len(kept)] = kept
        self.arrays.assign(self._offsets, self.pool.addresses(kept), (0, slice(len(kept))))
        self._set_lengths(self._exact, np.array([PAGE * len(kept)]), self._seen)

    def trim(self, n: Any) -> None:
        recent = max(int(self._exact[0]) - self.codec.spec.sinks, 0)
        drop = int(np.asarray(n).reshape(-1)[0])
        if self.pages_dealt and not 0 <= drop <= recent:
            raise ValueError(f"[context_parallel] expected to trim at most {recent} recent tokens; got {drop}")
        super().trim(n)

    def _refuse(self, *args: Any, **options: Any) -> NoReturn:
        raise ValueError("[context_parallel] expected a cache of one row that stays whole; got select, fork or join")

    select = fork = join = _refuse
