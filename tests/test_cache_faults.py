"""A call of a cache that is interrupted anywhere leaves it whole: as it was before, or as it is afterwards."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import forgeattention
from forgeattention import CodecSpec
from forgeattention.cache import LayerCache, TorchArrays
from forgeattention.codec import Codec

CODEC = Codec(CodecSpec(k_bits=2, v_bits=2, sinks=3, window=20, refine=False), 64, 2)
HOME = str(Path(forgeattention.__file__).parent)
WHOLE = ("pool.py",)
"""Files whose functions are not interrupted: taking and giving back pages are single acts here."""


def tokens(batch: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = torch.randn(2, batch, 2, n, 64, generator=torch.Generator().manual_seed(seed))
    return k, v


def made() -> LayerCache:
    cache = LayerCache(CODEC, 2, TorchArrays())
    keep = np.ones((2, 150), np.bool_)
    keep[0, :40] = False
    cache.append(*tokens(2, 150), keep)
    return cache


def contents(cache: LayerCache) -> list[Any]:
    """All that a cache says of itself, on the host and on the device."""
    out: list[Any] = [cache.lengths.tolist(), cache.packed_lengths.tolist(), cache.exact_lengths.tolist()]
    table = cache.table
    out += [cache.exact.lengths.tolist(), [] if table is None else table.lengths.tolist()]
    for row in range(cache.batch):
        pages = cache.row_pages(row).tolist()
        out.append([cache.pool.page(page).numpy().tobytes() for page in pages])
        out.append(cache.page_starts(row).tolist())
        held = cache.exact_lengths[row]
        out += [x[row, :, :held].numpy().tobytes() for x in (cache.exact.k, cache.exact.v)]
        if table is not None:
            addresses = [cache.pool.page(page).data_ptr() for page in pages]
            assert table.page_table[row, : len(pages)].tolist() == addresses
    return out


def pages_of(*caches: LayerCache) -> int:
    return len({page for c in caches for row in range(c.batch) for page in c.row_pages(row).tolist()})


class Interrupted(KeyboardInterrupt):
    pass


def interrupted(call: Callable[[], Any], at: int) -> bool:
    """Runs a call that is interrupted at its `at`-th call of a function of ours; False where it ends before."""
    left = at

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(HOME) or name.endswith(WHOLE):
            return
        callers = frame
        while callers is not None:  # Python itself goes on where a destructor is interrupted
            if callers.f_code.co_name == "__del__":
                return
            callers = callers.f_back
        left -= 1
        if left < 0:
            sys.setprofile(None)
            raise Interrupted

    sys.setprofile(profile)
    try:
        call()
    except Interrupted:
        return True
    finally:
        sys.setprofile(None)
    return False


def join(cache: LayerCache) -> None:
    other = LayerCache(CODEC, 1, TorchArrays())
    other.append(*tokens(1, 120, 3))
    cache.join(other)


CALLS: dict[str, Callable[[LayerCache], Any]] = {
    "a token": lambda cache: cache.append(*tokens(2, 1, 1)),
    "a page": lambda cache: cache.append(*tokens(2, 63, 1)),
    "a chunk": lambda cache: cache.append(*tokens(2, 200, 1)),
    "a step": lambda cache: cache.step(torch.ones(2, 4, 1, 64), *tokens(2, 1, 1), 0.1),
    "a chunk's step": lambda cache: cache.step(torch.ones(2, 4, 100, 64), *tokens(2, 100, 1), 0.1),
    "trim": lambda cache: cache.trim([30, 90]),
    "clear": lambda cache: cache.clear(),
    "select": lambda cache: cache.select([1, 1, 0]),
    "evict": lambda cache: cache.evict(1, np.array([True])),
    "join": join,
}


@pytest.mark.parametrize("what", CALLS)
def test_an_interrupted_call_leaves_the_cache_whole(what: str) -> None:
    before, after = made(), made()
    CALLS[what](after)
    states = [contents(before), contents(after)]
    at, seen = 0, set()
    while True:
        cache = made()
        if not interrupted(lambda cache=cache: CALLS[what](cache), at):
            break
        found = contents(cache)
        assert found in states, f"interrupted at call {at}"
        seen.add(states.index(found))
        assert cache.pool.in_use == pages_of(cache), f"interrupted at call {at}"
        if found == states[0]:
            CALLS[what](cache)
            assert contents(cache) == states[1], f"tried again after call {at}"
        cache.clear()
        assert cache.pool.in_use == 0, f"interrupted at call {at}"
        at += 1
    assert at > 3
    assert 0 in seen
