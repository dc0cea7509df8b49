"""Compiling what a packed cache will need before a user waits for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock

from ...codec import PAGE
from ...util.progress import progress
from .cache import PackedKVCache
from .prompt import patched

log = logging.getLogger("forgeattention")


def warm_up(model: Any, make: Callable[[], list[Any]]) -> float:
    """Reads a made-up prompt of a few hundred tokens into a cache that is then thrown away, so that every kernel which
    such a cache needs is compiled: MLX compiles a kernel at its first use, some for seconds.

    A bar on a terminal shows how far it is; the log says what it took.

    Args:
        model: mlx-lm's model.
        make: makes the cache, as `make_prompt_cache` does.

    Returns:
        Seconds.
    """
    start = time.perf_counter()
    with patched():
        cache = make()
        parts = [part for layer in cache for part in getattr(layer, "caches", [layer])]
        specs = [part.spec for part in parts if isinstance(part, PackedKVCache)]
        if not specs:
            return 0.0
        # A page and the exact tokens around it, then a piece of a prompt that reads the page, then single tokens.
        longest = max(spec.sinks + spec.window for spec in specs) + PAGE
        steps = (longest, 2 * PAGE, 1, 1)
        with progress("compiling kernels", len(steps)) as advance:
            for n in steps:
                logits = model(mx.zeros((1, n), dtype=mx.int32), cache=cache)
                mx.eval(logits, [part.state for part in parts if not isinstance(part, PackedKVCache | stock.CacheList)])
                advance()
    seconds = time.perf_counter() - start
    log.info("kernels are compiled: %.1f s", seconds)
    return seconds
