"""Checks an installed wheel in an environment that has nothing but it: run as a program, not by pytest.

Imports, encodes and attends on the CPU, and says how long the import took and how large the package is.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path


def main() -> None:
    begun = time.perf_counter()
    import forgeattention

    seconds = time.perf_counter() - begun
    loaded = {"numpy", "torch"} & set(sys.modules)
    folder = Path(forgeattention.__file__).parent
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    missing = [
        part
        for part in ("py.typed", "_native.pyi", "kernels/cuda/encode.cu", "kernels/shared/format.h", "kernels/metal")
        if not any(name.startswith(part) for name in names)
    ]
    if loaded or missing or "src" in folder.parts:
        raise SystemExit(f"expected a lazy import of a whole wheel; got {loaded} loaded, {missing} missing, {folder}")

    import numpy as np

    from forgeattention import ops
    from forgeattention.codec import Codec, CodecSpec
    from forgeattention.ops import PageTable

    codec = Codec(CodecSpec(), 64, 2)
    k, v = np.random.default_rng(0).standard_normal((2, 2, 128, 64), np.float32)
    pool = np.zeros(2 * codec.page_bytes, np.uint8)
    offsets = np.arange(2) * codec.page_bytes
    ops.encode(k, v, codec, pool, offsets)
    table = PageTable(pool, offsets[None], np.array([128], np.int32), 128)
    q = np.random.default_rng(1).standard_normal((1, 4, 1, 64), np.float32)
    found = ops.decode_attention(q, codec, table, None, 0.125)[0]
    keys, values = (np.repeat(x, 2, 0) for x in (k, v))
    scores = np.exp(0.125 * np.einsum("hd,htd->ht", q[0, :, 0], keys))
    want = np.einsum("ht,htd->hd", scores / scores.sum(1, keepdims=True), values)
    error = np.linalg.norm(found[0, :, 0] - want) / np.linalg.norm(want)
    if not error < 0.3:
        raise SystemExit(f"expected attention over 3-bit codes within 30 % of exact attention; got {error:.2f}")
    size = sum((folder / name).stat().st_size for name in names)
    print(f"import {seconds:.3f} s, {len(names)} files, {size / 1e6:.1f} MB, attention error {error:.3f}")


if __name__ == "__main__":
    main()
