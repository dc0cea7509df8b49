"""The invertible maps that are folded out of the cache.

The cache stores y = A (x - mu). A score needs only q' = A^-T q and the constant q . mu; an output is mu plus A^-1 of
the weighted sum of y. So none of this costs anything per cached token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .spec import CodecSpec, PageFormat

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Transform:
    """y = A (x - mu) for one side of a layer.

    Attributes:
        forward: A, float32 [heads, padded_dim, padded_dim], heads being 1 (shared) or kv_heads. x is padded with zeros.
        inverse: A^-1, same shape.
        mu: float32 [heads, padded_dim], or None for no centring.
        orthogonal: A^-1 is A^T.
        diagonal: d of A = R diag(d) with the spec's rotation R, float32 [heads, padded_dim], or None where A is R or a
            matrix of its own. A kernel that has a fast R needs only d: A x = R (d x), A^-T q = R (q / d) for an
            orthogonal R.
    """

    forward: F32
    inverse: F32
    mu: F32 | None
    orthogonal: bool
    diagonal: F32 | None = None


def hadamard(dim: int) -> F64:
    """An orthonormal [dim, dim] matrix with entries of about equal size: Sylvester's Hadamard matrix for the power of
    two in `dim`, in Kronecker product with an orthonormal DCT-II for the odd factor (96 = 32 x 3)."""
    h = np.ones((1, 1))
    while h.shape[0] * 2 <= dim and dim % (h.shape[0] * 2) == 0:
        h = np.block([[h, h], [h, -h]]) / np.sqrt(2)
    odd = dim // h.shape[0]
    k = np.arange(odd)
    dct = np.sqrt(2 / odd) * np.cos(np.pi * (2 * k[None] + 1) * k[:, None] / (2 * odd))
    dct[0] /= np.sqrt(2)
    return np.kron(dct, h)


def random_signs(dim: int, seed: int) -> F64:
    """[dim] of +1 and -1 from a 64-bit linear congruential generator (Knuth's MMIX constants), the same everywhere."""
    state, signs = seed, []
    for _ in range(dim):
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        signs.append(1.0 if state >> 63 else -1.0)
    return np.array(signs)


def planar(dim: int, angles: F64) -> F64:
    """Givens rotations of neighbouring coordinate pairs by `angles` [dim / 2] in radians: [dim, dim]."""
    m = np.zeros((dim, dim))
    even = np.arange(0, dim, 2)
    m[even, even] = m[even + 1, even + 1] = np.cos(angles)
    m[even, even + 1] = -np.sin(angles)
    m[even + 1, even] = np.sin(angles)
    return m


def _hadamard_rotation(spec: CodecSpec, dim: int) -> F64:
    return hadamard(dim) * random_signs(dim, spec.seed)


def _planar_rotation(spec: CodecSpec, dim: int) -> F64:
    if spec.planar_angle is None:
        angles = np.random.default_rng(spec.seed).uniform(0, 2 * np.pi, dim // 2)
    else:
        angles = np.full(dim // 2, np.deg2rad(spec.planar_angle))
    return planar(dim, angles)


ROTATION: dict[str, Callable[[CodecSpec, int], F64]] = {
    "hadamard": _hadamard_rotation,
    "planar": _planar_rotation,
    "none": lambda spec, dim: np.eye(dim),
}


def make_transform(
    spec: CodecSpec,
    fmt: PageFormat,
    matrix: ArrayLike | None,
    mu: ArrayLike | None,
    diagonal: ArrayLike | None = None,
) -> Transform:
    """The transform of one side.

    Args:
        spec: names the rotation.
        fmt: gives head_dim and padded_dim.
        matrix: with rotation "custom", A as [head_dim, head_dim] or [kv_heads, head_dim, head_dim].
        mu: centre, [head_dim] or [kv_heads, head_dim], or None.
        diagonal: scales of the channels before the rotation, [head_dim] or [kv_heads, head_dim], or None.

    Raises:
        ValueError: a matrix where none belongs or none where one does, a wrong shape, a singular matrix.
    """
    if (matrix is None) == (spec.rotation == "custom"):
        raise ValueError(
            f"[codec] expected a matrix exactly with rotation 'custom'; got rotation {spec.rotation!r} "
            f"{'without' if matrix is None else 'with'} a matrix"
        )
    dim, padded = fmt.head_dim, fmt.padded_dim
    if matrix is None:
        a = ROTATION[spec.rotation](spec, padded)[None]
    else:
        given = np.asarray(matrix, np.float64)
        given = given[None] if given.ndim == 2 else given
        if given.ndim != 3 or given.shape[1:] != (dim, dim):
            raise ValueError(f"[codec] expected a matrix [..., {dim}, {dim}]; got {list(np.shape(matrix))}")
        a = np.tile(np.eye(padded), (given.shape[0], 1, 1))
        a[:, :dim, :dim] = given
    scales = None
    if diagonal is not None:
        d = np.atleast_2d(np.asarray(diagonal, np.float64))
        if d.ndim != 2 or d.shape[1] != dim or not (np.isfinite(d).all() and (d > 0).all()):
            raise ValueError(f"[codec] expected a positive diagonal [..., {dim}]; got {list(np.shape(diagonal))}")
        scales = np.pad(d, ((0, 0), (0, padded - dim)), constant_values=1.0).astype(np.float32)
        a = a * scales[:, None, :].astype(np.float64)
    condition = float(np.linalg.cond(a).max()) if matrix is not None else 1.0
    if scales is not None:
        condition *= float((scales.max(1) / scales.min(1)).max())
    if not condition < 1e5:
        raise ValueError(f"[codec] expected an invertible matrix (condition under 1e5); got condition {condition:.3g}")
    if matrix is None:
        # A rotation after a diagonal.
        d = np.ones((1, padded)) if scales is None else scales.astype(np.float64)
        inverse = np.asarray(a.transpose(0, 2, 1) / d[:, :, None] ** 2, np.float64)
    else:
        inverse = np.asarray(np.linalg.inv(a), np.float64)
    centre = None
    if mu is not None:
        m = np.atleast_2d(np.asarray(mu, np.float64))
        if m.ndim != 2 or m.shape[1] != dim or not np.isfinite(m).all():
            raise ValueError(f"[codec] expected a finite centre [..., {dim}]; got {list(np.shape(mu))}")
        centre = np.pad(m, ((0, 0), (0, padded - dim))).astype(np.float32)
    return Transform(
        np.ascontiguousarray(a, np.float32),
        np.ascontiguousarray(inverse, np.float32),
        centre,
        bool(np.allclose(inverse, a.transpose(0, 2, 1), atol=1e-9)),
        scales,
    )
