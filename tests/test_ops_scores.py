"""qk_scores and value_sum of the CPU kernels against the oracle."""

import pytest
import tolerances
import torch
from ops_cases import CODES, DTYPES, make_case, relative

from forgeattention import ops
from forgeattention.backends.cpu import native
from forgeattention.codec import CodecSpec


@pytest.fixture(params=native.isas())
def isa(request):
    before = native.isas()[0]
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


def check(case):
    scores = ops.qk_scores(case.q, case.codec, case.table, case.scale)
    oracle = ops.qk_scores(case.q, case.codec, case.table, case.scale, backend="reference")
    assert relative(scores, oracle) < tolerances.CPU_SCORES
    for row, length in enumerate(case.table.lengths):
        assert torch.isneginf(scores[row, ..., length:]).all()
    p = torch.randn(scores.shape)
    for row, length in enumerate(case.table.lengths):
        p[row, ..., length:] = float("nan")  # never read
    for weights in (p, p.abs(), -p.abs()):
        sums = ops.value_sum(weights, case.codec, case.table)
        assert relative(sums, ops.value_sum(weights, case.codec, case.table, backend="reference")) < tolerances.CPU_SUMS


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256, 512])
@pytest.mark.parametrize("n", [1, 3])
def test_head_dims(isa, head_dim, n):
    check(make_case(CodecSpec(scales="log8"), head_dim, n=n, exact=(9, 9, 9), centred=True))


@pytest.mark.parametrize(("bits", "code"), CODES)
def test_codes(isa, bits, code):
    check(make_case(CodecSpec(bits, bits, code, code), 128, 1, lengths=(300,), exact=(1,)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    check(make_case(CodecSpec(), dtype=dtype))


def test_many_rows():
    check(make_case(CodecSpec(), 64, 1, 5, lengths=(100,), exact=(30,), n=30))


def test_weights_that_are_not_finite():
    case = make_case(CodecSpec())
    p = torch.ones(3, 6, 1, case.table.max_length)
    p[0, 2, 0, 149] = float("nan")
    with pytest.raises(ValueError, match=r"\[value_sum\] expected finite weights; got NaN or infinity"):
        ops.value_sum(p, case.codec, case.table)


def test_zero_weights():
    case = make_case(CodecSpec())
    assert not ops.value_sum(torch.zeros(3, 6, 1, case.table.max_length), case.codec, case.table).any()
