"""Prefill attention on CUDA: pages are decoded, a bounded number at a time and without rotating them back, into scratch
that cuDNN's or flash attention reads; the parts are joined by their log-sum-exp.

Decoding costs a few per cent of the products of a whole chunk of queries, so a kernel of our own would have to match
cuDNN's to gain anything. The queries of a KV head's group are folded into one long chunk: each page is decoded once.
Rows of different lengths are attended one by one, and their lengths are read on the host.
"""

from __future__ import annotations

from typing import Any

import torch

from ...codec.codec import Codec
from ...codec.spec import PAGE
from ...ops.arrays import dtype_name
from ...ops.table import PageTable
from . import nvrtc, params
from .launch import constants_of, current_stream, on_device
from .macros import TYPES, rotation_macros
from .pages import decode_pages

SCRATCH_TOKENS = 16384
"""Tokens decoded at a time, over all rows: 64 MiB in float16 for 8 KV heads of 128 channels."""
WIDE_SCRATCH_TOKENS = 1024
"""The same for heads wider than `FLASH_HEAD_DIM`, whose scores are kept in memory."""
FLASH_HEAD_DIM = 256
CUDNN_TOKENS = tuple(1 << i for i in range(14, 9, -1))
"""What cuDNN is asked for: it builds a plan for every shape and every set of strides, in 50 to 70 ms, so there must be
few. Each has scratch of its own for that reason."""
CUDNN_QUERIES = 512
"""Chunks of multiples of this many queries go to cuDNN: all but a prompt's last in practice."""

Part = tuple[torch.Tensor, torch.Tensor]


def pieces(tokens: int, scratch: int, cudnn: bool) -> list[int]:
    """How many tokens are decoded and attended at a time, never more than the scratch holds."""
    sizes: list[int] = []
    for size in [*(s for s in CUDNN_TOKENS if cudnn and s <= scratch), scratch]:
        sizes += [size] * (tokens // size)
        tokens %= size
    return sizes + [tokens] * (tokens > 0)


def _cudnn_helps(q: torch.Tensor, n: int) -> bool:
    """Whether cuDNN runs here and is the faster one for chunks of n tokens: on Hopper and newer."""
    if n % CUDNN_QUERIES or torch.cuda.get_device_capability(q.device)[0] < 9:
        return False
    params = torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, False, False)
    return torch.backends.cuda.can_use_cudnn_attention(params)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, cudnn: bool) -> Part:
    """Attention of q [batch, kv_heads, m, d] over all of k, v [batch, kv_heads, tokens, d] in float16, and its lse."""
    aten = torch.ops.aten
    if cudnn and k.shape[2] in CUDNN_TOKENS:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
        return out, lse.reshape(q.shape[:3])
    if q.shape[-1] <= FLASH_HEAD_DIM:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
        return out, lse
    s = scale * (q @ k.transpose(2, 3)).float()
    lse = torch.logsumexp(s, -1)
    return torch.exp(s - lse[..., None]).to(v.dtype) @ v, lse


def prefill_attention(q: Any, codec: Codec, table: PageTable, scale: float) -> Part:
    batch, q_heads, n, head_dim = q.shape
    out = torch.empty((batch, q_heads, n, head_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((batch, q_heads, n), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    q = q if q.stride(-1) == 1 else q.contiguous()
    if table.uniform:
        runs = [(slice(0, batch), table.max_length)]
    else:
        runs = [(slice(row, row + 1), length) for row, length in enumerate(table.lengths.tolist())]
    with on_device(q.device):
        for rows, length in runs:
            if length:
                _rows(q[rows], codec, table, rows, length, scale, out[rows], lse[rows])
            else:
                out[rows] = 0
                lse[rows] = -torch.inf
    return out, lse


def _rows(q: Any, codec: Codec, table: PageTable, rows: slice, length: int, scale: float, out: Any, lse: Any) -> None:
    """Rows of one length: fills out and lse."""
    batch, q_heads, n, _ = q.shape
    device, kv_heads, dim = q.device, codec.kv_heads, codec.format.padded_dim
    group, total = q_heads // kv_heads, batch * q_heads * n
    constants, stream = constants_of(codec, device), current_stream(device)
    turned = torch.empty((batch, kv_heads, group * n, dim), dtype=torch.float16, device=device)
    shift = torch.empty(total, dtype=torch.float32, device=device)
    turn, turn_pack = constants.launch(
        ("turn_queries", q.dtype), lambda: _turn_queries(codec, constants.attend[0], q.dtype, device)
    )
    grid, threads = (-(-total // 8), 1, 1), 256
    packed = turn_pack(
        q=q.data_ptr(),
        out=turned.data_ptr(),
        shift=shift.data_ptr(),
        q_stride=q.stride()[:3],
        rows=total,
        q_heads=q_heads,
        group=group,
        n=n,
    )
    turn.launch(grid, threads, stream, packed)
    cudnn = _cudnn_helps(turned, n)
    scratch = max(PAGE, (SCRATCH_TOKENS if dim <= FLASH_HEAD_DIM else WIDE_SCRATCH_TOKENS) // batch // PAGE * PAGE)
    sizes = pieces(length, scratch, cudnn)
    rounds = [sizes[at : at + params.PARTS] for at in range(0, len(sizes), params.PARTS)]
    joined = torch.empty((total, dim), dtype=torch.float32, device=device) if len(rounds) > 1 else None
    merge, merge_pack = constants.launch("merge_parts", lambda: _merge_parts(codec, constants.attend[1], device))
    first = 0
    for i, joins in enumerate(rounds):
        parts = []
        for size in joins:
            held = torch.full((batch,), size, dtype=torch.int32, device=device)
            pages = slice(first // PAGE, -(-(first + size) // PAGE))
            part = PageTable(table.base, table.page_table[rows, pages], held, size)
            k, v = decode_pages(codec, part, "float16", True)
            parts.append(_attend(turned, k, v, scale, cudnn))
            del k, v
            first += size
        packed = merge_pack(
            part=_filled([o.data_ptr() for o, _ in parts], params.PARTS),
            part_lse=_filled([l.data_ptr() for _, l in parts], params.PARTS),
            shift=shift.data_ptr(),
            sum=0 if joined is None else joined.data_ptr(),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            stride=_filled([s for o, _ in parts for s in o.stride()[:3]], 3 * params.PARTS),
            rows=total,
            kv_heads=kv_heads,
            queries=group * n,
            parts=len(parts),
            first=i == 0,
            last=i + 1 == len(rounds),
            scale=scale,
        )
        merge.launch(grid, threads, stream, packed)


def _turn_queries(codec: Codec, transform: bytes, dtype: Any, device: Any) -> tuple[nvrtc.Kernel, Any]:
    macros = rotation_macros(codec, FORGE_TYPE=TYPES[dtype_name(dtype)])
    kernel = nvrtc.kernel("turn_queries", macros, device.index, 0)
    return kernel, params.TURN_QUERIES.packer(transform=transform)


def _merge_parts(codec: Codec, transform: bytes, device: Any) -> tuple[nvrtc.Kernel, Any]:
    kernel = nvrtc.kernel("merge_parts", rotation_macros(codec), device.index, 0)
    return kernel, params.MERGE_PARTS.packer(transform=transform)


def _filled(values: list[int], count: int) -> list[int]:
    return values + [0] * (count - len(values))
