"""What each rank of an MLX ring does in the tests; run by mlx.launch."""

from __future__ import annotations

import mlx.core as mx

from forgeattention.cache.sharded import merge_parts, merge_ranks

if __name__ == "__main__":
    group = mx.distributed.init(strict=True)
    parts = [
        (mx.random.normal((2, 3, 1, 16), key=mx.random.key(r)), mx.random.normal((2, 3, 1), key=mx.random.key(9 + r)))
        for r in range(group.size())
    ]
    want, got = merge_parts(parts), merge_ranks(*parts[group.rank()], group)
    assert mx.array_equal(want[0], got[0])
    assert mx.array_equal(want[1], got[1])
    print("rank done", flush=True)
