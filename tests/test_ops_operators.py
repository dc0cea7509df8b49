"""The ops under torch.compile, torch.export and torch.library's own checks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ops_cases import Case, make_case

from forgeattention import ops
from forgeattention.backends.cpu import attention
from forgeattention.codec import CodecSpec
from forgeattention.codec.codec import codec_of
from forgeattention.ops import registry
from forgeattention.ops.operators import OPERATORS
from forgeattention.ops.registry import OPS

torch.manual_seed(0)
TOKENS = 128


@pytest.fixture(scope="module")
def case() -> Case:
    made = make_case(CodecSpec(), exact=(40, 7, 3), n=2)
    return replace(made, table=replace(made.table, max_length=150))


def page_arguments(case: Case) -> tuple[torch.Tensor, ...]:
    k, v = torch.randn(2, 2, TOKENS, 64)
    out = torch.zeros(2 * case.codec.page_bytes, dtype=torch.uint8)
    return k, v, out, torch.arange(2) * case.codec.page_bytes


def row_arguments(case: Case) -> tuple[torch.Tensor, ...]:
    k, v = torch.randn(2, 3, 2, 64, 64)
    out = torch.zeros(2 * case.codec.page_bytes, dtype=torch.uint8)
    return k, v, out, torch.tensor([case.codec.page_bytes, -1, 0])


def calls(case: Case) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Per operator a function around the public op, with its tensors."""
    codec, table, exact, q = case.codec, case.table, case.exact, case.q
    weights = torch.randn(*q.shape[:3], table.max_length)

    def encode(k: Any, v: Any, out: Any, at: Any) -> Any:
        out = out + 0
        ops.encode(k * 2, v, codec, out, at)
        return out

    def append_tokens(k: Any, v: Any) -> Any:
        to_k, to_v, lengths = exact.k + 0, exact.v + 0, exact.lengths + 0
        ops.append_tokens(to_k, to_v, lengths, k * 2, v)
        return to_k, to_v, lengths

    def append_step(k: Any, v: Any) -> Any:
        to_k, to_v = (torch.zeros(3, 2, 70, 64) for _ in range(2))
        exact, packed = torch.tensor([0, 69, 66], dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
        offsets, tickets = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)
        table = torch.arange(6).reshape(3, 2)
        ops.append_step(to_k, to_v, exact, packed, table, offsets, tickets, k * 2, v, sinks=1, encode_at=67)
        return to_k, to_v, exact, packed, offsets

    def encode_rows(k: Any, v: Any, out: Any, at: Any) -> Any:
        out = out + 0
        ops.encode_rows(k * 2, v, codec, out, at)
        return out

    def compact(base: Any) -> Any:
        return ops.compact(base + 0, table.page_table[:2].reshape(-1)[:2], codec.page_bytes)

    def decode_attention(q: Any) -> Any:
        return ops.decode_attention(q * 2, codec, table, exact, 0.1)

    def decode_pages() -> Any:
        k, v = ops.decode_pages(codec, table, dtype=torch.float16)
        return k + v

    def decode_into(q: Any) -> Any:
        k, v = torch.ones(2, len(q), codec.kv_heads, 3 + table.max_length, codec.head_dim).unbind()
        ops.decode_into(codec, table, k, v, 2)
        return k + v

    def prefill_attention(q: Any) -> Any:
        packed = ops.prefill_attention(q, codec, table, 0.1)
        return ops.merge(*packed, *ops.prefill_attention(q + 1, codec, table, 0.1))

    def merge(q: Any) -> Any:
        lse = q[..., 0] * 1
        return ops.merge(q, lse, q + 1, lse * 2)

    def qk_scores(q: Any) -> Any:
        return ops.qk_scores(q, codec, table, 0.1) * 2

    def value_sum(p: Any) -> Any:
        return ops.value_sum(p * p, codec, table)

    def sparse_scores(q: Any) -> Any:
        found = ops.sparse_scores(q, codec, table, 0.1)
        return found.scores * 2, found.pages

    def sparse_threshold(q: Any) -> Any:
        found = ops.sparse_threshold(ops.sparse_scores(q, codec, table, 0.1), table, top_k=7)
        return found.score, found.last, found.kept, found.dropped, found.top

    def sparse_attention(q: Any) -> Any:
        other = ops.decode_attention(q, codec, None, exact, 0.1)
        scores = ops.sparse_scores(q, codec, table, 0.1)
        threshold = ops.sparse_threshold(scores, table, top_p=0.9, exact_lse=other[1])
        return ops.sparse_attention(scores, threshold, codec, table, other=other)

    def page_scores(q: Any) -> Any:
        return ops.page_scores(q, codec, table, 0.1)

    def page_select(q: Any) -> Any:
        return ops.page_select(ops.page_scores(q, codec, table, 0.1), codec, table, top_k=2)

    new = torch.randn(2, *exact.k.shape[:2], 2, exact.k.shape[3]).to(exact.k.dtype)
    return {
        "encode": (encode, page_arguments(case)),
        "append_tokens": (append_tokens, (new[0], new[1])),
        "append_step": (append_step, (torch.randn(3, 2, 1, 64), torch.randn(3, 2, 1, 64))),
        "encode_rows": (encode_rows, row_arguments(case)),
        "decode_attention": (decode_attention, (q,)),
        "decode_pages": (decode_pages, ()),
        "decode_into": (decode_into, (q,)),
        "compact": (compact, (table.base,)),
        "prefill_attention": (prefill_attention, (q,)),
        "merge": (merge, (q,)),
        "qk_scores": (qk_scores, (q,)),
        "value_sum": (value_sum, (weights,)),
        "sparse_scores": (sparse_scores, (q,)),
        "sparse_threshold": (sparse_threshold, (q,)),
        "sparse_attention": (sparse_attention, (q,)),
        "page_scores": (page_scores, (q,)),
        "page_select": (page_select, (q,)),
    }


NAMES = tuple(OPS)


def arguments(name: str, case: Case) -> list[Any]:
    """The operator's arguments, from those of the op."""
    codec, table, exact, q = case.codec, case.table, case.exact, case.q
    k, v, out, at = page_arguments(case)
    scores = ops.sparse_scores(q, codec, table, 0.1)
    threshold = ops.sparse_threshold(scores, table, top_k=5)
    o, lse = torch.randn_like(q), torch.randn(q.shape[:3])
    buffers = [torch.zeros(3, 2, 9, 64), torch.zeros(3, 2, 9, 64), torch.tensor([0, 9, 4], dtype=torch.int32)]
    given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "encode": ((k, v, codec, out, at), {}),
        "append_step": (
            (
                *torch.zeros(2, 3, 2, 70, 64),
                *torch.tensor([[0, 69, 66], [0, 0, 64]], dtype=torch.int32),
                torch.arange(6).reshape(3, 2),
                torch.zeros(3, dtype=torch.int64),
                torch.zeros(3, dtype=torch.int32),
                *torch.randn(2, 3, 2, 1, 64),
            ),
            {"sinks": 1, "encode_at": 67},
        ),
        "encode_rows": ((*row_arguments(case)[:2], codec, *row_arguments(case)[2:]), {}),
        "append_tokens": ((*buffers, torch.randn(3, 2, 2, 64), torch.randn(3, 2, 2, 64)), {}),
        "decode_attention": ((q, codec, table, exact, 0.1), {"sink_logits": torch.randn(q.shape[1])}),
        "decode_pages": ((codec, table), {"rotated": True}),
        "decode_into": ((codec, table, *torch.zeros(2, len(q), codec.kv_heads, 300, codec.head_dim), 1), {}),
        "compact": ((table.base, torch.arange(2) * codec.page_bytes, codec.page_bytes), {}),
        "prefill_attention": ((q, codec, table, 0.1), {}),
        "merge": ((o, lse, o + 1, lse), {}),
        "qk_scores": ((q, codec, table, 0.1), {}),
        "value_sum": ((torch.randn(*q.shape[:3], table.max_length), codec, table), {}),
        "sparse_scores": ((q, codec, table, 0.1), {}),
        "sparse_threshold": ((scores, table), {"top_k": torch.full((q.shape[1],), 3, dtype=torch.int32)}),
        "sparse_attention": ((scores, threshold, codec, table), {"other": (o, lse)}),
        "page_scores": ((q, codec, table, 0.1), {}),
        "page_select": ((ops.page_scores(q, codec, table, 0.1), codec, table), {"top_p": 0.5, "exact_lse": lse}),
    }
    return OPERATORS[name].spread(*given[name])


@pytest.mark.parametrize("name", NAMES)
def test_operator(name: str, case: Case) -> None:
    torch.library.opcheck(getattr(torch.ops.forgeattention, name).default, tuple(arguments(name, case)))


def same(a: Any, b: Any) -> None:
    for x, y in zip(*((z if isinstance(z, tuple) else (z,)) for z in (a, b)), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize("name", NAMES)
def test_compiled(name: str, case: Case) -> None:
    function, given = calls(case)[name]
    torch.compiler.reset()
    same(torch.compile(function, fullgraph=True, backend="aot_eager")(*given), function(*given))


def test_compiled_with_a_table_of_its_own(case: Case) -> None:
    """Tables and lengths made in the traced function, with lengths that change from call to call."""
    codec, exact, q, full = case.codec, case.exact, case.q, case.table

    def step(lengths: torch.Tensor, most: int) -> torch.Tensor:
        table = ops.PageTable(full.base, full.page_table, lengths + 0, most)
        return ops.decode_attention(q, codec, table, exact, 0.1)[0]

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for length in (64, 65, 100):
        lengths = torch.tensor([length, 0, 64], dtype=torch.int32)
        same(compiled(lengths, length), step(lengths, length))


def test_a_uniform_table_stays_one(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill of uneven rows waits for a CUDA device, so an operator must not forget that rows are even."""
    row = int(case.table.lengths.argmax())
    one = slice(row, row + 1)
    length = int(case.table.lengths[row])
    table = ops.PageTable(case.table.base, case.table.page_table[one], case.table.lengths[one], length, uniform=True)
    queries = case.q[one]
    seen = []

    def prefill(q: Any, codec: Any, table: Any, scale: float) -> Any:
        seen.append(table.uniform)
        return attention.prefill_attention(q, codec, table, scale)

    monkeypatch.setattr(registry, "find", lambda *_: (prefill, ""))
    monkeypatch.setattr(registry, "of_torch", registry.of_torch.__wrapped__)  # it has found the real one
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q: ops.prefill_attention(q, case.codec, table, 0.1), fullgraph=True, backend="aot_eager"
    )
    same(compiled(queries), ops.prefill_attention(queries, case.codec, table, 0.1))
    assert seen == [True, True]


def test_exported(case: Case) -> None:
    codec, table, exact = case.codec, case.table, case.exact

    class Layer(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return ops.decode_attention(q, codec, table, exact, 0.1)[0]

    program = torch.export.export(Layer(), (case.q,))
    assert any("forgeattention" in str(node.target) for node in program.graph.nodes)
    same(program.module()(case.q), Layer()(case.q))


def test_errors_come_through(case: Case) -> None:
    def wrong(q: torch.Tensor) -> Any:
        return ops.qk_scores(q, case.codec, case.table, -1.0)

    torch.compiler.reset()
    with pytest.raises(ValueError, match=r"\[qk_scores\] expected a positive finite softmax scale; got -1.0"):
        torch.compile(wrong, backend="aot_eager")(case.q)


def test_traced_encode_wants_a_tensor_to_write(case: Case) -> None:
    with pytest.raises(ValueError, match=r"\[encode\] expected out, a tensor, in traced code; got None"):
        OPERATORS["encode"].spread((*page_arguments(case)[:2], case.codec, None, torch.zeros(2, dtype=torch.int64)), {})


def test_a_handle_lives_as_long_as_its_codec() -> None:
    codec = make_case(CodecSpec()).codec
    handle = codec.handle
    assert codec_of(handle) is codec
    del codec
    with pytest.raises(ValueError, match="expected the handle of a living codec"):
        codec_of(handle)


def test_eager_calls_of_other_frameworks_are_not_traced(case: Case) -> None:
    out, _ = ops.decode_attention(case.q.numpy(), case.codec, None, None, 0.1, causal=False)
    assert isinstance(out, np.ndarray)
