"""The oracle against direct sums and the properties it must have."""

import math

import numpy as np
import pytest
import tolerances
from hypothesis import given, settings
from hypothesis import strategies as st

from forgeattention import reference
from forgeattention.codec import PAGE, Codec, CodecSpec
from forgeattention.reference.attention import attention
from forgeattention.reference.pages import dequantize, quantize


def test_attention_is_softmax():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((4, 2, 8)), rng.standard_normal((2, 5, 8)), rng.standard_normal((2, 5, 8))
    o, lse = attention(q, k, v, 0.3)
    for h in range(4):
        for i in range(2):
            scores = [0.3 * sum(q[h, i, d] * k[h // 2, t, d] for d in range(8)) for t in range(5)]
            total = sum(math.exp(s) for s in scores)
            expected = sum(math.exp(s) / total * v[h // 2, t] for t, s in enumerate(scores))
            assert o[h, i] == pytest.approx(expected)
            assert lse[h, i] == pytest.approx(math.log(total))


def test_attention_survives_large_scores_and_empty_rows():
    q, k = np.array([[[1e4]], [[-1e4]]]), np.array([[[1.0], [0.0]]])
    o, lse = attention(q, k, k, 1.0)
    assert o.ravel() == pytest.approx([1, 0])
    assert lse.ravel() == pytest.approx([1e4, 0])
    o, lse = attention(q, k, k, 1.0, np.zeros((1, 2), bool))
    assert not o.any()
    assert np.isneginf(lse).all()


@given(split=st.integers(0, 30), seed=st.integers(0, 9))
def test_merge_of_parts_is_the_whole(split, seed):
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((4, 3, 8)), rng.standard_normal((2, 30, 8)), rng.standard_normal((2, 30, 8))
    parts = [attention(q, k[:, :split], v[:, :split], 1.0), attention(q, k[:, split:], v[:, split:], 1.0)]
    for merged, whole in zip(reference.merge(parts), attention(q, k, v, 1.0), strict=True):
        assert merged == pytest.approx(whole, rel=tolerances.EXACT)


@pytest.mark.parametrize("causal", [True, False])
def test_decode_attention_is_attention_over_the_decoded_tokens(causal):
    rng = np.random.default_rng(0)
    codec = Codec(CodecSpec(), 64, 2, k_mu=rng.standard_normal(64))
    pages = reference.encode(*rng.standard_normal((2, 2, 2 * PAGE, 64)), codec)
    k, v = reference.decode_pages(pages, codec)
    exact_k, exact_v = rng.standard_normal((2, 2, 7, 64))
    q = rng.standard_normal((4, 3, 64))
    o, lse = reference.decode_attention(q, pages, 100, codec, 0.1, exact_k, exact_v, causal)
    for i in range(3):
        seen = 7 - (2 - i if causal else 0)
        ks, vs = (np.concatenate([x[:, :100], e[:, :seen]], 1) for x, e in ((k, exact_k), (v, exact_v)))
        expected, expected_lse = attention(q[:, i : i + 1], ks, vs, 0.1)
        assert o[:, i : i + 1] == pytest.approx(expected)
        assert lse[:, i : i + 1] == pytest.approx(expected_lse)


def test_scores_and_sums_make_attention():
    rng = np.random.default_rng(0)
    codec = Codec(CodecSpec(v_code="trellis4"), 64, 2)
    pages = reference.encode(*rng.standard_normal((2, 2, PAGE, 64)), codec)
    q = rng.standard_normal((6, 2, 64))
    s = reference.qk_scores(q, pages, 50, codec, 0.2)
    p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    expected, _ = reference.decode_attention(q, pages, 50, codec, 0.2, causal=False)
    assert reference.value_sum(p, pages, codec) == pytest.approx(expected)


@pytest.mark.parametrize("code", ["scalar", "trellis4", "trellis8"])
@pytest.mark.parametrize("rule", ["unbiased", "least_squares", "norm"])
def test_scale_rules(code, rule):
    book = Codec(CodecSpec(k_code=code), 64, 1).k_codebook
    y = np.random.default_rng(0).standard_normal((PAGE, 64)) * np.exp(
        np.random.default_rng(1).standard_normal((PAGE, 1))
    )
    codes, scales = quantize(y, book, "k", rule)
    z = dequantize(codes, scales, book, "k")
    left, right = {
        "unbiased": ((y * z).sum(1), (y * y).sum(1)),
        "least_squares": ((y * z).sum(1), (z * z).sum(1)),
        "norm": ((z * z).sum(1), (y * y).sum(1)),
    }[rule]
    assert left == pytest.approx(right, rel=tolerances.EXACT)


@settings(max_examples=20, deadline=None)
@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_codes_do_not_depend_on_the_length_of_a_vector(factor, seed):
    book = Codec(CodecSpec(), 64, 1).k_codebook
    y = np.random.default_rng(seed).standard_normal((PAGE, 64))
    codes, scales = quantize(y, book, "k", "unbiased")
    again, scaled = quantize(factor * y, book, "k", "unbiased")
    assert (codes != again).mean() < 1e-3  # thresholds may move by a rounding
    assert scaled == pytest.approx(factor * scales, rel=1e-6)


@pytest.mark.parametrize("rotation", ["hadamard", "none"])
def test_the_page_mean_takes_a_common_key_away(rotation):
    """Keys that share one large vector decode far better with the page mean than without."""
    rng = np.random.default_rng(0)
    k = rng.standard_normal((1, PAGE, 64)) + 20 * rng.standard_normal((1, 1, 64))
    errors = {}
    for key_mean in (True, False):
        codec = Codec(CodecSpec(rotation=rotation, key_mean=key_mean), 64, 1)
        decoded, _ = reference.decode_pages(reference.encode(k, k, codec), codec)
        errors[key_mean] = ((decoded - k) ** 2).mean()
    assert errors[True] < 0.05
    assert errors[False] > 20 * errors[True]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_of_gaussian_tokens(bits):
    """The decoded error of N(0, 1) vectors is that of the codebook, within sampling."""
    expected = {2: 0.1175, 3: 0.03454, 4: 0.009497}[bits]
    codec = Codec(CodecSpec(bits, bits, refine=False), 128, 1)
    v = np.random.default_rng(0).standard_normal((1, 4 * PAGE, 128))
    _, decoded = reference.decode_pages(reference.encode(v, v, codec), codec)
    # An unbiased scale is 1 / (1 - D) too long for least squares: D / (1 - D).
    assert ((decoded - v) ** 2).mean() == pytest.approx(expected / (1 - expected), rel=0.05)


def test_bad_pages():
    codec = Codec(CodecSpec(scales="fp16"), 64, 1)
    good = np.ones((PAGE, 64))
    with pytest.raises(ValueError, match=r"\[encode\] expected k \[64, 64\]; got \[63, 64\]"):
        reference.encode_page(good[:63], good, codec)
    with pytest.raises(ValueError, match=r"\[encode\] expected finite v; got NaN or infinity"):
        reference.encode_page(good, good * np.nan, codec)
    with (
        pytest.raises(ValueError, match=r"\[encode\] expected vectors that fp16 scales can hold"),
        np.errstate(over="ignore"),
    ):
        reference.encode_page(good, good * 1e6, codec)
