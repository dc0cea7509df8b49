"""Every op of the CPU kernels by several threads at once, without torch: what `make sanitize` runs under TSan.

The kernels' own pool does the work; torch's OpenMP runtime is not instrumented and would be reported wrongly.
"""

from __future__ import annotations

import os
import sys
import threading

import numpy as np

from forgeattention import ops
from forgeattention.codec import PAGE, Codec, CodecSpec

PAGES, CALLERS, CALLS = 12, 3, 6


def main() -> None:
    codec, rng = Codec(CodecSpec(v_code="trellis4"), 64, 2), np.random.default_rng(0)
    k, v = rng.standard_normal((2, 2, PAGES * PAGE, 64)).astype(np.float32)
    q = rng.standard_normal((1, 4, 3, 64)).astype(np.float32)
    pool = np.zeros(PAGES * codec.page_bytes, np.uint8)
    at = np.arange(PAGES) * codec.page_bytes
    ops.set_num_threads(4)

    def every(own: np.ndarray) -> list[np.ndarray]:
        ops.encode(k, v, codec, own, at)
        table = ops.PageTable(own, at[None], np.array([PAGES * PAGE - 7], np.int32), PAGES * PAGE)
        exact = ops.ExactTokens(k[None, :, :9], v[None, :, :9], np.array([9], np.int32), 9)
        scores = ops.sparse_scores(q, codec, table, 0.125)
        limits = ops.sparse_threshold(scores, table, top_p=0.9)
        means = ops.page_scores(q, codec, table, 0.125)
        weights = np.abs(rng.standard_normal((1, 4, 3, PAGES * PAGE))).astype(np.float32) * 0 + 1
        return [
            *ops.decode_attention(q, codec, table, exact, 0.125),
            *ops.prefill_attention(np.repeat(q, 30, 2), codec, table, 0.125),
            *ops.decode_pages(codec, table),
            ops.qk_scores(q, codec, table, 0.125),
            ops.value_sum(weights, codec, table),
            *ops.sparse_attention(scores, limits, codec, table),
            means,
            ops.compact(own, at, codec.page_bytes),
        ]

    want, wrong = every(pool), []

    def call() -> None:
        for _ in range(CALLS):
            found = every(np.zeros_like(pool))
            wrong.extend(i for i, (a, b) in enumerate(zip(found, want, strict=True)) if not np.array_equal(a, b))

    callers = [threading.Thread(target=call) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    child = os.fork()  # a child has no workers and starts its own
    if child == 0:
        os._exit(0 if all(np.array_equal(a, b) for a, b in zip(every(np.zeros_like(pool)), want)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert not wrong, wrong
    assert "torch" not in sys.modules
    print(f"{CALLERS * CALLS + 2} rounds of every op by {CALLERS} threads over 4 workers, and in a child")


if __name__ == "__main__":
    main()
