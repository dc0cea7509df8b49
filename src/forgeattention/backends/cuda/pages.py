"""Pages and exact tokens written, read back and moved: launches of kernels/cuda on torch tensors.

`encode` does not wait for the device, so it cannot raise for values: a page with NaN or infinity is left undefined and
sets a flag on the device, which `encode_failed` reads.
"""

from __future__ import annotations

from typing import Any

import torch

from ...codec.codec import Codec
from ...codec.spec import PAGE
from ...ops.arrays import dtype_of
from ...ops.table import PageTable
from . import nvrtc, params, plans
from .encoder import encode_plan
from .launch import address, constants_of, current_stream, limits, on_device, table_members

_bad: dict[int, Any] = {}


def fault_flag(device: Any) -> Any:
    """int32 [1] on a device, which encoding kernels set where they meet values that they cannot code."""
    if device.index not in _bad:
        _bad[device.index] = torch.zeros(1, dtype=torch.int32, device=device)
    return _bad[device.index]


def encode_failed(device: Any) -> bool:
    """Whether an `encode` since the last call met NaN, infinity or a scale that does not fit. Waits for the device."""
    flag = fault_flag(torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device))
    failed = bool(flag.item())
    if failed:
        flag.zero_()
    return failed


_pack_append_tokens = params.APPEND_TOKENS.packer()
_pack_compact = params.COMPACT.packer()


def encode(k: Any, v: Any, codec: Codec, out: Any | None, offsets: Any) -> None:
    """See `forgeattention.ops.encode`."""
    heads, tokens, dim = k.shape
    k, v = (x.view(heads, tokens // PAGE, PAGE, dim).transpose(0, 1) for x in (k, v))
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
        launch = constants_of(codec, k.device).launch(
            ("encode", k.dtype), lambda: _EncodeLaunch(codec, dtype_of(k), k.device)
        )
        packed = launch.pack(
            k=k.data_ptr(),
            v=v.data_ptr(),
            base=address(out),
            offsets=offsets.data_ptr(),
            bad=fault_flag(k.device).data_ptr(),
            k_stride=k.stride()[:3],
            v_stride=v.stride()[:3],
        )
        launch.kernel.launch((k.shape[0], codec.kv_heads, 1), 256, current_stream(k.device), packed)


class _EncodeLaunch:
    """What encoding launches for one codec and dtype have in common."""

    def __init__(self, codec: Codec, dtype: str, device: Any) -> None:
        constants = constants_of(codec, device)
        plan = encode_plan(codec, limits(device.index))
        self.kernel = nvrtc.kernel("encode", plan.macros(codec, dtype), device.index, plan.shared_bytes)
        (k, v), (k_unit, v_unit), (feedback, stride) = constants.encode, constants.units, constants.feedback
        self.pack = params.ENCODE.packer(
            k_transform=k,
            v_transform=v,
            k_unit=k_unit,
            v_unit=v_unit,
            feedback=feedback,
            feedback_stride=stride,
            slots=0,
            exact_block=0,
        )


def _bytes_apart(x: Any, size: int) -> tuple[int, int, int]:
    """Bytes from one row, head and token to the next."""
    row, head, token, _ = x.stride()
    return size * row, size * head, size * token


def append_tokens(to_k: Any, to_v: Any, lengths: Any, k: Any, v: Any) -> None:
    """Writes k, v [batch, heads, n, dim] behind the `lengths` int32 [batch] tokens of to_k, to_v [batch, heads,
    capacity, dim] and adds n to the lengths. A row without room stays as it is."""
    k = k if k.stride(-1) == 1 else k.contiguous()
    v = v if v.stride(-1) == 1 else v.contiguous()
    device, size = k.device, k.element_size()
    batch, heads, n, dim = k.shape
    with on_device(device):
        packed = _pack_append_tokens(
            k=k.data_ptr(),
            v=v.data_ptr(),
            to_k=to_k.data_ptr(),
            to_v=to_v.data_ptr(),
            lengths=lengths.data_ptr(),
            k_stride=_bytes_apart(k, size),
            v_stride=_bytes_apart(v, size),
            to_k_stride=_bytes_apart(to_k, size),
            to_v_stride=_bytes_apart(to_v, size),
            heads=heads,
            n=n,
            words=dim * size // 4,
            capacity=to_k.shape[2],
        )
        kernel = nvrtc.kernel("append_tokens", (), device.index, 0)
        kernel.launch((batch, 1, 1), 256, current_stream(device), packed)


def compact(base: Any | None, offsets: Any, page_bytes: int) -> Any:
    """Pages are taken to lie where `offsets` say: looking would wait for the device."""
    out = torch.empty((offsets.shape[0], page_bytes), dtype=torch.uint8, device=offsets.device)
    if out.numel() == 0:
        return out
    offsets = offsets.contiguous()
    with on_device(offsets.device):
        kernel = nvrtc.kernel("compact", (), offsets.device.index, 0)
        packed = _pack_compact(
            base=address(base), offsets=offsets.data_ptr(), out=out.data_ptr(), words=page_bytes // 16
        )
        grid = (-(-page_bytes // (16 * 4 * 256)), offsets.shape[0], 1)
        kernel.launch(grid, 256, current_stream(offsets.device), packed)
    return out


def decode_pages(codec: Codec, table: PageTable, dtype: str, rotated: bool) -> tuple[Any, Any]:
    width = codec.format.padded_dim if rotated else codec.head_dim
    shape = (table.lengths.shape[0], codec.kv_heads, table.max_length, width)
    k, v = (torch.empty(shape, dtype=getattr(torch, dtype), device=table.lengths.device) for _ in range(2))
    if k.numel():
        decode_pages_into(codec, table, k, v, rotated)
    return k, v


def decode_pages_into(codec: Codec, table: PageTable, k: Any, v: Any, rotated: bool = False, *, first: int = 0) -> None:
    """`decode_pages` into contiguous k, v [batch, kv_heads, n, width], width: padded_dim if rotated, from index `first`
    on; all of a table's last page is written, so that there must be room for it."""
    offset = first * k.shape[3] * k.element_size()
    device, dtype = table.lengths.device, dtype_of(k)
    with on_device(device):
        launch = constants_of(codec, device).launch(
            ("decode_pages", dtype, rotated), lambda: _DecodePagesLaunch(codec, dtype, rotated, device)
        )
        packed = launch.pack(
            k=k.data_ptr() + offset,
            v=v.data_ptr() + offset,
            **table_members(table),
            max_length=k.shape[2],
        )
        grid = -(-table.max_length // PAGE), codec.kv_heads, k.shape[0]
        launch.kernel.launch(grid, 256, current_stream(device), packed)


def decode_into(codec: Codec, table: PageTable, k: Any, v: Any, first: int) -> None:
    """See `forgeattention.ops.decode_into`."""
    if table.max_length % PAGE:
        at = slice(first, first + table.max_length)
        k[:, :, at], v[:, :, at] = decode_pages(codec, table, dtype_of(k), False)
    else:
        # Whole pages are all that the kernel writes, at the stride that its `max_length` gives.
        decode_pages_into(codec, table, k, v, first=first)


class _DecodePagesLaunch:
    """What launches of decode_pages for one codec and dtype have in common."""

    def __init__(self, codec: Codec, dtype: str, rotated: bool, device: Any) -> None:
        constants = constants_of(codec, device)
        macros = plans.decode_pages_macros(codec, dtype, rotated)
        self.kernel = nvrtc.kernel("decode_pages", macros, device.index, plans.decode_pages_layout(codec.format).bytes)
        k, v = constants.centred if rotated else constants.attend
        self.pack = params.DECODE_PAGES.packer(
            k_transform=k,
            v_transform=v,
            kv_heads=codec.kv_heads,
            k_unit=constants.units[0],
            v_unit=constants.units[1],
        )
