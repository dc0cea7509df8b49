"""encode and decode_pages of the CPU kernels against the oracle."""

import numpy as np
import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import CODES, DTYPES, make_case, relative, tensor

from forgeattention import ops, reference
from forgeattention.backends.cpu import native
from forgeattention.codec import PAGE, Codec, CodecSpec


@pytest.fixture(params=native.isas())
def isa(request):
    before = native.isas()[0]
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


def tokens(kv_heads, n, head_dim, seed=0):
    rng = np.random.default_rng(seed)
    scale = np.exp(0.5 * rng.standard_normal((kv_heads, n, 1)))
    k = scale * rng.standard_normal((kv_heads, n, head_dim)) + 3 * rng.standard_normal((kv_heads, 1, head_dim))
    return k.astype(np.float32), (scale * rng.standard_normal((kv_heads, n, head_dim))).astype(np.float32)


def encoded(k, v, codec, backend):
    pages = k.shape[1] // PAGE
    out = np.zeros(pages * codec.page_bytes, np.uint8)
    ops.encode(k, v, codec, out, np.arange(pages) * codec.page_bytes, backend=backend)
    return out.reshape(pages, codec.kv_heads, -1)


def check(spec, head_dim, loss=tolerances.CPU_ENCODE_LOSS, **codec_args):
    codec = Codec(spec, head_dim, 2, **codec_args)
    k, v = tokens(2, 3 * PAGE, head_dim)
    native, oracle = encoded(k, v, codec, "cpu"), encoded(k, v, codec, "reference")
    # Where the largest scale lies near the end of an octave the bases may differ by one, and with them the mean row.
    row = slice(codec.format.mean_offset, codec.format.v_offset)
    alike = (native[..., row] == oracle[..., row]).all(-1)
    assert alike.mean() >= 0.5
    assert (native != oracle)[alike].mean() < tolerances.CPU_ENCODE_BYTES
    for x, a, b in zip(
        (k, v), reference.decode_pages(native, codec), reference.decode_pages(oracle, codec), strict=True
    ):
        assert ((a - x) ** 2).sum() < (1 + loss) * ((b - x) ** 2).sum()


@pytest.mark.parametrize(("bits", "code"), CODES)
@pytest.mark.parametrize("scales", ["fp16", "log8"])
def test_codes(isa, bits, code, scales):
    check(CodecSpec(bits, bits, code, code, scales=scales, refine=False), 64)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256, 512])
def test_head_dims(isa, head_dim):
    check(CodecSpec(3, 2, "trellis8", "scalar", refine=False), head_dim)


@pytest.mark.parametrize("rotation", ["hadamard", "planar", "none", "custom"])
@pytest.mark.parametrize("key_mean", [True, False])
def test_rotations(rotation, key_mean):
    rng = np.random.default_rng(0)
    args = {"k_mu": rng.standard_normal((2, 80)), "v_mu": rng.standard_normal(80)}
    if rotation == "custom":
        args |= {"k_matrix": np.eye(80) + 0.1 * rng.standard_normal((2, 80, 80)), "v_matrix": 2 * np.eye(80)}
    check(CodecSpec(k_code="scalar", rotation=rotation, key_mean=key_mean, refine=False), 80, **args)


@pytest.mark.parametrize("rule", ["unbiased", "least_squares", "norm"])
def test_scale_rules(rule):
    check(CodecSpec(k_code="scalar", k_scale_rule=rule, v_scale_rule=rule, refine=False), 64)


@pytest.mark.parametrize(("bits", "code"), CODES)
def test_refined(bits, code):
    check(CodecSpec(bits, bits, code, code), 64, tolerances.CPU_REFINED_LOSS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_strides(dtype):
    """Slices of an array [tokens, heads, 2, head_dim], as a fused projection gives them."""
    codec = Codec(CodecSpec(), 64, 2)
    k, v = (tensor(x, dtype) for x in tokens(2, 2 * PAGE, 64))
    fused = torch.stack([k, v], 2).permute(1, 0, 2, 3).contiguous()
    out, plain = torch.zeros(2, 2 * codec.page_bytes, dtype=torch.uint8)
    where = torch.arange(2) * codec.page_bytes
    ops.encode(fused[:, :, 0].transpose(0, 1), fused[:, :, 1].transpose(0, 1), codec, out, where)
    ops.encode(k.float(), v.float(), codec, plain, where)
    assert torch.equal(out, plain)


@pytest.mark.parametrize(("bits", "code"), CODES)
@pytest.mark.parametrize("scales", ["fp16", "log8"])
def test_zero_vectors_stay_zero(bits, code, scales):
    codec = Codec(CodecSpec(bits, bits, code, code, scales=scales), 64, 1)
    zero = np.zeros((1, PAGE, 64), np.float32)
    record = encoded(zero, zero, codec, "cpu")
    for x in reference.decode_pages(record, codec):
        assert not x.any()


@settings(max_examples=30, deadline=None)
@given(exponent=st.integers(-50, 50), spread=st.floats(0, 8), seed=st.integers(0, 99))
def test_any_magnitude_with_logarithmic_scales(exponent, spread, seed):
    rng = np.random.default_rng(seed)
    codec = Codec(CodecSpec(k_code="scalar", key_mean=False, refine=False), 64, 1)
    v = (rng.standard_normal((1, PAGE, 64)) * 2.0 ** (exponent - rng.uniform(0, spread, (1, PAGE, 1)))).astype(
        np.float32
    )
    native, oracle = encoded(v, v, codec, "cpu"), encoded(v, v, codec, "reference")
    for a, b in zip(reference.decode_pages(native, codec), reference.decode_pages(oracle, codec), strict=True):
        assert ((a - v) ** 2).sum() <= (1 + tolerances.CPU_ENCODE_LOSS) * ((b - v) ** 2).sum()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite(value, side, dtype):
    codec = Codec(CodecSpec(), 64, 2)
    x = {name: tensor(a, dtype) for name, a in zip("kv", tokens(2, 2 * PAGE, 64), strict=True)}
    x[side][1, PAGE + 7, 63] = value
    out = torch.full((2 * codec.page_bytes,), 7, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"\[encode\] expected finite {side}; got NaN or infinity"):
        ops.encode(x["k"], x["v"], codec, out, torch.arange(2) * codec.page_bytes)
    assert (out == 7).all()


@pytest.mark.parametrize("side", ["k", "v"])
def test_scales_beyond_fp16(side):
    codec = Codec(CodecSpec(scales="fp16"), 64, 1)
    x = dict(zip("kv", tokens(1, 2 * PAGE, 64), strict=True))
    x[side][0, PAGE + 3] = 1e6 * np.sign(x[side][0, PAGE + 3])
    out = np.full(2 * codec.page_bytes, 7, np.uint8)
    with pytest.raises(ValueError, match=r"\[encode\] expected vectors whose scales fit"):
        ops.encode(x["k"], x["v"], codec, out, np.arange(2) * codec.page_bytes)
    assert (out == 7).all()


def test_threads_do_not_change_pages():
    codec = Codec(CodecSpec(k_code="trellis4"), 64, 2)
    k, v = tokens(2, 5 * PAGE, 64)
    pages = []
    for threads in (1, 2):
        ops.set_num_threads(threads)
        pages.append(encoded(k, v, codec, "cpu"))
    ops.set_num_threads(None)
    assert np.array_equal(*pages)


@pytest.mark.parametrize(("bits", "code"), CODES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256, 512])
def test_decode_is_the_oracles(isa, bits, code, head_dim):
    """Random bytes as codes: ties every path of format.h's unit_nibbles to packing.py, value by value."""
    codec = Codec(CodecSpec(bits, bits, code, code, scales="log8"), head_dim, 1)
    record = np.random.default_rng(bits).integers(0, 256, codec.page_bytes, np.uint8)
    # mean_step 2^-10, bases -3
    mean = np.random.default_rng(1).integers(-100, 100, codec.format.padded_dim).astype(np.float64)
    from forgeattention.codec import packing

    packing.split_record(record, codec.format)["mean"][:] = packing.pack_header(mean, 2.0**-10, -3, -3)
    table = ops.PageTable(record, np.zeros((1, 1), np.int64), np.array([PAGE], np.int32), PAGE)
    for rotated in (True, False):
        native = ops.decode_pages(codec, table, rotated=rotated)
        oracle = ops.decode_pages(codec, table, rotated=rotated, backend="reference")
        for a, b in zip(native, oracle, strict=True):
            assert relative(a, b) < tolerances.CPU_DECODE["float32"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_of_a_batch(dtype):
    case = make_case(CodecSpec(), 80, lengths=(150, 0, 64, 1), exact=(1, 1, 1, 1), centred=True)
    native = ops.decode_pages(case.codec, case.table, dtype=dtype)
    oracle = ops.decode_pages(case.codec, case.table, backend="reference")
    for a, b in zip(native, oracle, strict=True):
        assert a.dtype == getattr(torch, dtype)
        assert relative(a, b) < tolerances.CPU_DECODE[dtype]
        for row, length in enumerate(case.table.lengths):
            assert not a[row, :, length:].any()
