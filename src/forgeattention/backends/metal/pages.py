"""Pages written, read back and moved by the kernels of kernels/metal."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...codec.codec import Codec
from ...codec.spec import PAGE, SCALE_RULES
from ...ops.table import PageTable
from ..mlx.arrays import page_places, store_pages
from ..mlx.codec import codec_arrays, exact_product
from .launch import THREADS, TILE, Device, Launch, format_template, mlx_device, paged, roomy


def encode(k: Any, v: Any, codec: Codec, out: Any | None, offsets: Any, device: Device | None = None) -> None:
    """See `forgeattention.ops.encode`. Waits for the GPU, to know that every vector could be coded."""
    device = device or mlx_device()
    xp = device.xp
    where = page_places(out, offsets, codec)
    c = codec_arrays(codec, xp)
    y = []
    for x, forward, mu in ((k, c.k_forward, c.k_mu), (v, c.v_forward, c.v_mu)):
        x = x.astype(xp.float32)
        y.append(exact_product(x if mu is None else x - mu.swapaxes(1, 2), forward, xp))
    spec, pages = codec.spec, len(where)
    shaped = codec.shaping is not None
    work = (pages, codec.kv_heads, PAGE, codec.format.padded_dim) if shaped else (8,)
    records, status, *_ = device.run(
        Launch(
            "encode",
            {
                "y_k": y[0],
                "y_v": y[1],
                "k_levels": c.k_values,
                "v_levels": c.v_values,
                "k_factor": c.k_factor,
                "k_weight": c.k_weight,
                "orders": c.orders,
            },
            {
                "records": ((pages, codec.kv_heads, codec.format.record_bytes), "uint8"),
                "status": ((pages, codec.kv_heads), "uint32"),
                "errors": (work, "float32"),
                "codes": (work, "uint8"),
            },
            (pages, codec.kv_heads, 1),
            [
                *format_template(codec),
                ("K_RULE", SCALE_RULES.index(spec.k_scale_rule)),
                ("V_RULE", SCALE_RULES.index(spec.v_scale_rule)),
                ("KEY_MEAN", spec.key_mean),
                ("REFINE", spec.refine),
                ("SHAPED", shaped),
            ],
        )
    )
    faults = int(np.bitwise_or.reduce(np.asarray(status), axis=None))
    if faults & 1:
        raise ValueError("[encode] expected finite k and v; got NaN or infinity")
    if faults:
        raise ValueError(f"[encode] expected vectors that {spec.scales} scales can hold; got larger ones")
    store_pages(out, records, where)


def decode_pages(
    codec: Codec, table: PageTable, dtype: str, rotated: bool, device: Device | None = None
) -> tuple[Any, Any]:
    """See `forgeattention.ops.decode_pages`."""
    device = device or mlx_device()
    xp = device.xp
    batch, width = table.lengths.shape[0], codec.format.padded_dim
    c = codec_arrays(codec, xp)
    if table.max_length == 0 or batch == 0:
        empty = xp.zeros((batch, codec.kv_heads, table.max_length, width if rotated else codec.head_dim))
        return (empty.astype(getattr(xp, dtype)),) * 2
    stored = dtype if rotated else "float32"
    shape = (batch, codec.kv_heads, table.max_length, width)
    k, v = device.run(
        Launch(
            "decode_pages",
            {
                **paged(table, xp),
                "k_levels": c.k_values,
                "v_levels": c.v_values,
                "max_length": xp.array(table.max_length, dtype=xp.int32),
            },
            {"k": (shape, stored), "v": (shape, stored)},
            (-(-table.max_length // TILE), 1, batch * codec.kv_heads),
            [*format_template(codec), ("T", stored), ("KV_HEADS", codec.kv_heads)],
        )
    )
    if rotated:
        return k, v
    valid = (xp.arange(table.max_length) < table.lengths[:, None])[:, None, :, None]
    out: list[Any] = []
    for y, inverse, mu in ((k, c.k_inverse, c.k_mu), (v, c.v_inverse, c.v_mu)):
        x = y @ inverse.swapaxes(1, 2)
        if mu is not None:
            x = xp.where(valid, x + mu.swapaxes(1, 2), 0.0)
        out.append(x.astype(getattr(xp, dtype)))
    return out[0], out[1]


def compact(base: Any | None, offsets: Any, page_bytes: int, device: Device | None = None) -> Any:
    """See `forgeattention.ops.compact`."""
    device = device or mlx_device()
    xp, pages = device.xp, offsets.shape[0]
    if base is None:
        raise ValueError("[compact] expected an array that holds the pages; got absolute addresses")
    if pages == 0:
        return xp.zeros((0, page_bytes), dtype=xp.uint8)
    words = page_bytes // 16
    inputs = {"base": base, "offsets": roomy(offsets, xp), "words": xp.array(words, dtype=xp.int32)}
    launch = Launch(
        "compact", inputs, {"out": ((pages, page_bytes), "uint8")}, (-(-words // (4 * THREADS)), pages, 1), []
    )
    return device.run(launch)[0]
