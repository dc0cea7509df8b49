"""The ops under torch.compile, torch.export and torch.library's own checks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ops_cases import Case, make_case

from forgeattention import ops
from forgeattention.codec import CodecSpec
from forgeattention.codec.codec import codec_of
from forgeattention.ops import library

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


def calls(case: Case) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Per operator a function around the public op, with its tensors."""
    codec, table, exact, q = case.codec, case.table, case.exact, case.q
    weights = torch.randn(*q.shape[:3], table.max_length)

    def encode(k: Any, v: Any, out: Any, at: Any) -> Any:
        out = out + 0
        ops.encode(k * 2, v, codec, out, at)
        return out

    def decode_attention(q: Any) -> Any:
        return ops.decode_attention(q * 2, codec, table, exact, 0.1)

    def decode_pages() -> Any:
        k, v = ops.decode_pages(codec, table, dtype=torch.float16)
        return k + v

    def prefill_attention(q: Any) -> Any:
        packed = ops.prefill_attention(q, codec, table, 0.1)
        return ops.merge(*packed, *ops.prefill_attention(q + 1, codec, table, 0.1))

    def qk_scores(q: Any) -> Any:
        return ops.qk_scores(q, codec, table, 0.1) * 2

    def value_sum(p: Any) -> Any:
        return ops.value_sum(p * p, codec, table)

    return {
        "encode": (encode, page_arguments(case)),
        "decode_attention": (decode_attention, (q,)),
        "decode_pages": (decode_pages, ()),
        "prefill_attention": (prefill_attention, (q,)),
        "qk_scores": (qk_scores, (q,)),
        "value_sum": (value_sum, (weights,)),
    }


NAMES = ("encode", "decode_attention", "decode_pages", "prefill_attention", "qk_scores", "value_sum")


def arguments(name: str, case: Case) -> tuple[Any, ...]:
    handle, table, exact = case.codec.handle, case.table, case.exact
    where = table.base, table.offsets, table.lengths, table.max_length
    weights = torch.randn(*case.q.shape[:3], table.max_length)
    k, v, out, at = page_arguments(case)
    return {
        "encode": (k, v, handle, out, at, "auto"),
        "decode_attention": (
            *(case.q, handle, *where, exact.k, exact.v, exact.lengths, exact.max_length),
            *(0.1, True, torch.randn(case.q.shape[1]), "auto"),
        ),
        "decode_pages": (handle, *where, "float32", True, "auto"),
        "prefill_attention": (case.q, handle, *where, 0.1, "auto"),
        "qk_scores": (case.q, handle, *where, 0.1, "auto"),
        "value_sum": (weights, handle, *where, "auto"),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_operator(name: str, case: Case) -> None:
    torch.library.opcheck(getattr(torch.ops.forgeattention, name).default, arguments(name, case))


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
        table = ops.PageTable(full.base, full.offsets, lengths + 0, most)
        return ops.decode_attention(q, codec, table, exact, 0.1)[0]

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for length in (64, 65, 100):
        lengths = torch.tensor([length, 0, 64], dtype=torch.int32)
        same(compiled(lengths, length), step(lengths, length))


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
        library.encode(*page_arguments(case)[:2], case.codec, None, torch.zeros(2, dtype=torch.int64), "auto")


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
