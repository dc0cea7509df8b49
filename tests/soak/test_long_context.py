"""A context of 2^21 tokens whose pages lie further apart than 2^31 bytes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import tolerances
from ops_cases import relative

from forgeattention import CodecSpec, ops
from forgeattention.codec import PAGE, Codec
from forgeattention.ops import PageTable

TOKENS = 2**21
POOL = 2**31 + 2**29
"""Bytes of the pool; the row's pages are dealt out over all of it."""


def test_two_million_tokens(counts: Counter[str]) -> None:
    """One head of 64 channels: few distinct pages are coded and copied to every place, so that the answer is known."""
    codec = Codec(CodecSpec(k_bits=2, v_bits=2, refine=False), 64, 1)
    rng, distinct = np.random.default_rng(0), 512
    k, v = rng.standard_normal((2, 1, distinct * PAGE, 64)).astype(np.float32)
    size, pages = codec.page_bytes, TOKENS // PAGE
    base = np.zeros(POOL, np.uint8)
    at = np.arange(pages, dtype=np.int64) * ((POOL - size) // pages // 16 * 16)
    coded = np.zeros((distinct, size), np.uint8)
    ops.encode(k, v, codec, coded.reshape(-1), np.arange(distinct) * size)
    for page, place in enumerate(at.tolist()):
        base[place : place + size] = coded[page % distinct]
    assert at[-1] > 2**31
    counts["tokens"], counts["bytes"] = TOKENS, POOL
    once = PageTable(
        coded.reshape(-1), np.arange(distinct)[None] * size, np.array([distinct * PAGE], np.int32), distinct * PAGE
    )
    whole = PageTable(base, at[None], np.array([TOKENS], np.int32), TOKENS)
    q = rng.standard_normal((1, 2, 1, 64)).astype(np.float32)
    out, lse = ops.decode_attention(q, codec, whole, None, 0.125, causal=False)
    want, want_lse = ops.decode_attention(q, codec, once, None, 0.125, causal=False, backend="reference")
    assert relative(out, want) < tolerances.CPU_ATTENTION["float32"]
    np.testing.assert_allclose(lse, want_lse + np.log(pages / distinct), atol=tolerances.CPU_LSE)
    scores = ops.qk_scores(q, codec, whole, 0.125)
    alone = ops.qk_scores(q, codec, once, 0.125)
    np.testing.assert_array_equal(
        scores.reshape(2, -1, distinct * PAGE),
        np.broadcast_to(alone.reshape(2, 1, -1), (2, pages // distinct, distinct * PAGE)),
    )
    found = ops.sparse_scores(q, codec, whole, 0.125)
    limits = ops.sparse_threshold(found, whole, top_k=TOKENS)
    assert limits.kept.tolist() == [[[TOKENS], [TOKENS]]]
    sparse, _ = ops.sparse_attention(found, limits, codec, whole)
    assert relative(sparse, want) < tolerances.CPU_ATTENTION["float32"]
    last = PageTable(base, at[None, -1:], np.array([PAGE], np.int32), PAGE)
    for a, b in zip(
        ops.decode_pages(codec, last),
        ops.decode_pages(
            codec,
            PageTable(coded.reshape(-1), np.array([[(pages - 1) % distinct * size]]), np.array([PAGE], np.int32), PAGE),
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
