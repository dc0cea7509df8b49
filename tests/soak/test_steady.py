"""Decoding and serving for a long time take no more memory at the end than after the start."""

from __future__ import annotations

import json
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from server_process import Server
from serving_engine import model

from forgeattention import CodecSpec
from forgeattention.eviction import Eviction, Recency
from forgeattention.integrations.hf import ForgeCache
from forgeattention.sparse import SparseSpec

GROWTH = 24 << 20
"""Bytes by which the last quarter's memory may lie over the second quarter's: freed memory of the allocator."""


def resident(process: int | str = "self") -> int:
    """Bytes of a process in memory."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS")


def check_flat(samples: list[int], counts: Counter[str]) -> None:
    quarters = np.array_split(np.array(samples), 4)
    second, last = (int(np.median(quarters[i])) for i in (1, 3))
    counts["MB in the second quarter"], counts["MB in the last quarter"] = second >> 20, last >> 20
    assert last - second <= GROWTH


@pytest.mark.parametrize("options", ["plain", "sparse", "evict to disk"])
def test_decoding(options: str, tmp_path: Path, number: Callable[[str], int], counts: Counter[str]) -> None:
    """A batch of two that grows to some thousand tokens, is cut back, reordered and begun anew."""
    made = model()
    given = {
        "plain": {},
        "sparse": {"sparse": SparseSpec(top_k=64, min_context=0)},
        "evict to disk": {"eviction": Eviction(Recency(0.5), on_evict="disk", folder=tmp_path)},
    }[options]
    end, samples, random = time.monotonic() + 20 * number("minutes"), [], torch.Generator().manual_seed(0)
    with torch.no_grad():
        while time.monotonic() < end:
            cache = ForgeCache(made, CodecSpec(window=64), **given)
            while time.monotonic() < end and cache.get_seq_length() < 3000:
                n = 200 if counts["steps"] % 50 == 0 else 1
                made(torch.randint(0, 250, (2, n), generator=random), past_key_values=cache)
                counts["steps"] += 1
                counts["tokens"] += 2 * n
                if counts["steps"] % 97 == 0 and cache.get_seq_length() > 40:
                    cache.crop(-40)
                    cache.reorder_cache(torch.tensor([1, 0]))
                if counts["steps"] % 20 == 0:
                    samples.append(resident())
            counts["sequences"] += 1
    check_flat(samples, counts)


def test_serving(tmp_path: Path, number: Callable[[str], int], counts: Counter[str]) -> None:
    """Requests whole and streamed, some abandoned, over common prefixes and fresh ones."""
    folder = tmp_path / "model"
    model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    server = Server(str(folder), tmp_path / "log", ["--cache-memory", "8MiB"], engine="hf")
    try:
        server.wait()
        end, samples, random = time.monotonic() + 60 * number("minutes"), [], np.random.default_rng(0)
        while time.monotonic() < end:
            words = " ".join(random.choice(["one", "two", "three"], int(random.integers(1, 200))))
            stream = bool(random.random() < 0.5)
            body = {"model": "model", "prompt": words, "max_tokens": 20, "stream": stream}
            asked = urllib.request.Request(
                f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(asked, timeout=120) as answer:
                if stream and random.random() < 0.3:
                    answer.read(20)
                    counts["abandoned"] += 1
                else:
                    answer.read()
            counts["requests"] += 1
            if counts["requests"] % 5 == 0:
                samples.append(resident(server.process.pid))
    finally:
        server.stop()
    check_flat(samples, counts)
