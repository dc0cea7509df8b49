"""Traced ops on a GPU: the same results, and no wait for the device where the untraced op has none."""

from __future__ import annotations

from typing import Any

import pytest
from cuda_cases import Case

from forgeattention import ops
from forgeattention.backends.cuda import nvrtc
from forgeattention.ops.table import PageTable

available, reason = nvrtc.available()
pytestmark = pytest.mark.skipif(not available, reason=reason)
torch = pytest.importorskip("torch")


def same(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert x.stride() == y.stride()
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


def test_compiled_prefill_of_even_rows_does_not_wait() -> None:
    from test_cuda_ops import Setup

    setup = Setup(Case(n=16), [320, 320], [1, 1])
    table = PageTable(setup.table.base, setup.page_table, setup.table.lengths, 320, uniform=True)

    def prefill(q: Any) -> Any:
        return ops.prefill_attention(q, setup.codec, table, 0.1)

    torch.compiler.reset()
    compiled = torch.compile(prefill, fullgraph=True, backend="aot_eager")
    want = prefill(setup.q)
    same(compiled(setup.q), want)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = compiled(setup.q)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same(got, want)


def test_compiled_sparse_steps_and_merge() -> None:
    from test_cuda_ops import Setup

    setup = Setup(Case(n=2), [300, 70], [9, 5])
    codec, table = setup.codec, setup.table

    def step(q: Any) -> Any:
        exact = ops.decode_attention(q, codec, None, setup.exact, 0.1)
        scores = ops.sparse_scores(q, codec, table, 0.1)
        threshold = ops.sparse_threshold(scores, table, top_p=0.9, exact_lse=exact[1])
        out, lse = ops.sparse_attention(scores, threshold, codec, table, other=exact)
        means = ops.page_scores(q, codec, table, 0.1)
        chosen = ops.page_select(means, codec, table, top_k=2)
        merged = ops.merge(out.float(), lse, exact[0].float(), exact[1])
        return out, lse, scores.scores, scores.pages, threshold.score, threshold.kept, *chosen, *merged

    torch.compiler.reset()
    same(torch.compile(step, fullgraph=True, backend="aot_eager")(setup.q), step(setup.q))


def test_compiled_writes() -> None:
    from test_cuda_ops import Setup

    setup = Setup(Case(), [64], [3])
    k = torch.randn(2, 128, 128, device="cuda", dtype=torch.float16)
    at = torch.tensor([0, setup.codec.page_bytes], device="cuda")

    def write(k: Any) -> Any:
        out = torch.zeros(2 * setup.codec.page_bytes, dtype=torch.uint8, device="cuda")
        ops.encode(k * 2, k, setup.codec, out, at)
        to_k, to_v, lengths = setup.ek + 0, setup.ev + 0, setup.exact.lengths + 0
        ops.append_tokens(to_k, to_v, lengths, to_k[:, :, :2] * 2, to_v[:, :, :2])
        return out, to_k, to_v, lengths, ops.compact(out, at.flip(0), setup.codec.page_bytes)

    torch.compiler.reset()
    same(torch.compile(write, fullgraph=True, backend="aot_eager")(k), write(k))
