"""Eviction, sparse reading, context parallelism and shared keys, alone and together: right, or refused at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_slow import model
from tolerances import HF
from torch import distributed

from forgeattention import CodecSpec, Eviction, ForgeCache, SparseSpec
from forgeattention.cache.sharded import Sharding
from forgeattention.eviction.policy import Recency

SPEC = CodecSpec(sinks=4, window=16, refine=False)
SHARED = {
    "num_hidden_layers": 4, "sliding_window": 16, "num_kv_shared_layers": 2, "global_head_dim": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 32,
}  # fmt: skip
TOGETHER = [
    frozenset(names)
    for names in (
        *([], ["evict"], ["sparse"], ["shard"], ["share"]),
        *(["evict", "sparse"], ["evict", "shard"], ["evict", "share"]),
        *(["sparse", "shard"], ["sparse", "share"], ["shard", "share"]),
        *(["evict", "sparse", "share"], ["evict", "shard", "share"], ["sparse", "shard", "share"]),
    )
]


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process, in which parts are gathered and joined as among several."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def options(names: frozenset[str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if "evict" in names:
        made["eviction"] = Eviction(Recency(0.5), interval=64)
    if "sparse" in names:  # all tokens survive, by way of scores, threshold and weights
        made["sparse"] = SparseSpec(top_k=100_000, min_context=0)
    if "shard" in names:
        made["sharding"] = Sharding()
    return made


@cache
def reader(shared: bool) -> Any:
    return model("gemma4_text", **SHARED) if shared else model()


@cache
def read(names: frozenset[str]) -> tuple[torch.Tensor, list[int]]:
    """Logits of 270 tokens in chunks and steps, and how many tokens the packed layers hold as pages."""
    made = reader("share" in names)
    packed = ForgeCache(made, SPEC, **options(names))
    ids = torch.randint(1, 97, (1, 270), generator=torch.Generator().manual_seed(1))
    at, logits = 0, []
    for n in (170, 90, *[1] * 10):
        logits.append(made(ids[:, at : at + n], past_key_values=packed).logits)
        at += n
    held = [int(x.cache.packed_lengths[0]) for x in packed.layers if getattr(x, "cache", None) is not None]
    return torch.cat(logits, 1), held


@pytest.mark.parametrize("names", TOGETHER, ids=lambda names: "+".join(sorted(names)) or "none")
def test_together(names: frozenset[str]) -> None:
    if "shard" in names and names & {"evict", "sparse"}:
        with pytest.raises(ValueError, match=r"\[cache\] expected sharding alone; got it with (eviction|sparse)"):
            ForgeCache(reader("share" in names), SPEC, **options(names))
        return
    found, held = read(names)
    plain, all_held = read(names & {"evict", "share"})
    assert float((found - plain).abs().max() / plain.abs().max()) < HF["codes"]
    assert held == all_held
    whole, most = read(names & {"share"})
    assert ("evict" in names) == (held < most)
    assert ("evict" in names) == (not torch.equal(plain, whole))
