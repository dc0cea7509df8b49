"""A spec bound to one layer's shape: everything that the ops need to know to write and read its pages."""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from .codebook import Codebook, codebook
from .spec import CodecSpec, PageFormat
from .transform import Transform, make_transform


class Codec:
    """Codec of one layer.

    Args:
        spec: the choices.
        head_dim: channels per head, one of 64, 80, 96, 128, 256, 512.
        kv_heads: key/value heads.
        k_matrix, v_matrix: with rotation "custom", [head_dim, head_dim] or [kv_heads, head_dim, head_dim].
        k_mu, v_mu: static centres, [head_dim] or [kv_heads, head_dim].

    Raises:
        ValueError: an unsupported head_dim, a matrix or centre of the wrong shape.
    """

    def __init__(
        self,
        spec: CodecSpec,
        head_dim: int,
        kv_heads: int,
        *,
        k_matrix: ArrayLike | None = None,
        v_matrix: ArrayLike | None = None,
        k_mu: ArrayLike | None = None,
        v_mu: ArrayLike | None = None,
    ) -> None:
        if kv_heads < 1:
            raise ValueError(f"[codec] expected kv_heads >= 1; got {kv_heads}")
        self.spec = spec
        self.kv_heads = kv_heads
        self.format: PageFormat = spec.page_format(head_dim)
        self.k_codebook: Codebook = codebook(spec.k_bits, spec.k_code)
        self.v_codebook: Codebook = codebook(spec.v_bits, spec.v_code)
        self.k_transform: Transform = make_transform(spec, self.format, k_matrix, k_mu)
        self.v_transform: Transform = make_transform(spec, self.format, v_matrix, v_mu)
        for side, t in (("k", self.k_transform), ("v", self.v_transform)):
            for name, array in (("matrix", t.forward), ("mu", t.mu)):
                if array is not None and array.shape[0] not in (1, kv_heads):
                    raise ValueError(f"[codec] expected {side}_{name} for 1 or {kv_heads} heads; got {array.shape[0]}")

    @property
    def head_dim(self) -> int:
        return self.format.head_dim

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of all KV heads."""
        return self.kv_heads * self.format.record_bytes

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the spec, the shape, and any custom matrix or centre; equal codecs read each other's pages."""
        h = hashlib.sha256(f"{self.spec.to_json()} {self.head_dim} {self.kv_heads}".encode())
        for t in (self.k_transform, self.v_transform):
            for array in (t.forward if self.spec.rotation == "custom" else None, t.mu):
                h.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
        return h.hexdigest()[:32]
