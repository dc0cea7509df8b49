"""A spec bound to one layer's shape: everything that the ops need to know to write and read its pages."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import weakref
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from .codebook import Codebook, codebook
from .shaping import Shaping, make_shaping
from .spec import CodecSpec, PageFormat, Rotation
from .transform import Transform, make_transform

WRITE_ONLY = ("key_mean", "k_scale_rule", "v_scale_rule", "refine")
"""Fields of a spec that only an encoder reads."""

_handles = itertools.count()
_by_handle: weakref.WeakValueDictionary[str, Codec] = weakref.WeakValueDictionary()


def codec_of(handle: str) -> Codec:
    """The codec that `Codec.handle` names.

    Raises:
        ValueError: it is gone.
    """
    codec = _by_handle.get(handle)
    if codec is None:
        raise ValueError(f"[codec] expected the handle of a living codec; got {handle!r}")
    return codec


class Codec:
    """Codec of one layer.

    Attributes:
        handle: a name for it within this process, where only a string can be passed on.

    Args:
        spec: the choices.
        head_dim: channels per head, one of 64, 80, 96, 128, 256, 512.
        kv_heads: key/value heads.
        k_matrix, v_matrix: with rotation "custom", [head_dim, head_dim] or [kv_heads, head_dim, head_dim].
        k_mu, v_mu: static centres, [head_dim] or [kv_heads, head_dim].
        k_diagonal: scales of the key channels before the rotation, [head_dim] or [kv_heads, head_dim].
        query_gram: Gram matrix of the queries that will read the keys, up to a factor, [head_dim, head_dim] or
            [kv_heads, head_dim, head_dim]; the encoder shapes its errors by it (`codec.shaping`), readers ignore it.
        gram_ridge: share of the identity mixed into it.

    Raises:
        ValueError: an unsupported head_dim, a matrix, centre, diagonal or Gram of the wrong shape.
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
        k_diagonal: ArrayLike | None = None,
        query_gram: ArrayLike | None = None,
        gram_ridge: float = 0.05,
    ) -> None:
        if kv_heads < 1:
            raise ValueError(f"[codec] expected kv_heads >= 1; got {kv_heads}")
        self.handle = f"codec{next(_handles)}"
        _by_handle[self.handle] = self
        self.spec = spec
        self.kv_heads = kv_heads
        self.format: PageFormat = spec.page_format(head_dim)
        self.k_codebook: Codebook = codebook(spec.k_bits, self.format.k_code)
        self.v_codebook: Codebook = codebook(spec.v_bits, self.format.v_code)
        self.k_transform: Transform = make_transform(spec, self.format, k_matrix, k_mu, k_diagonal)
        self.v_transform: Transform = make_transform(spec, self.format, v_matrix, v_mu)
        self.shaping: Shaping | None = None
        if query_gram is not None:
            self.shaping = make_shaping(query_gram, gram_ridge, self.k_transform, head_dim)
        given = [("query_gram", None if self.shaping is None else self.shaping.weight)]
        for side, t in (("k", self.k_transform), ("v", self.v_transform)):
            given += [(f"{side}_matrix", t.forward), (f"{side}_mu", t.mu)]
        for name, array in given:
            if array is not None and array.shape[0] not in (1, kv_heads):
                raise ValueError(f"[codec] expected {name} for 1 or {kv_heads} heads; got {array.shape[0]}")

    @property
    def head_dim(self) -> int:
        return self.format.head_dim

    @property
    def rotation(self) -> Rotation:
        """How kernels apply the transforms: the spec's rotation, for "hadamard" after a diagonal if there is one, or
        matrices ("custom") where a diagonal joins another rotation."""
        plain = self.k_transform.diagonal is None and self.v_transform.diagonal is None
        return self.spec.rotation if plain or self.spec.rotation == "hadamard" else "custom"

    def head(self, head: int) -> Codec:
        """The codec of one KV head by itself, for readers of its records."""
        one = copy.copy(self)
        vars(one).pop("fingerprint", None)
        one.handle, one.kv_heads, one.shaping = f"codec{next(_handles)}", 1, None
        _by_handle[one.handle] = one
        for side in ("k_transform", "v_transform"):
            t = getattr(self, side)
            parts = {f.name: getattr(t, f.name) for f in dataclasses.fields(t)}
            own = {n: x[head % len(x)][None] for n, x in parts.items() if isinstance(x, np.ndarray)}
            setattr(one, side, dataclasses.replace(t, **own))
        return one

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of all KV heads."""
        return self.kv_heads * self.format.record_bytes

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of all that a reader of pages must know: equal codecs read each other's pages.

        How a page was coded (scale rules, refinement, the query Gram) is not part of it.
        """
        read = {name: value for name, value in json.loads(self.spec.to_json()).items() if name not in WRITE_ONLY}
        h = hashlib.sha256(f"{json.dumps(read, sort_keys=True)} {self.head_dim} {self.kv_heads}".encode())
        for book in (self.k_codebook, self.v_codebook):
            h.update(f"{book.levels} {book.unit!r}".encode())
        for t in (self.k_transform, self.v_transform):
            for array in (t.forward if self.spec.rotation == "custom" else None, t.diagonal, t.mu):
                h.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
        return h.hexdigest()[:32]
