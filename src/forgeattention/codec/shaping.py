"""Noise shaping of keys: the encoder pushes its errors to where the model's queries do not look.

A key's error e costs (q . e)^2 over the queries q, e^T H e with H their Gram matrix. Factored as H = M^T diag(d) M with
M unit lower triangular this is sum_i d_i (e_i + sum_(j<i) M_ij e_j)^2, so that channels are coded one after another,
each making up for the errors before it (the LDL feedback of QuIP, arXiv 2307.13304). Readers know nothing of it.
Channels come in the order in which trellis paths visit them (`packing.key_orders`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .packing import key_orders
from .transform import Transform

F32 = NDArray[np.float32]
FLOOR = 0.01
"""Share of the identity that every Gram matrix gets at the end, so that its factors exist."""


@dataclass(frozen=True, eq=False)
class Shaping:
    """The feedback of one layer's keys, in rotated coordinates.

    Attributes:
        factor: M, float32 [heads, orders, padded_dim, padded_dim], heads being 1 or kv_heads; unit lower triangular
            once rows and columns are brought into the order of `packing.key_orders`.
        weight: d, float32 [heads, orders, padded_dim], of mean about 1.
    """

    factor: F32
    weight: F32


def make_shaping(gram: ArrayLike, ridge: float, transform: Transform, head_dim: int) -> Shaping:
    """The shaping of keys that meet queries with a given Gram matrix.

    Args:
        gram: mean of q q^T up to a factor, in the model's coordinates after RoPE, [head_dim, head_dim] or
            [kv_heads, head_dim, head_dim]; symmetric and positive semidefinite.
        ridge: share of the identity in rotated coordinates that is mixed in, in [0, 1]: how little the Gram is trusted.
        transform: of the keys.
        head_dim: channels of a head.

    Raises:
        ValueError: a wrong shape, a ridge outside [0, 1], a matrix that is no Gram matrix.
    """
    g = np.asarray(gram, np.float64)
    g = g[None] if g.ndim == 2 else g
    padded = transform.forward.shape[1]
    if g.ndim != 3 or g.shape[1:] != (head_dim, head_dim) or not np.isfinite(g).all():
        want = f"a finite query Gram [..., {head_dim}, {head_dim}]"
        raise ValueError(f"[codec] expected {want}; got {list(np.shape(gram))}")
    if not 0 <= ridge <= 1:
        raise ValueError(f"[codec] expected a ridge in [0, 1]; got {ridge}")
    if np.abs(g - g.transpose(0, 2, 1)).max() > 1e-4 * np.abs(g).max() or not (np.trace(g, axis1=1, axis2=2) > 0).all():
        raise ValueError("[codec] expected a symmetric query Gram of positive trace; got another matrix")
    g = np.pad(g, ((0, 0), (0, padded - head_dim), (0, padded - head_dim)))
    inverse = transform.inverse.astype(np.float64)
    h = inverse.transpose(0, 2, 1) @ ((g + g.transpose(0, 2, 1)) / 2) @ inverse
    h /= np.trace(h, axis1=1, axis2=2)[:, None, None] / padded
    eye = np.eye(padded)
    h = (1 - FLOOR) * ((1 - ridge) * h + ridge * eye) + FLOOR * eye
    orders, _ = key_orders(padded)
    factor = np.empty((len(h), len(orders), padded, padded), np.float32)
    weight = np.empty((len(h), len(orders), padded), np.float32)
    for i, order in enumerate(orders):
        last_first = order[::-1]
        try:
            upper = np.flip(np.linalg.cholesky(h[:, last_first[:, None], last_first]), (1, 2))
        except np.linalg.LinAlgError:
            raise ValueError("[codec] expected a positive semidefinite query Gram; got another matrix") from None
        diagonal = np.diagonal(upper, axis1=1, axis2=2)
        factor[:, i, order[:, None], order] = (upper / diagonal[:, None, :]).transpose(0, 2, 1)
        weight[:, i, order] = diagonal**2
    return Shaping(factor, weight)
