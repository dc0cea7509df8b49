"""decode_attention, prefill_attention and merge of the CPU kernels against the oracle."""

import numpy as np
import pytest
import tolerances
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops_cases import CODES, DTYPES, Case, make_case, relative

from forgeattention import ops
from forgeattention.backends.cpu import native
from forgeattention.codec import CodecSpec

SCALAR = CodecSpec(k_code="scalar", scales="fp16")
TRELLIS = CodecSpec(k_code="trellis4", v_code="trellis8", scales="log8")


@pytest.fixture(params=native.isas())
def isa(request):
    before = native.isas()[0]
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


def check(case: Case, dtype: str = "float32", **changes):
    out, lse = case.attend(**changes)
    expected, expected_lse = case.attend("reference", **changes)
    assert out.dtype == case.q.dtype
    assert lse.dtype == torch.float32
    assert relative(out, expected) < tolerances.CPU_ATTENTION[dtype]
    finite = torch.isfinite(expected_lse)
    assert torch.equal(torch.isfinite(lse), finite)
    assert torch.allclose(lse[finite], expected_lse[finite], rtol=0, atol=tolerances.CPU_LSE)
    return out, lse


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256, 512])
@pytest.mark.parametrize("spec", [SCALAR, TRELLIS], ids=["scalar", "trellis"])
def test_head_dims(isa, head_dim, spec):
    check(make_case(spec, head_dim))


@pytest.mark.parametrize(("k_bits", "k_code"), CODES)
@pytest.mark.parametrize(("v_bits", "v_code"), CODES)
def test_codes_are_independent(k_bits, k_code, v_bits, v_code):
    check(make_case(CodecSpec(k_bits, v_bits, k_code, v_code, scales="log8"), 64, 1, lengths=(70,), exact=(1,)))


@pytest.mark.parametrize(("bits", "code"), CODES)
def test_every_code_on_every_instruction_set(isa, bits, code):
    check(make_case(CodecSpec(bits, bits, code, code), 128, 1, lengths=(130,), exact=(1,)))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 9, 16])
def test_groups(isa, group):
    check(make_case(TRELLIS, 128, 2, group, lengths=(300, 5), exact=(2, 30)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", ["fp16", "log8"])
def test_dtypes(isa, dtype, scales):
    check(make_case(CodecSpec(scales=scales), 64, dtype=dtype), dtype)


@pytest.mark.parametrize("rotation", ["hadamard", "planar", "none", "custom"])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_rotations_and_centres(rotation, head_dim):
    check(make_case(CodecSpec(rotation=rotation), head_dim, centred=True))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_shapes(isa, data):
    rows = data.draw(st.integers(1, 4))
    lengths = tuple(data.draw(st.lists(st.integers(0, 700), min_size=rows, max_size=rows)))
    n = data.draw(st.integers(1, 5))
    exact = tuple(data.draw(st.lists(st.integers(n, 300), min_size=rows, max_size=rows)))
    group, kv_heads = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    causal = data.draw(st.booleans())
    case = make_case(
        CodecSpec(scales="log8"), 64, kv_heads, group, lengths, exact, n, seed=data.draw(st.integers(0, 99))
    )
    check(case, causal=causal)


@pytest.mark.parametrize("n", [6, 30, 70])
def test_many_queries(isa, n):
    """Few rows are split over tokens, 16 and more share an unpacked tile, more than 64 go block by block."""
    case = make_case(TRELLIS, 64, 2, 3, lengths=(400, 0, 77), exact=(90, 100, 80), n=n)
    check(case)
    check(case, causal=False)


def test_causal_queries_do_not_see_later_tokens():
    case = make_case(CodecSpec(), n=4, exact=(40, 7, 5))
    before, _ = case.attend()
    for b, length in enumerate(case.exact.lengths):
        case.exact.k[b, :, length - 1] += 1
        case.exact.v[b, :, length - 1] += 1
    after, _ = case.attend()
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.equal(before[:, :, 3], after[:, :, 3])


def test_only_packed_only_exact_and_nothing():
    case = make_case(CodecSpec())
    check(case, exact=None)
    check(case, table=None)
    out, lse = case.attend(table=None, exact=None)
    assert not out.any()
    assert torch.isneginf(lse).all()


def test_empty_rows():
    case = make_case(CodecSpec(), lengths=(0, 100), exact=(0, 0))
    out, lse = check(case, causal=False)
    assert not out[0].any()
    assert torch.isneginf(lse[0]).all()
    assert torch.isfinite(lse[1]).all()


def test_sink_logits():
    case = make_case(CodecSpec(), lengths=(150, 0), exact=(3, 0))
    sinks = torch.randn(case.q.shape[1])
    out, lse = check(case, causal=False, sink_logits=sinks)
    assert not out[1].any()
    assert torch.allclose(lse[1, :, 0], sinks, atol=tolerances.CPU_LSE)


@pytest.mark.parametrize("n", [1, 40])
def test_a_row_alone_is_bit_identical(isa, n):
    case = make_case(TRELLIS, 128, 2, 4, lengths=(1000, 65, 0, 640), exact=(100, 40, 50, 300), n=n)
    out, lse = case.attend()
    for b in range(4):
        alone, alone_lse = case.row(b).attend()
        assert torch.equal(alone[0], out[b])
        assert torch.equal(alone_lse[0], lse[b])


def test_threads_do_not_change_results():
    case = make_case(TRELLIS, 128, 2, 4, lengths=(2500, 65), exact=(100, 40))
    results = []
    for threads in (1, 2, 5):
        ops.set_num_threads(threads)
        results.append(case.attend())
    ops.set_num_threads(None)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_strides():
    """Queries and exact tokens as slices of wider arrays."""
    case = make_case(CodecSpec(), 64, n=2, exact=(40, 7, 3))
    expected = case.attend()

    def slice_of(x):
        wide = torch.full((x.shape[0], x.shape[2] + 3, x.shape[1], x.shape[3] + 8), float("nan"), dtype=x.dtype)
        view = wide[:, 1 : 1 + x.shape[2], :, 4 : 4 + x.shape[3]].transpose(1, 2)
        view.copy_(x)
        return view

    exact = ops.ExactTokens(slice_of(case.exact.k), slice_of(case.exact.v), case.exact.lengths, case.exact.max_length)
    out, lse = case.attend(q=slice_of(case.q), exact=exact)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_addresses_instead_of_offsets():
    case = make_case(CodecSpec())
    expected = case.attend()
    table = ops.PageTable(
        None, case.table.page_table + case.table.base.data_ptr(), case.table.lengths, case.table.max_length
    )
    out, lse = case.attend(table=table)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_large_scores(isa):
    """A key direction that gives scores of hundreds: the softmax is nearly one token."""
    case = make_case(CodecSpec(), 64, lengths=(150, 20, 64))
    case.q *= 30
    out, _ = case.attend()
    expected, _ = case.attend("reference")
    assert relative(out, expected) < 10 * tolerances.CPU_ATTENTION["float32"]


def test_numpy_arrays():
    case = make_case(CodecSpec())
    expected, _ = case.attend()
    table = ops.PageTable(
        *(x.numpy() for x in (case.table.base, case.table.page_table, case.table.lengths)), case.table.max_length
    )
    exact = ops.ExactTokens(
        *(x.numpy() for x in (case.exact.k, case.exact.v, case.exact.lengths)), case.exact.max_length
    )
    out, _ = ops.decode_attention(case.q.numpy(), case.codec, table, exact, case.scale)
    assert isinstance(out, np.ndarray)
    assert np.array_equal(out, expected.numpy())


def test_a_query_that_is_not_finite_spoils_its_own_row_only():
    case = make_case(CodecSpec())
    expected, _ = case.attend()
    case.q[0, 1, 0, 3] = float("inf")
    out, lse = case.attend()
    assert out[0, 1].isnan().all()
    assert lse[0, 1].isnan().all()
    assert torch.equal(out[1:], expected[1:])
    assert torch.equal(out[0, [0, 2]], expected[0, [0, 2]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 20, 100])
def test_prefill(isa, dtype, n):
    case = make_case(TRELLIS, 64, 2, 2, lengths=(330, 0, 64), exact=(1, 1, 1), n=1)
    q = torch.randn(3, 4, n, 64).to(getattr(torch, dtype))
    out, lse = ops.prefill_attention(q, case.codec, case.table, case.scale)
    expected, expected_lse = ops.prefill_attention(q, case.codec, case.table, case.scale, backend="reference")
    assert out.dtype == torch.float32
    assert relative(out, expected) < tolerances.CPU_ATTENTION["float32"]
    assert relative(lse, expected_lse) < tolerances.CPU_LSE
    assert not out[1].any()
    assert torch.isneginf(lse[1]).all()


def test_prefill_and_a_causal_chunk_merge_to_the_whole():
    case = make_case(CodecSpec(), n=5, exact=(5, 5, 5))
    packed = ops.prefill_attention(case.q, case.codec, case.table, case.scale)
    chunk = case.attend(table=None)
    out, lse = ops.merge(*packed, *chunk)
    expected, expected_lse = case.attend()
    assert relative(out, expected) < tolerances.MERGE
    assert relative(lse, expected_lse) < tolerances.MERGE


def test_merge_of_nothing():
    o, lse = np.zeros((2, 4), np.float32), np.full(2, -np.inf, np.float32)
    out, joint = ops.merge(o, lse, o, lse)
    assert not out.any()
    assert np.isneginf(joint).all()
