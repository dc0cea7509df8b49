"""Encode and prefill attention on CUDA: 32 query and 8 KV heads of 128 channels, 2048 queries over 32768."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from cuda_decode import SPECS, copy_bandwidth, environment, median_us
from torch.nn.attention import SDPBackend, sdpa_kernel

from forgeattention import ops
from forgeattention.codec import Codec
from forgeattention.ops.table import PageTable

KV_HEADS, Q_HEADS, DIM, CHUNK, PAST = 8, 32, 128, 2048, 32768


def records(name: str, peer: float | None) -> list[dict[str, Any]]:
    codec = Codec(SPECS[name], DIM, KV_HEADS)
    k, v = (torch.randn(KV_HEADS, PAST, DIM, device="cuda", dtype=torch.float16) for _ in range(2))
    pages = PAST // 64
    buffer = torch.empty(pages * codec.page_bytes, dtype=torch.uint8, device="cuda")
    offsets = torch.arange(pages, device="cuda") * codec.page_bytes
    encode = median_us(lambda: ops.encode(k, v, codec, buffer, offsets), 1, 10)
    length = torch.tensor([PAST], dtype=torch.int32, device="cuda")
    table = PageTable(buffer, offsets[None], length, PAST)
    q = torch.randn(1, Q_HEADS, CHUNK, DIM, device="cuda", dtype=torch.float16)
    ours = median_us(lambda: ops.prefill_attention(q, codec, table, DIM**-0.5), 1, 10)
    decode = median_us(lambda: ops.decode_pages(codec, table, dtype="float16", rotated=True), 1, 10)
    if peer is None:
        times = []
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            with sdpa_kernel(backend):
                times.append(
                    median_us(
                        lambda: torch.nn.functional.scaled_dot_product_attention(q, k[None], v[None], enable_gqa=True),
                        1,
                        10,
                    )
                )
        peer = min(times)
        print("FP16 flash, cuDNN us:", times)
    shape = {"batch": 1, "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "context": PAST}
    common = {"device": torch.cuda.get_device_name(), "spec": name}
    return [
        {
            "op": "encode",
            "shape": {**shape, "q_len": 0},
            "us": encode,
            "us_per_page_of_all_heads": encode / pages,
            **common,
        },
        {"op": "decode_pages", "shape": {**shape, "q_len": 0}, "us": decode, **common},
        {
            "op": "prefill_attention",
            "shape": {**shape, "q_len": CHUNK},
            "us": ours,
            "peers_us": {"fp16": peer},
            "ratio": peer / ours,
            **common,
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    out: list[dict[str, Any]] = [{"env": environment(copy_bandwidth())}]
    peer = None
    for name in SPECS:
        new = records(name, peer)
        peer = new[-1]["peers_us"]["fp16"]
        out += new
        print(name, [(r["op"], round(r["us"], 1), round(r.get("ratio", 0), 2)) for r in new], flush=True)
    if options.json:
        options.json.write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
