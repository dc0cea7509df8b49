"""Transforms: rotations are rotations, and folding them out changes nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import TRANSFORM

from forgeattention.codec import Codec, CodecSpec
from forgeattention.codec.spec import HEAD_DIMS
from forgeattention.codec.transform import hadamard, planar, random_signs


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256, 512])
def test_hadamard_is_orthonormal_and_flat(dim):
    h = hadamard(dim)
    np.testing.assert_allclose(h @ h.T, np.eye(dim), atol=1e-12)
    assert np.abs(h).max() < 1.5 / np.sqrt(dim)
    np.testing.assert_allclose(np.abs(h[:, 0]), np.abs(h[0, 0]) * np.abs(h[:, 0]) / np.abs(h[0, 0]))


def test_signs_are_the_same_everywhere():
    assert random_signs(16, 1).tolist() == random_signs(32, 1)[:16].tolist()
    assert set(random_signs(64, 7)) == {-1.0, 1.0}
    assert random_signs(64, 7).tolist() != random_signs(64, 8).tolist()
    first = [(6364136223846793005 + 1442695040888963407) % (1 << 64) >> 63]
    assert (random_signs(1, 1)[0] > 0) == bool(first[0])


def test_planar_turns_pairs():
    m = planar(4, np.deg2rad([90.0, 45.0]))
    np.testing.assert_allclose(m @ [1, 0, 1, 0], [0, 1, 2**-0.5, 2**-0.5], atol=1e-12)


@given(
    head_dim=st.sampled_from(HEAD_DIMS),
    rotation=st.sampled_from(["hadamard", "planar", "none"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_scores_and_sums_survive_the_folding(head_dim, rotation, seed):
    """q . x = q' . y + q . mu and x = A^-1 y + mu for y = A (x - mu)."""
    rng = np.random.default_rng(seed)
    mu = rng.standard_normal(head_dim)
    t = Codec(CodecSpec(rotation=rotation, planar_angle=None), head_dim, 1, k_mu=mu).k_transform
    check(rng, t, head_dim, mu)


def check(rng, t, head_dim, mu):
    q, x = rng.standard_normal((2, head_dim))
    pad = t.forward.shape[1] - head_dim
    a, inverse = t.forward[0].astype(np.float64), t.inverse[0].astype(np.float64)
    y = a @ (np.pad(x, (0, pad)) - t.mu[0])
    np.testing.assert_allclose(inverse.T @ np.pad(q, (0, pad)) @ y + q @ mu, q @ x, atol=TRANSFORM * head_dim)
    np.testing.assert_allclose((inverse @ y + t.mu[0])[:head_dim], x, atol=TRANSFORM * head_dim)


def test_custom_matrices_per_head():
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((2, 80, 80)) + 20 * np.eye(80)
    spec = CodecSpec(rotation="custom")
    codec = Codec(spec, 80, 2, k_matrix=matrix, v_matrix=np.eye(80), k_mu=np.ones(80))
    assert codec.k_transform.forward.shape == (2, 96, 96)
    assert not codec.k_transform.orthogonal
    assert codec.v_transform.orthogonal
    check(rng, codec.k_transform, 80, np.ones(80))
    other = Codec(spec, 80, 2, k_matrix=matrix + 1e-3, v_matrix=np.eye(80), k_mu=np.ones(80))
    assert codec.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        (CodecSpec(), {"k_matrix": np.eye(64)}, r"\[codec\] expected a matrix exactly with rotation 'custom'"),
        (CodecSpec(rotation="custom"), {}, r"\[codec\] expected a matrix exactly with rotation 'custom'"),
        (
            CodecSpec(rotation="custom"),
            {"k_matrix": np.eye(32), "v_matrix": np.eye(64)},
            r"\[codec\] expected a matrix \[..., 64, 64\]; got \[32, 32\]",
        ),
        (
            CodecSpec(rotation="custom"),
            {"k_matrix": np.zeros((64, 64)), "v_matrix": np.eye(64)},
            r"\[codec\] expected an invertible matrix",
        ),
        (CodecSpec(), {"k_mu": np.full(64, np.nan)}, r"\[codec\] expected a finite centre"),
        (CodecSpec(), {"k_mu": np.zeros((3, 64))}, r"\[codec\] expected k_mu for 1 or 2 heads; got 3"),
    ],
)
def test_wrong_matrices_are_refused(spec, arguments, message):
    with pytest.raises(ValueError, match=message):
        Codec(spec, 64, 2, **arguments)
