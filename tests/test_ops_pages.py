"""append_tokens and page_select of every backend that this machine has, against the oracle; merge's checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ops_cases import make_case

from forgeattention import ops
from forgeattention.backends.cuda import nvrtc
from forgeattention.codec import PAGE, CodecSpec

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not nvrtc.available()[0], reason=nvrtc.available()[1]))
DEVICES = pytest.mark.parametrize("device", ["numpy", "cpu", CUDA])


def on(device: str, x: torch.Tensor) -> Any:
    return x.numpy().copy() if device == "numpy" else x.to(device, copy=True)


def host(x: Any) -> torch.Tensor:
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x.cpu()


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_append_tokens(device: str, dtype: torch.dtype, backend: str) -> None:
    """Rows of different lengths, keys with strides, a row without room."""
    if device == "numpy" and dtype == torch.bfloat16:
        dtype = torch.float16  # NumPy has no bfloat16
    k, v = torch.randn(3, 2, 4, 64).to(dtype).transpose(1, 2), torch.randn(3, 4, 2, 64).to(dtype)
    buffers = [on(device, torch.full((3, 4, 10, 64), 7.0).to(dtype)) for _ in range(2)]
    lengths = on(device, torch.tensor([0, 7, 9], dtype=torch.int32))
    ops.append_tokens(*buffers, lengths, on(device, k), on(device, v), backend=backend)
    assert lengths.tolist() == [2, 9, 9]
    for buffer, new in zip(buffers, (k, v), strict=True):
        want = torch.full((3, 4, 10, 64), 7.0).to(dtype)
        want[0, :, :2], want[1, :, 7:9] = new[0], new[1]
        assert torch.equal(host(buffer), want)


def test_append_tokens_checks_before_it_writes() -> None:
    buffers, lengths = torch.zeros(2, 1, 2, 4, 64), torch.zeros(1, dtype=torch.int32)
    k = torch.ones(1, 2, 1, 64)
    with pytest.raises(ValueError, match=r"\[append_tokens\] expected v float32 \[1, 2, 1, 64\]; got float16"):
        ops.append_tokens(*buffers, lengths, k, k.half())
    with pytest.raises(ValueError, match=r"\[append_tokens\] expected lengths int32 \[1\]; got int64 \[1\]"):
        ops.append_tokens(*buffers, lengths.long(), k, k)
    assert not buffers.any()


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("most", [128, 130])
def test_decode_into(device: str, dtype: torch.dtype, backend: str, most: int) -> None:
    """Rows of several lengths; what lies before and behind their tokens stays."""
    if device == "numpy" and dtype == torch.bfloat16:
        dtype = torch.float16
    case = make_case(CodecSpec(), lengths=(128, 100, 0), exact=(1, 1, 1))
    table = ops.PageTable(*(on(device, x) for x in (case.table.base, case.table.page_table, case.table.lengths)), most)
    want = ops.decode_pages(case.codec, table, dtype=str(dtype).rpartition(".")[2], backend=backend)
    found = [on(device, torch.full((3, case.codec.kv_heads, 140, 64), 7.0).to(dtype)) for _ in range(2)]
    ops.decode_into(case.codec, table, *found, 5, backend=backend)
    for x, y in zip(map(host, found), map(host, want), strict=True):
        assert torch.equal(x[:, :, 5 : 5 + most], y)
        assert (x[:, :, :5] == 7).all()
        assert (x[:, :, 5 + most :] == 7).all()


def test_decode_into_checks_before_it_writes() -> None:
    case = make_case(CodecSpec(), lengths=(128,), exact=(1,))
    heads, table = case.codec.kv_heads, case.table
    k, v = torch.zeros(2, 1, heads, 135, 64)
    with pytest.raises(ValueError, match=r"\[decode_into\] expected room for 133 tokens from index 3 on; got 135"):
        ops.decode_into(case.codec, table, k, v, 3)
    with pytest.raises(ValueError, match=r"\[decode_into\] expected room for 133 tokens from index -1 on; got 135"):
        ops.decode_into(case.codec, table, k, v, -1)
    with pytest.raises(ValueError, match=rf"expected v float32 \[1, {heads}, 135, 64\]; got float16"):
        ops.decode_into(case.codec, table, k, v.half(), 0)
    with pytest.raises(ValueError, match=r"\[decode_into\] expected v contiguous; got other strides"):
        ops.decode_into(case.codec, table, k, v.transpose(1, 2).contiguous().transpose(1, 2), 0)
    assert not k.any()
    assert not v.any()


@DEVICES
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("chosen", [{"top_k": 2}, {"top_k": 9}, {"top_k": 0}, {"top_p": 0.7}, {"top_p": 0.99}], ids=str)
@pytest.mark.parametrize("exact", [True, False])
def test_page_select(device: str, n: int, chosen: dict[str, Any], exact: bool) -> None:
    case = make_case(CodecSpec(), lengths=(5 * PAGE, 0, 2 * PAGE), n=n, exact=(9, 9, 9))
    rng = np.random.default_rng(1)
    pages = -(-case.table.max_length // PAGE)
    means = torch.from_numpy(rng.standard_normal((3, case.q.shape[1], n, pages)).astype(np.float32)) * 2
    for row, used in enumerate((5, 0, 2)):
        means[row, ..., used:] = -torch.inf
    lse = torch.from_numpy(rng.standard_normal(means.shape[:3]).astype(np.float32)) + 3 if exact else None
    want = ops.page_select(means, case.codec, case.table, exact_lse=lse, backend="reference", **chosen)
    table = ops.PageTable(
        None, on(device, case.table.page_table), on(device, case.table.lengths), case.table.max_length
    )
    given = on(device, means), case.codec, table
    got = ops.page_select(*given, exact_lse=None if lse is None else on(device, lse), **chosen)
    assert [str(x.dtype).rpartition(".")[2] for x in got] == ["int64", "int32", "bool"]
    offsets, tokens, read = map(host, got)
    assert torch.equal(tokens, want[1])
    assert torch.equal(read, want[2])
    for row, head in np.ndindex(*tokens.shape):
        count = int(tokens[row, head]) // PAGE
        assert sorted(offsets[row, head, :count].tolist()) == sorted(want[0][row, head, :count].tolist())
    assert (tokens[1] == 0).all()


def test_page_select_wants_one_of_its_limits() -> None:
    case = make_case(CodecSpec(), lengths=(PAGE,), exact=(1,))
    pages = -(-case.table.max_length // PAGE)
    means = torch.zeros(1, case.q.shape[1], 1, pages)
    with pytest.raises(ValueError, match=r"\[page_select\] expected either top_k or top_p; got None and None"):
        ops.page_select(means, case.codec, case.table)
    with pytest.raises(ValueError, match=r"\[page_select\] expected 0 < top_p < 1; got 1.0"):
        ops.page_select(means, case.codec, case.table, top_p=1.0)
    with pytest.raises(ValueError, match=r"\[page_select\] expected means of the 2 pages of the table; got 3"):
        ops.page_select(torch.zeros(1, case.q.shape[1], 1, 3), case.codec, case.table, top_k=1)


def test_merge_by_name_and_of_wrong_shapes() -> None:
    o, lse = torch.randn(2, 1, 2, 3, 8), torch.randn(2, 1, 2, 3)
    got, want = (ops.merge(o[0], lse[0], o[1], lse[1], backend=name) for name in ("cpu", "reference"))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, atol=1e-6)
    with pytest.raises(ValueError, match=r"\[merge\] expected lse2 \[1, 2, 3\]; got float32 \[1, 2\]"):
        ops.merge(o[0], lse[0], o[1], lse[1, ..., 0])
    with pytest.raises(
        ValueError, match=r"\[merge\] expected arrays that backend 'cuda' reads; got torch.Tensor on cpu"
    ):
        ops.merge(o[0], lse[0], o[1], lse[1], backend="cuda")
