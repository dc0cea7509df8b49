"""What CUDA kernels are compiled with: macros, and a codec's transforms as the kernels read them. No GPU is needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...codec.codec import Codec
from ...codec.spec import CODES, SCALE_FORMATS
from ...codec.transform import Transform, random_signs
from .nvrtc import Macros

TYPES = {"float16": 0, "bfloat16": 1, "float32": 2}
ROTATIONS = {"none": 0, "hadamard": 1, "planar": 2, "custom": 2}


@dataclass(frozen=True, eq=False)
class Side:
    """What `TransformArgs` holds of one side of a codec, as arrays on the host; None for what the rotation lacks."""

    signs: NDArray[np.float32] | None
    in_matrix: NDArray[np.float32] | None
    out_matrix: NDArray[np.float32] | None
    mu: NDArray[np.float32] | None
    stride: int
    mu_stride: int

    @classmethod
    def of(cls, codec: Codec, t: Transform, encodes: bool) -> Side:
        """For what encodes, or for queries and outputs. A diagonal d turns the rotation's signs s to s d or s / d."""
        dim, rotation = codec.format.padded_dim, ROTATIONS[codec.rotation]
        signs = matrix = out = None
        if rotation == 1:
            s = random_signs(dim, codec.spec.seed)[None]
            d = 1.0 if t.diagonal is None else t.diagonal.astype(np.float64)
            signs = (s * d if encodes else s / d).astype(np.float32)
        if rotation == 2:
            matrix = t.forward.transpose(0, 2, 1) if encodes else t.inverse
            out = None if encodes else t.inverse.transpose(0, 2, 1)
        stride = (dim * dim if rotation == 2 else dim) if len(t.forward) > 1 else 0
        return cls(signs, matrix, out, t.mu, stride, dim if t.mu is not None and len(t.mu) > 1 else 0)


def macros(**values: object) -> Macros:
    """Macros by name."""
    return tuple((name, str(value)) for name, value in values.items())


def page_macros(codec: Codec, **extra: int) -> Macros:
    """The macros of page.cuh, and the kernel's own."""
    fmt = codec.format
    common = {
        "FORGE_DIM": fmt.padded_dim,
        "FORGE_HEAD_DIM": fmt.head_dim,
        "FORGE_K_BITS": fmt.k_bits,
        "FORGE_V_BITS": fmt.v_bits,
        "FORGE_K_CODE": CODES.index(fmt.k_code),
        "FORGE_V_CODE": CODES.index(fmt.v_code),
        "FORGE_SCALES": SCALE_FORMATS.index(fmt.scales),
        "FORGE_K_LEVELS": ",".join(map(str, codec.k_codebook.levels)),
        "FORGE_V_LEVELS": ",".join(map(str, codec.v_codebook.levels)),
        "FORGE_ROTATION": ROTATIONS[codec.rotation],
    }
    return macros(**{**common, **extra})


def merge_macros(dim: int, dtype: str) -> Macros:
    return macros(FORGE_DIM=dim, FORGE_TYPE=TYPES[dtype])


def rotation_macros(codec: Codec, **extra: int) -> Macros:
    """The macros of kernels that rotate vectors and read no pages."""
    common = {
        "FORGE_DIM": codec.format.padded_dim,
        "FORGE_HEAD_DIM": codec.head_dim,
        "FORGE_ROTATION": ROTATIONS[codec.rotation],
    }
    return macros(**{**common, **extra})
