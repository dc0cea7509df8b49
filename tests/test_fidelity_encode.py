"""The refined encoder: what its search may and must do, and that native encoding is as good as the reference's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tolerances import ENCODE_LIKE_REFERENCE, START_SEARCH

from forgeattention import CodecSpec, ops, reference
from forgeattention.codec import Codec, codebook, packing
from forgeattention.codec.codebook import trellis_encode, trellis_levels
from forgeattention.codec.shaping import make_shaping
from forgeattention.codec.spec import HEAD_DIMS
from forgeattention.reference.quantize import circular_start, dequantize, path_groups, quantize

F64 = NDArray[np.float64]


def gram(rng: np.random.Generator, dim: int, heads: int = 1) -> F64:
    """Gram matrices with eigenvalues over three decades."""
    a = rng.standard_normal((heads, dim, dim)) * np.exp(-3.5 * np.arange(dim) / dim)
    return a @ a.transpose(0, 2, 1)


def energy(codec: Codec, e: F64) -> F64:
    """e^T H e of errors [64, padded_dim] of head 0."""
    assert codec.shaping is not None
    return (e @ codec.shaping.factor[0, 0].astype(np.float64).T) ** 2 @ codec.shaping.weight[0, 0]


@pytest.mark.parametrize("dim", [64, 96, 128, 256, 512])
def test_groups_are_the_tokens_that_share_units(dim: int) -> None:
    for side, layout in (("k", packing.k_layout), ("v", packing.v_layout)):
        group = path_groups(side, dim, 8)
        token, _ = layout(dim)
        units = group[token].reshape(-1, 32)
        assert (units == units[:, :1]).all()
        # No finer partition would do: link the tokens of each unit and count what hangs together.
        parent = np.arange(64)
        for unit in token.reshape(-1, 32):
            parent[np.isin(parent, parent[unit])] = parent[unit].min()
        assert len(set(parent)) == len(set(group))
    assert (path_groups("k", dim, 1) == np.arange(64)).all()


@pytest.mark.parametrize("dim", [64, 96])
def test_factors_give_the_gram_in_rotated_coordinates(dim: int) -> None:
    rng = np.random.default_rng(0)
    g = gram(rng, dim, 2)
    codec = Codec(CodecSpec(), dim, 2, k_diagonal=rng.uniform(0.5, 2, (2, dim)), query_gram=g, gram_ridge=0.0)
    assert codec.shaping is not None
    inverse = codec.k_transform.inverse.astype(np.float64)
    want = inverse.transpose(0, 2, 1) @ g @ inverse
    want *= dim / np.trace(want, axis1=1, axis2=2)[:, None, None]
    orders, _ = packing.key_orders(dim)
    for i, order in enumerate(orders):
        factor, weight = (x[:, i].astype(np.float64) for x in (codec.shaping.factor, codec.shaping.weight))
        h = factor.transpose(0, 2, 1) @ (weight[:, :, None] * factor)
        np.testing.assert_allclose(h, 0.99 * want + 0.01 * np.eye(dim), atol=1e-5 * np.abs(want).max())
        by_rank = factor[:, order[:, None], order]
        assert (np.triu(by_rank, 1) == 0).all()
        assert (np.diagonal(by_rank, axis1=1, axis2=2) == 1).all()


@pytest.mark.parametrize("dim", [64, 96, 128, 256, 512])
def test_channels_are_ranked_as_paths_visit_them(dim: int) -> None:
    orders, which = packing.key_orders(dim)
    assert len(orders) == (3 if dim == 96 else 1)
    token, channel = packing.k_layout(dim)
    for lane in range(4, 8):
        for t in np.unique(token[lane]):
            rank = np.argsort(orders[which[t]])[channel[lane][token[lane] == t]]
            assert (np.diff(rank) == 1).all()


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), code=st.sampled_from(["scalar", "trellis4", "trellis8"]), side=st.sampled_from("kv")
)
def test_refinement_never_loses(seed: int, code: str, side: str) -> None:
    y = np.random.default_rng(seed).standard_normal((64, 64)) * 3
    book = codebook(3, code)  # type: ignore[arg-type]
    errors = []
    for refine in (False, True):
        e = dequantize(*quantize(y, book, side, "unbiased", refine), book, side) - y
        errors.append(((e / np.sqrt((y * y).mean(1))[:, None]) ** 2).sum())
    assert errors[1] <= errors[0] * (1 + 1e-12)


@pytest.mark.parametrize(
    ("k_bits", "k_code"), [(2, "trellis8"), (3, "trellis8"), (3, "trellis4"), (3, "scalar"), (4, "scalar")]
)
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_shaping_lowers_what_queries_see(dim: int, k_bits: int, k_code: str) -> None:
    rng = np.random.default_rng(dim + k_bits)
    spec = CodecSpec(k_bits=k_bits, k_code=k_code, refine=False)  # type: ignore[arg-type]
    codec = Codec(spec, dim, 1, query_gram=gram(rng, dim), gram_ridge=0.05)
    assert codec.shaping is not None
    feedback = codec.shaping.factor[0].astype(np.float64), codec.shaping.weight[0].astype(np.float64)
    y = rng.standard_normal((64, dim))
    plain, shaped, refined = (
        energy(
            codec, dequantize(*quantize(y, codec.k_codebook, "k", "unbiased", *how), codec.k_codebook, "k") - y
        ).sum()
        for how in ((False, None), (False, feedback), (True, feedback))
    )
    assert shaped < 0.8 * plain
    assert refined < shaped


def test_without_preference_shaping_is_the_plain_search() -> None:
    """With H the identity only the choice of the start of a path differs, and hardly."""
    rng = np.random.default_rng(1)
    shaping = make_shaping(np.eye(64), 0.0, Codec(CodecSpec(), 64, 1).k_transform, 64)
    feedback = shaping.factor[0].astype(np.float64), shaping.weight[0].astype(np.float64)
    assert np.abs(feedback[0] - np.eye(64)).max() < 1e-6
    y, book = rng.standard_normal((64, 64)), codebook(3, "trellis8")
    plain, shaped = (
        ((dequantize(*quantize(y, book, "k", "unbiased", False, how), book, "k") - y) ** 2).mean()
        for how in (None, feedback)
    )
    assert shaped < plain * START_SEARCH


@pytest.mark.parametrize("states", [4, 8])
def test_the_start_of_a_circle_is_nearly_always_the_best(states: int) -> None:
    x = np.random.default_rng(2).standard_normal((400, 32))
    book = codebook(3, f"trellis{states}")  # type: ignore[arg-type]
    codes = trellis_encode(x, book.values, 3, states)
    u = codes[:, -3:].astype(int) & 1
    ends = (u[:, 2] | u[:, 1] << 1 | u[:, 0] << 2) & (states - 1)
    assert (circular_start(x, book) == ends).mean() > 0.8
    assert ((book.values[trellis_levels(codes, 3, states)] - x) ** 2).mean() < 0.025


@pytest.mark.parametrize(
    "changes", [{}, {"k_bits": 4, "v_code": "trellis8"}, {"k_bits": 2, "v_bits": 2, "v_code": "trellis8"}]
)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_native_encoding_is_as_good_as_the_reference(head_dim: int, changes: dict[str, object]) -> None:
    rng = np.random.default_rng(head_dim)
    codec = Codec(
        CodecSpec(**changes),  # type: ignore[arg-type]
        head_dim, 2, k_diagonal=np.exp(0.3 * rng.standard_normal((2, head_dim))), query_gram=gram(rng, head_dim, 2),
    )  # fmt: skip
    k = rng.standard_normal((2, 64, head_dim)) * np.exp(0.5 * rng.standard_normal((2, 64, 1)))
    k = (k + 3 * rng.standard_normal((2, 1, head_dim))).astype(np.float32)
    v = rng.standard_normal((2, 64, head_dim)).astype(np.float32)
    native = np.zeros((1, 2, codec.format.record_bytes), np.uint8)
    ops.encode(k, v, codec, native, np.zeros(1, np.int64), backend="cpu")
    found = []
    for pages in (reference.encode(k, v, codec), native):
        decoded_k, decoded_v = reference.decode_pages(pages, codec)
        pad = ((0, 0), (0, codec.format.padded_dim - head_dim))
        error = np.pad((decoded_k - k)[0], pad) @ codec.k_transform.forward[0].astype(np.float64).T
        found.append((energy(codec, error).sum(), ((decoded_v - v) ** 2).sum()))
    np.testing.assert_allclose(found[1], found[0], rtol=ENCODE_LIKE_REFERENCE)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_scale_fits_its_base(backend: str) -> None:
    """A key whose codes are a poor fit has a scale far above its root mean square."""
    codec = Codec(CodecSpec(rotation="none"), 64, 1)
    k = 0.01 * np.random.default_rng(3).standard_normal((1, 64, 64))
    k[0, 5] = 0
    k[0, 5, 7] = 100
    pages = np.zeros((1, 1, codec.format.record_bytes), np.uint8)
    ops.encode(k.astype(np.float32), k.astype(np.float32), codec, pages, np.zeros(1, np.int64), backend=backend)
    decoded, _ = reference.decode_pages(pages, codec)
    assert abs(decoded[0, 5] @ k[0, 5] / (k[0, 5] @ k[0, 5]) - 1) < 0.05
