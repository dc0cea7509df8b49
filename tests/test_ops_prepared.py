"""A prepared decode_attention gives what decode_attention gives, and refuses what was not prepared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ops_cases import Case, make_case

from forgeattention import ops
from forgeattention.backends.cuda import nvrtc
from forgeattention.codec import CodecSpec
from forgeattention.ops import ExactTokens, PageTable, PreparedDecode

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not nvrtc.available()[0], reason=nvrtc.available()[1]))
DEVICES = pytest.mark.parametrize("device", ["numpy", "cpu", CUDA])


def on(device: str, x: Any) -> Any:
    return x.numpy().copy() if device == "numpy" else x.to(device, copy=True)


def moved(case: Case, device: str) -> Case:
    table, exact = case.table, case.exact
    parts = [on(device, x) for x in (table.base, table.page_table, table.lengths)]
    tokens = [on(device, x) for x in (exact.k, exact.v, exact.lengths)]
    return replace(
        case,
        table=PageTable(*parts, table.max_length),
        exact=ExactTokens(*tokens, exact.max_length),
        q=on(device, case.q),
    )


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert np.array_equal(*(np.asarray(z.cpu() if isinstance(z, torch.Tensor) else z) for z in (x, y)))


@DEVICES
@pytest.mark.parametrize("n", [1, 2])
def test_same_results_as_arrays_change_in_place(device: str, n: int) -> None:
    case = moved(make_case(CodecSpec(), n=n), device)
    sinks = on(device, torch.linspace(-1, 3, case.q.shape[1]))
    arguments = case.codec, case.table, case.exact, case.scale
    attend = PreparedDecode(case.q, *arguments, sink_logits=sinks)
    exact = case.exact
    for step in range(3):
        q = case.q * (1 + step)
        same(attend(q, case.table, exact), ops.decode_attention(q, *arguments, sink_logits=sinks))
        case.exact.k[:, :, :3] += 0.5
        case.table.lengths[0] -= 1
    same(
        attend(case.q, None, exact),
        ops.decode_attention(case.q, case.codec, None, exact, case.scale, sink_logits=sinks),
    )


@DEVICES
def test_tokens_that_grow_are_seen(device: str) -> None:
    case = moved(make_case(CodecSpec(), exact=(40, 7, 3)), device)
    attend = PreparedDecode(case.q, case.codec, case.table, case.exact, case.scale)
    case.exact.k[0, :, 40], case.exact.v[0, :, 40] = 0.25, 2.0  # the cases' capacity is two more than the longest
    case.exact.lengths[0] += 1
    grown = case.exact.grown(41)
    assert grown.max_length == 41
    assert grown.checked is case.exact.checked
    want = ops.decode_attention(case.q, case.codec, case.table, replace(case.exact, max_length=41), case.scale)
    same(attend(case.q, case.table, grown), want)
    with pytest.raises(ValueError, match=r"\[exact_tokens\] expected max_length within 42; got 43"):
        case.exact.grown(43)


def test_a_smaller_batch_and_the_oracle() -> None:
    case = make_case(CodecSpec())
    attend = PreparedDecode(case.q, case.codec, case.table, case.exact, case.scale, backend="reference")
    one = case.row(0)
    same(attend(one.q, one.table, one.exact), one.attend(backend="reference"))


def test_what_was_not_prepared_is_refused() -> None:
    case = make_case(CodecSpec())
    attend = PreparedDecode(case.q, case.codec, case.table, case.exact, case.scale)
    given = case.table, case.exact
    wrong = [
        (case.q.half(), r"q torch.float32 \[batch, 6, 1, 64\] as prepared; got float16"),
        (case.q[:, :3], r"q torch.float32 \[batch, 6, 1, 64\] as prepared; got float32 \[3, 3, 1, 64\]"),
        (case.q.numpy(), r"q torch.float32 .* as prepared"),
    ]
    for q, message in wrong:
        with pytest.raises(ValueError, match=r"\[decode_attention\] expected " + message):
            attend(q, *given)
    with pytest.raises(ValueError, match=r"expected table\.lengths int32"):
        attend(case.q, replace(case.table, lengths=case.table.lengths.long()), case.exact)
    with pytest.raises(ValueError, match=r"expected table\.lengths int32"):
        attend(case.q[:2], *given)
    with pytest.raises(ValueError, match=r"expected exact\.v"):
        attend(case.q, case.table, replace(case.exact, v=case.exact.v.half()))
    with pytest.raises(ValueError, match="expected at least 1 exact tokens"):
        attend(case.q, case.table, replace(case.exact, max_length=0))
    with pytest.raises(ValueError, match="a positive finite softmax scale"):
        PreparedDecode(case.q, case.codec, *given, -1.0)


def test_traced() -> None:
    case = make_case(CodecSpec())
    attend = PreparedDecode(case.q, case.codec, case.table, case.exact, case.scale)
    torch.compiler.reset()
    compiled = torch.compile(lambda q: attend(q, case.table, case.exact), fullgraph=True, backend="aot_eager")
    same(compiled(case.q), attend(case.q, case.table, case.exact))
