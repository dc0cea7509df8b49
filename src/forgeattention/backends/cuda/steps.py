"""A decode step of one token per row that a CUDA graph can hold: see `forgeattention.ops.steps`."""

from __future__ import annotations

from typing import Any

from . import nvrtc, params
from .launch import current_stream, on_device

_pack_append_step = params.APPEND_STEP.packer()


def append_step(
    to_k: Any, to_v: Any, exact: Any, packed: Any, page_table: Any, encode_offsets: Any, tickets: Any, k: Any, v: Any,
    sinks: int, encode_at: int,
) -> None:  # fmt: skip
    """See `forgeattention.ops.append_step`."""
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    device, size = k.device, k.element_size()
    with on_device(device):
        arguments = _pack_append_step(
            k=k.data_ptr(),
            v=v.data_ptr(),
            to_k=to_k.data_ptr(),
            to_v=to_v.data_ptr(),
            exact=exact.data_ptr(),
            packed=packed.data_ptr(),
            page_table=page_table.data_ptr(),
            encode_offsets=encode_offsets.data_ptr(),
            tickets=tickets.data_ptr(),
            k_stride=[size * s for s in k.stride()[:2]],
            v_stride=[size * s for s in v.stride()[:2]],
            to_k_stride=[size * s for s in to_k.stride()[:3]],
            to_v_stride=[size * s for s in to_v.stride()[:3]],
            heads=k.shape[1],
            words=k.shape[3] * size // 4,
            capacity=to_k.shape[2],
            sinks=sinks,
            encode_at=encode_at,
            max_pages=page_table.shape[1],
        )
        kernel = nvrtc.kernel("append_step", (), device.index, 0)
        kernel.launch((k.shape[1], k.shape[0], 1), 256, current_stream(device), arguments)
