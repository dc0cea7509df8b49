"""Encode, decode_pages and prefill attention on CUDA: 32 query and 8 KV heads of 128 channels, 2048 queries over 32768.

    python benchmarks/cuda_prefill.py --json OUT --encode-json OUT

Prefill is timed over a full and over a ragged past; the peers, over FP16 keys and values, are torch's flash attention
and cuDNN.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cuda_decode import SPECS, copy_bandwidth, environment, median_us
from torch.nn.attention import SDPBackend, sdpa_kernel

from forgeattention import ops
from forgeattention.codec import Codec
from forgeattention.ops.table import PageTable

KV_HEADS, Q_HEADS, DIM, CHUNK, PAST = 8, 32, 128, 2048, 32768
RAGGED = PAST - 5 * 64 - 17
SHAPE = {"batch": 1, "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "head_dim": DIM}


def peers(q: Any, k: Any, v: Any) -> dict[str, float]:
    out = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):
            attend = torch.nn.functional.scaled_dot_product_attention
            out[name] = median_us(partial(attend, q, k[None], v[None], enable_gqa=True), 1, 20)
    return out


def records(name: str, k: Any, v: Any, q: Any, copy: float) -> list[dict[str, Any]]:
    pages = PAST // 64
    offsets, out = torch.arange(pages, device="cuda"), []

    def add(op: str, us: float, context: int, q_len: int = 0, **more: Any) -> None:
        shape = {**SHAPE, "context": context, "q_len": q_len}
        out.append({"op": op, "spec": name, "shape": shape, "us": us, "device": torch.cuda.get_device_name(), **more})

    codec = Codec(SPECS[name], DIM, KV_HEADS)
    buffer = torch.empty(pages * codec.page_bytes, dtype=torch.uint8, device="cuda")
    at = offsets * codec.page_bytes
    # With the feedback that a model's codecs have; what its matrix holds makes no difference to the time.
    shaped = Codec(SPECS[name], DIM, KV_HEADS, query_gram=torch.eye(DIM).numpy())
    plain = Codec(dataclasses.replace(SPECS[name], refine=False), DIM, KV_HEADS)
    for coder, refine in ((plain, False), (shaped, True)):
        for tokens in (64, CHUNK, PAST):
            place = at[: tokens // 64]
            us = median_us(partial(ops.encode, k[:, :tokens], v[:, :tokens], coder, buffer, place), 1, 20)
            add("encode", us, tokens, refine=refine, shaped=refine)
    for context in (PAST, RAGGED):
        length = torch.tensor([context], dtype=torch.int32, device="cuda")
        table = PageTable(buffer, at[None], length, context, True)
        if context == PAST:
            us = median_us(partial(ops.decode_pages, codec, table, dtype="float16", rotated=True), 1, 20)
            moved = pages * codec.page_bytes + 4 * PAST * KV_HEADS * DIM
            add("decode_pages", us, context, gb_s=moved / us / 1e3, share_of_copy=moved / us / 1e3 / copy)
        same = peers(q, k[:, :context], v[:, :context])
        us = median_us(partial(ops.prefill_attention, q, codec, table, DIM**-0.5), 1, 20)
        ratios = {f"ratio_{peer}": other / us for peer, other in same.items()}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ops.prefill_attention(q, codec, table, DIM**-0.5)
        scratch = torch.cuda.max_memory_allocated() - before
        add("prefill_attention", us, context, CHUNK, peers_us=same, **ratios, scratch_bytes=scratch)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="prefill_attention and decode_pages")
    parser.add_argument("--encode-json", type=Path, help="encode")
    options = parser.parse_args()
    copy = copy_bandwidth()
    out: list[dict[str, Any]] = [{"env": environment(copy)}]
    k, v = (torch.randn(KV_HEADS, PAST, DIM, device="cuda", dtype=torch.float16) for _ in range(2))
    q = torch.randn(1, Q_HEADS, CHUNK, DIM, device="cuda", dtype=torch.float16)
    for name in SPECS:
        new = records(name, k, v, q, copy)
        out += new
        for r in new:
            print(name, {key: x for key, x in r.items() if key not in ("spec", "device", "shape")}, flush=True)
    for path, encode in ((options.json, False), (options.encode_json, True)):
        if path:
            path.write_text(json.dumps([r for r in out if "env" in r or (r["op"] == "encode") == encode], indent=1))


if __name__ == "__main__":
    main()
