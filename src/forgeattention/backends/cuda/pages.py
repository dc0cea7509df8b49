"""Pages and exact tokens written, read back and moved: launches of kernels/cuda on torch tensors.

`encode` does not wait for the device, so it cannot raise for values: a page with NaN or infinity is left undefined and
sets a flag on the device, which `encode_failed` reads.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch

from ...codec.codec import Codec
from ...codec.spec import PAGE
from ...ops.arrays import dtype_of
from ...ops.table import PageTable
from . import nvrtc, plans
from . import params as args
from .launch import address, constants_of, current_stream, on_device

log = logging.getLogger("forgeattention")

_bad: dict[int, Any] = {}


def _bad_of(device: Any) -> Any:
    if device.index not in _bad:
        _bad[device.index] = torch.zeros(1, dtype=torch.int32, device=device)
    return _bad[device.index]


def encode_failed(device: Any) -> bool:
    """Whether an `encode` since the last call met NaN, infinity or a scale that does not fit. Waits for the device."""
    flag = _bad_of(torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device))
    failed = bool(flag.item())
    if failed:
        flag.zero_()
    return failed


@lru_cache
def _warn_of_plain_codes() -> None:
    log.warning("CUDA pages are coded without refinement and noise shaping: as readable, less faithful than the CPU's")


_encode_params = args.Packer(args.EncodeParams)
_decode_pages_params = args.Packer(args.DecodePagesParams)
_append_tokens_params = args.Packer(args.AppendTokensParams)


def encode(k: Any, v: Any, codec: Codec, out: Any | None, offsets: Any) -> None:
    """See `forgeattention.ops.encode`."""
    pages = k.shape[1] // PAGE
    k, v = (x.unflatten(1, (pages, PAGE)).transpose(0, 1) for x in (k, v))
    encode_rows(k, v, codec, offsets, out)


def encode_rows(k: Any, v: Any, codec: Codec, offsets: Any, out: Any | None = None) -> None:
    """Codes 64 tokens of every row, in one launch that asks nothing of the host.

    Args:
        k, v: [rows, kv_heads, 64, head_dim] of one dtype, of any strides.
        codec: the layer's.
        offsets: int64 [rows] on the device: where a row's page goes, in bytes from `out`, or an address without it. A
            row whose offset is negative is left out.
        out: uint8, or None.
    """
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    with on_device(k.device):
        constants = constants_of(codec, k.device)
        kernel = constants.kernel(
            ("encode", k.dtype),
            lambda: (args.encode_macros(codec, dtype_of(k)), plans.encode_shared_bytes(codec.format)),
        )
        strides = *k.stride()[:3], *v.stride()[:3]
        params = encode_arguments(codec, k, v, address(out), offsets, strides)
        kernel.launch((k.shape[0], codec.kv_heads, 1), 256, current_stream(k.device), params)


def encode_arguments(
    codec: Codec,
    k: Any,
    v: Any,
    base: int,
    offsets: Any,
    strides: tuple[int, ...],
    slots: Any | None = None,
    exact_block: int = 0,
) -> Any:
    """What a launch of `encode` is told, which holds until the same thread asks again.

    Args:
        codec: the layer's.
        k, v: where the tokens lie.
        base: address that is added to `offsets`.
        offsets: int64 [pages].
        strides: of k, then of v, in elements: from page to page (with slots from block to block), head to head, token
            to token.
        slots: int32 [pages, 64] as `paged.Tables` has them, or None.
        exact_block: tokens of a block, with slots.
    """
    if codec.spec.refine or codec.shaping is not None:
        _warn_of_plain_codes()
    return _encode_params(
        *map(address, (k, v)),
        base,
        *map(address, (offsets, slots, _bad_of(k.device))),
        *map(bytes, constants_of(codec, k.device).encode),
        *strides,
        exact_block,
        codec.k_codebook.unit,
        codec.v_codebook.unit,
    )


def append_tokens(to_k: Any, to_v: Any, lengths: Any, k: Any, v: Any) -> None:
    """Writes k, v [batch, heads, n, dim] behind the `lengths` int32 [batch] tokens of to_k, to_v [batch, heads,
    capacity, dim] and adds n to the lengths. A row without room stays as it is."""
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    device, size = k.device, k.element_size()
    with on_device(device):
        kernel = nvrtc.kernel("append_tokens", args.append_tokens_macros(), device.index, 0)
        params = _append_tokens_params(
            *map(address, (k, v, to_k, to_v, lengths)),
            *(size * s for x in (k, v, to_k, to_v) for s in x.stride()[:3]),
            *(k.shape[1], k.shape[2], k.shape[3] * size // 4, to_k.shape[2]),
        )
        kernel.launch((k.shape[0], 1, 1), 256, current_stream(device), params)


def compact(base: Any | None, offsets: Any, page_bytes: int) -> Any:
    """Pages are taken to lie where `offsets` say: looking would wait for the device."""
    out = torch.empty((offsets.shape[0], page_bytes), dtype=torch.uint8, device=offsets.device)
    if out.numel() == 0:
        return out
    offsets = offsets.contiguous()
    with on_device(offsets.device):
        kernel = nvrtc.kernel("compact", args.COMPACT_MACROS, offsets.device.index, 0)
        params = args.CompactParams(*map(address, (base, offsets, out)), page_bytes // 16)
        grid = (-(-page_bytes // (16 * 4 * 256)), offsets.shape[0], 1)
        kernel.launch(grid, 256, current_stream(offsets.device), params)
    return out


def decode_pages(codec: Codec, table: PageTable, dtype: str, rotated: bool) -> tuple[Any, Any]:
    width = codec.format.padded_dim if rotated else codec.head_dim
    shape = (table.lengths.shape[0], codec.kv_heads, table.max_length, width)
    k, v = (torch.empty(shape, dtype=getattr(torch, dtype), device=table.lengths.device) for _ in range(2))
    if k.numel():
        decode_pages_into(codec, table, k, v, rotated)
    return k, v


def decode_pages_into(codec: Codec, table: PageTable, k: Any, v: Any, rotated: bool = False) -> None:
    """`decode_pages` into contiguous k, v [batch, kv_heads, max_length, width], width: padded_dim if rotated."""
    fmt, device, dtype = codec.format, table.lengths.device, dtype_of(k)

    def options() -> tuple[args.Macros, int]:
        extra = {"FORGE_WIDTH": k.shape[3], "FORGE_TYPE": args.TYPES[dtype]}
        if rotated:
            extra["FORGE_ROTATION"] = args.ROTATIONS["none"]
        return args.macros(codec, args.DecodePagesParams, **extra), plans.decode_pages_shared_bytes(fmt)

    with on_device(device):
        constants = constants_of(codec, device)
        kernel = constants.kernel(("decode_pages", dtype, rotated), options)
        transforms = constants.attend if not rotated else [_without_mu(t) for t in constants.attend]
        params = _decode_pages_params(
            *map(address, (table.base, table.offsets, table.lengths, k, v)),
            *map(bytes, transforms),
            table.offsets.stride(0),
            codec.kv_heads,
            table.max_length,
            codec.k_codebook.unit,
            codec.v_codebook.unit,
        )
        kernel.launch((-(-table.max_length // PAGE), codec.kv_heads, k.shape[0]), 256, current_stream(device), params)


def _without_mu(t: args.TransformArgs) -> args.TransformArgs:
    return args.TransformArgs(t.signs, t.in_matrix, t.out_matrix, None, t.stride, 0)
