"""Sparse attention on CUDA: the kernels sparse_scores, sparse_threshold and sparse_attention on torch tensors."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...codec.codec import Codec
from ...codec.spec import PAGE
from ...ops.arrays import dtype_of
from ...ops.table import PageTable, Scores, Threshold
from . import nvrtc, params, plans
from .launch import address, constants_of, counters, current_stream, limits, on_device, partials, table_members

_pack_select = params.PAGE_SELECT.packer()
_pack_threshold = params.SPARSE_THRESHOLD.packer()


class _Launch:
    """What the launches of sparse_scores, page_scores or sparse_attention of one kind have in common.

    Args:
        stem: the kernel's.
        codec: the layer's codec.
        queries: of a KV head.
        dtype: of the queries, or of the result.
        device: of the launches.
        fixed: further members of Params that do not change.
    """

    def __init__(self, stem: str, codec: Codec, queries: int, dtype: str, device: Any, **fixed: float) -> None:
        constants, side = constants_of(codec, device), int(stem == "sparse_attention")
        if stem == "page_scores":
            macros, shared = plans.page_scores_macros(codec, dtype), 0
            self.query_tiles = -(-queries // 8)
        else:
            self.plan = plans.sparse_plan(codec.format, codec.kv_heads, queries, limits(device.index), not side)
            macros, shared = self.plan.macros(codec, dtype), self.plan.shared_bytes
            self.query_tiles = self.plan.query_tiles
            fixed["unit"] = constants.units[side]
        self.kernel = nvrtc.kernel(stem, macros, device.index, shared)
        self.pack = params.STRUCTS[stem].packer(
            transform=constants.attend[side],
            kv_heads=codec.kv_heads,
            queries=queries,
            query_tiles=self.query_tiles,
            **fixed,
        )


def _of_queries(stem: str, codec: Codec, q: Any) -> _Launch:
    """The launch for queries q [batch, q_heads, n, head_dim]."""
    group, n = q.shape[1] // codec.kv_heads, q.shape[2]

    def make() -> _Launch:
        return _Launch(stem, codec, group * n, dtype_of(q), q.device, group=group, n=n)

    return constants_of(codec, q.device).launch((stem, group, n, q.dtype), make)


def sparse_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Scores:
    batch, q_heads, n, _ = q.shape
    device, pages = q.device, -(-table.max_length // PAGE)
    q = q if q.stride(-1) == 1 else q.contiguous()
    scores = torch.empty((batch, q_heads, n, pages * PAGE), dtype=torch.float32, device=device)
    stats = torch.empty((batch, q_heads, n, pages, 2), dtype=torch.float32, device=device)
    if scores.numel():
        with on_device(device):
            launch = _of_queries("sparse_scores", codec, q)
            packed = launch.pack(
                q=q.data_ptr(),
                scores=scores.data_ptr(),
                stats=stats.data_ptr(),
                q_stride=q.stride()[:3],
                **table_members(table),
                pages=pages,
                scale=scale,
            )
            splits = max(1, min(launch.plan.num_splits // batch, -(-pages // launch.plan.warps)))
            grid = splits, codec.kv_heads * launch.plan.query_tiles, batch
            launch.kernel.launch(grid, launch.plan.threads, current_stream(device), packed)
    return Scores(scores[..., : table.max_length], stats)


def page_scores(q: Any, codec: Codec, table: PageTable, scale: float) -> Any:
    batch, q_heads, n, _ = q.shape
    device, pages = q.device, -(-table.max_length // PAGE)
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty((batch, q_heads, n, pages), dtype=torch.float32, device=device)
    if out.numel():
        with on_device(device):
            launch = _of_queries("page_scores", codec, q)
            packed = launch.pack(
                q=q.data_ptr(),
                out=out.data_ptr(),
                q_stride=q.stride()[:3],
                **table_members(table),
                pages=pages,
                scale=scale,
            )
            across = codec.kv_heads * launch.query_tiles
            most = max(1, 8 * limits(device.index).processors // (across * batch))
            splits = min(-(-pages // (16 * plans.PAGE_SCORES_WARPS)), most)
            threads = 32 * plans.PAGE_SCORES_WARPS
            launch.kernel.launch((splits, across, batch), threads, current_stream(device), packed)
    return out


def page_select(
    means: Any, codec: Codec, table: PageTable, most: int, top_p: float | None, exact_lse: Any | None
) -> tuple[Any, Any, Any]:
    """One launch for a number of pages; a share of the mass is found in torch's operations."""
    if top_p is not None or exact_lse is not None:
        return _page_select(means, codec, table, most, top_p, exact_lse)
    batch, q_heads, n, pages = means.shape
    device, kv_heads, record = means.device, codec.kv_heads, codec.format.record_bytes
    if pages > plans.MOST_PAGES:
        raise ValueError(f"[page_select] expected at most {plans.MOST_PAGES} pages; got {pages}")
    chosen = torch.empty((batch, kv_heads, most), dtype=torch.int64, device=device)
    tokens = torch.empty((batch, kv_heads), dtype=torch.int32, device=device)
    read = torch.empty((batch, kv_heads, pages), dtype=torch.bool, device=device)
    if batch:
        with on_device(device):
            held = plans.FEW_PAGES if pages <= plans.FEW_PAGES else plans.MOST_PAGES
            kernel = nvrtc.kernel("page_select", (), device.index, 4 * held)
            packed = _pack_select(
                means=means.data_ptr(),
                page_table=table.page_table.data_ptr(),
                lengths=table.lengths.data_ptr(),
                chosen=chosen.data_ptr(),
                tokens=tokens.data_ptr(),
                read=read.data_ptr(),
                max_pages=table.page_table.stride(0),
                kv_heads=kv_heads,
                queries=q_heads // kv_heads * n,
                pages=pages,
                budget=most,
                record=record,
            )
            kernel.launch((batch * kv_heads, 1, 1), 1024, current_stream(device), packed)
    return chosen, tokens, read


def _page_select(
    means: Any, codec: Codec, table: PageTable, most: int, top_p: float | None, exact_lse: Any | None
) -> tuple[Any, Any, Any]:
    batch, _, _, pages = means.shape
    kv_heads, device = codec.kv_heads, means.device
    z = means.reshape(batch, kv_heads, -1, pages) + math.log(PAGE)
    total = z.logsumexp(-1)
    if exact_lse is not None:
        total = torch.logaddexp(total, exact_lse.reshape(total.shape))
    z = z - total[..., None]
    used = ((table.lengths + PAGE - 1) // PAGE)[:, None].expand(batch, kv_heads)
    order = torch.sort(z.amax(2), dim=-1, descending=True, stable=True).indices[..., :most]
    counts = used.clamp(max=most)
    if top_p is not None:
        share = z.exp()
        sums = share.gather(-1, order[:, :, None].expand_as(share)).cumsum(-1)
        left = share.sum(-1, keepdim=True) - torch.nn.functional.pad(sums, (1, 0))[..., :-1]
        counts = torch.minimum((left > 1 - top_p).any(2).sum(-1), used)
    taken = torch.arange(most, device=device) < counts[..., None]
    read = torch.zeros((batch, kv_heads, pages), dtype=torch.bool, device=device).scatter(-1, order, taken)
    heads_at = codec.format.record_bytes * torch.arange(kv_heads, device=device)[:, None]
    chosen = table.page_table[:, None].expand(-1, kv_heads, -1).gather(-1, order) + heads_at
    return chosen, (counts * PAGE).to(torch.int32), read


def _whole_pages(scores: Scores) -> Any:
    """The scores' memory [batch, q_heads, n, 64 pages]."""
    s, pages = scores.scores, scores.pages.shape[3]
    strides = tuple(pages * PAGE * x for x in (s.shape[1] * s.shape[2], s.shape[2], 1))
    same = all(a == b or n == 1 for a, b, n in zip(s.stride(), (*strides, 1), s.shape))
    if same and s.untyped_storage().nbytes() // 4 - s.storage_offset() >= s[..., 0].numel() * pages * PAGE:
        return s
    return torch.nn.functional.pad(s, (0, pages * PAGE - s.shape[3]), value=-torch.inf).contiguous()


def sparse_threshold(
    scores: Scores, table: PageTable, top_k: Any | None, top_p: float | None, exact_lse: Any | None
) -> Threshold:
    batch, q_heads, n, _ = scores.scores.shape
    device, rows = scores.scores.device, batch * q_heads * n
    top, limit, dropped = torch.empty((3, batch, q_heads, n), dtype=torch.float32, device=device)
    last, kept = torch.empty((2, batch, q_heads, n), dtype=torch.int32, device=device)
    if rows and table.max_length:
        whole, pages = _whole_pages(scores), scores.pages.contiguous()
        exact_lse = None if exact_lse is None else exact_lse.contiguous()
        one = min(top_k, 2**31 - 1) if isinstance(top_k, int) else 0
        with on_device(device):
            kernel = nvrtc.kernel("sparse_threshold", plans.threshold_macros(), device.index, plans.THRESHOLD_BYTES)
            budgets = None if isinstance(top_k, int) else top_k
            packed = _pack_threshold(
                scores=whole.data_ptr(),
                stats=pages.data_ptr(),
                lengths=table.lengths.data_ptr(),
                budgets=address(budgets),
                exact_lse=address(exact_lse),
                threshold=limit.data_ptr(),
                last=last.data_ptr(),
                kept=kept.data_ptr(),
                dropped=dropped.data_ptr(),
                top=top.data_ptr(),
                q_heads=q_heads,
                n=n,
                pages=pages.shape[3],
                budget=one,
                top_p=top_p or 0.0,
            )
            kernel.launch((rows, 1, 1), 1024, current_stream(device), packed)
    else:
        limit.fill_(torch.inf), last.fill_(-1), kept.zero_(), dropped.zero_(), top.fill_(-torch.inf)
    return Threshold(limit, last, kept, dropped, top)


def sparse_attention(
    scores: Scores, threshold: Threshold, codec: Codec, table: PageTable, other: tuple[Any, Any] | None
) -> tuple[Any, Any]:
    batch, q_heads, n, _ = scores.scores.shape
    device, queries = scores.scores.device, q_heads // codec.kv_heads * n
    dtype = torch.float32 if other is None else other[0].dtype
    if batch * n * table.max_length == 0:
        if other is not None:
            return other
        out = torch.zeros((batch, q_heads, n, codec.head_dim), dtype=dtype, device=device)
        return out, torch.full((batch, q_heads, n), -torch.inf, dtype=torch.float32, device=device)
    out = torch.empty((batch, q_heads, n, codec.head_dim), dtype=dtype, device=device)
    lse = torch.empty((batch, q_heads, n), dtype=torch.float32, device=device)
    whole, stats = _whole_pages(scores), scores.pages.contiguous()
    other_o, other_lse = (None, None) if other is None else (x.contiguous() for x in other)
    with on_device(device):
        launch = constants_of(codec, device).launch(
            ("sparse_attention", queries, dtype),
            lambda: _Launch("sparse_attention", codec, queries, dtype_of(out), device),
        )
        plan, stream = launch.plan, current_stream(device)
        heads = batch * codec.kv_heads * plan.query_tiles
        size = heads * plan.num_splits * 8 * (codec.format.padded_dim + 1)
        part = partials(device, stream, size)
        packed = launch.pack(
            scores=whole.data_ptr(),
            stats=stats.data_ptr(),
            threshold=threshold.score.data_ptr(),
            top=threshold.top.data_ptr(),
            last=threshold.last.data_ptr(),
            other=address(other_o),
            other_lse=address(other_lse),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            part=part,
            counter=counters(device, stream, heads),
            **table_members(table),
            pages=stats.shape[3],
        )
        launch.kernel.launch((plan.num_splits, codec.kv_heads * plan.query_tiles, batch), plan.threads, stream, packed)
    return out, lse
