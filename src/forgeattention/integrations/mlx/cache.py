"""A packed layer of an mlx-lm prompt cache, and the attention over it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask
from numpy.typing import NDArray

from ...cache import LayerCache, PagePool, PendingTokens
from ...codec import PAGE, Codec, CodecSpec
from ...eviction import Evictor
from ...sparse import SparseLayer
from .convert import integers, json_array, packed_width, widened
from .stored import codec_said, read_header, read_layer

I64 = NDArray[np.int64]
Keep = NDArray[np.bool_]
Codecs = dict[tuple[int, int], Codec]


class Seam:
    """Whether mlx-lm's attention knows packed layers now; see `mlx_lm.patched`."""

    depth = 0
    making = 0  # how many of those let mlx-lm itself make packed caches


class PackedKVCache:
    """A full-attention layer's cache for mlx-lm, in place of its KVCache and BatchKVCache.

    Works under `forgeattention.integrations.mlx.patched()`. What it holds of a sequence does not depend on padding
    or on other rows. See `forgeattention.cache.LayerCache` for sinks, packed pages and the exact window.

    Args:
        spec: how the cache is coded.
        codec: this layer's codec, for what a spec cannot say.
        codecs: codecs of `spec` made so far, by (head_dim, kv_heads), shared between layers.
        max_pages: most pages, or None.
        backend: which kernels run, "auto" or a name of `ops`.
        sparse: which packed tokens decode steps read; None for all.
        evicting: what an `Evictor` is told; None keeps all pages.

    Attributes:
        cache: the tokens, or None before the first.
    """

    # Layers that share keys are not told apart here: any layer may be read again later. No attribute may be named
    # "bits": mlx-lm would take the cache for its own quantised one.
    shared = True

    def __init__(
        self,
        spec: CodecSpec | None = None,
        *,
        codec: Codec | None = None,
        codecs: Codecs | None = None,
        max_pages: int | None = None,
        backend: str = "auto",
        sparse: SparseLayer | None = None,
        evicting: dict[str, Any] | None = None,
    ) -> None:
        self.spec = codec.spec if codec is not None else CodecSpec() if spec is None else spec
        self.codec = codec
        self.codecs: Codecs = {} if codecs is None else codecs
        self.max_pages = max_pages
        self.backend = backend
        self.evicting = evicting
        self.sparse = sparse
        self.cache: LayerCache | None = None
        self.batched = False
        self.v_dim = 0  # of the model's values, which may be narrower than the packed ones
        self._reset(1)

    def _reset(self, rows: int) -> None:
        # Positions as mlx-lm counts them: below 0 in left padding, past the tokens in right padding.
        self._position = np.zeros(rows, np.int64)
        self._right: I64 | None = None
        self._pending: PendingTokens | None = None
        self._keep: Keep | None = None
        self._offset: Any = None

    @property
    def rows(self) -> int:
        return len(self._position)

    @property
    def offset(self) -> Any:
        """The next position: an int, or an array [batch] once batched."""
        if not self.batched:
            return int(self._position[0])
        if self._offset is None:
            self._offset = mx.array(self._position)
        return self._offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Takes keys and values [batch, kv_heads, n, head_dim]; gives a handle, twice, that the patched attention
        reads.

        Raises:
            ValueError: mlx-lm is not patched, or the tokens cannot be appended; nothing has changed.
        """
        if not Seam.depth:
            raise ValueError("[mlx_lm] expected mlx-lm under integrations.mlx.patched(); got it as it is")
        if self._pending is not None and not self._pending.appended:
            raise ValueError("[mlx_lm] expected attention after each update_and_fetch; got none: reset the cache")
        self.v_dim = values.shape[3]
        width = packed_width(keys.shape[3], self.v_dim)
        keys, values = widened(keys, width), widened(values, width)
        if self.cache is None:
            self._start(keys)
        assert self.cache is not None
        n = keys.shape[2]
        keep = self._new_tokens(n)
        self.cache.check(keys, values, keep)()
        self._pending, self._keep = PendingTokens(self, keys, values), keep
        self._move(n)
        return self._pending, self._pending

    def keys_and_values(self) -> tuple[Any, Any]:
        """The handle of the last update, for layers that share this one's keys."""
        if self._pending is None:
            raise ValueError("[mlx_lm] expected keys_and_values within a call of the model; got it outside")
        return self._pending, self._pending

    def _start(self, keys: mx.array) -> None:
        batch, heads, _, dim = keys.shape
        if not self.batched:
            self._reset(batch)
        if batch != self.rows:
            raise ValueError(f"[mlx_lm] expected {self.rows} rows; got {batch}")
        codec = self.codec
        if codec is None:
            codec = self.codecs.get((dim, heads)) or Codec(self.spec, dim, heads)
            self.codecs[dim, heads] = codec
        eviction = None if self.evicting is None else Evictor(**self.evicting)
        options: dict[str, Any] = {"max_pages": self.max_pages, "backend": self.backend}
        self.cache = LayerCache.like(keys, codec, sparse=self.sparse, eviction=eviction, **options)

    def _new_tokens(self, n: int) -> Keep | None:
        """Which of the next n positions hold real tokens, [batch, n]; None for all."""
        at = self._position[:, None] + np.arange(n)
        keep = at >= 0
        if self._right is not None:
            keep &= at < self._right[:, None]
        return None if keep.all() else keep

    def _move(self, n: int | I64) -> None:
        self._position = self._position + n
        self._offset = None

    @property
    def target(self) -> LayerCache:
        assert self.cache is not None
        return self.cache

    def real_tokens(self, tokens: PendingTokens, mask: Any, m: int) -> Keep | None:
        self.check_mask(mask, m)
        return self._keep

    def appended(self, tokens: PendingTokens, keep: Keep | None) -> None:
        """Nothing: positions count from the update on."""

    def abandoned(self, tokens: PendingTokens) -> None:
        if not tokens.appended and tokens is self._pending:
            self._move(-tokens.k.shape[2])
            self._pending = None

    def attribute(self, tokens: PendingTokens, name: str) -> Any:
        if name == "shape":  # models look there for the number of positions
            batch, heads, _, dim = tokens.k.shape
            return batch, heads, self.size(), dim
        if name == "dtype":
            return tokens.k.dtype
        if name == "astype":  # to itself: attention is computed in float32 whatever the keys are
            return lambda dtype: tokens
        raise ValueError(f"[mlx_lm] expected a model that leaves keys to mlx-lm's attention; got one reading .{name}")

    def size(self) -> int:
        return int(self._position.max(initial=0))

    def empty(self) -> bool:
        return self.cache is None

    @property
    def nbytes(self) -> int:
        return 0 if self.cache is None else self.cache.nbytes

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Removes the newest n tokens of each row, or all that it has; gives the most that were removed. See
        `LayerCache.trim` for what a cut inside a page costs."""
        drop = np.minimum(np.maximum(self._position, 0), n)
        if self.cache is not None and drop.any():
            self.cache.trim(drop)
            self._pending = None
            self._move(-drop)
        return int(drop.max(initial=0))

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask of N new positions: "causal" or None; padding is known to the cache. An array if asked for.

        Raises:
            ValueError: a window that hides tokens: this cache is for full attention.
        """
        if window_size is not None and self.size() + N > window_size:
            raise ValueError(f"[mlx_lm] expected full attention; got a window of {window_size} tokens")
        if return_array:
            return self._array_mask(N, self.size())
        return "causal" if N > 1 else None

    def _array_mask(self, n: int, past: int) -> mx.array:
        if not self.batched:
            return create_causal_mask(n, past)
        return create_causal_mask(n, past, left_padding=mx.array(self.size() - self._position))

    def check_mask(self, mask: Any, n: int) -> None:
        """Raises ValueError unless the mask of the last n positions is causal up to padding."""
        if mask is None:
            if n > 1:
                raise ValueError("[mlx_lm] expected causal attention; got no mask")
        elif isinstance(mask, str):
            if mask != "causal":
                raise ValueError(f"[mlx_lm] expected mask 'causal'; got {mask!r}")
        else:
            past = self.size() - n
            want = self._array_mask(n, past)
            fits = mask.dtype == mx.bool_ and mask.shape[-2:] == want.shape[-2:]
            if not fits or not bool((mask == want).all()):
                raise ValueError("[mlx_lm] expected a mask that is causal up to padding; got another pattern")

    def prepare(
        self, *, left_padding: Any = None, lengths: Any = None, right_padding: Any = None, **kwargs: Any
    ) -> None:
        """Announces padding: `left_padding` [batch] positions before an empty cache's tokens, or `right_padding` after
        the `lengths` [batch] tokens that come next."""
        if left_padding is not None:
            if self.cache is not None and self.cache.lengths.any():
                raise ValueError("[mlx_lm] expected left padding before any token; got it later")
            self._move(-integers(left_padding))
        if right_padding is not None and integers(right_padding).any():
            self._right = self._position + integers(lengths)

    def finalize(self) -> None:
        """Ends right padding."""
        if self._right is not None:
            self._move(np.minimum(self._right - self._position, 0))
            self._right = None

    @classmethod
    def merge(cls, caches: list[PackedKVCache]) -> PackedKVCache:
        """One cache with the given ones as rows. Packed pages are copied."""
        out = caches[0]._like()
        out.batched = True
        out._reset(0)
        for other in caches:
            out.extend(other)
        return out

    def extend(self, other: PackedKVCache) -> None:
        """Adds the rows of another cache behind this one's."""
        if self.cache is None and other.cache is not None:
            self.cache = other._empty_rows(self.rows)
        if self.cache is not None:
            theirs = other.cache if other.cache is not None else self._empty_rows(other.rows)
            self.cache.join(theirs)
        position = np.append(self._position, other._position)
        self._reset(len(position))
        self._position = position

    def _empty_rows(self, rows: int) -> LayerCache:
        """An empty cache like this one's, with pages of its own."""
        assert self.cache is not None
        made = self.cache
        pool = PagePool(made.codec.page_bytes, made.arrays, self.max_pages)
        return made.empty(rows, pool)

    def filter(self, batch_indices: Any) -> None:
        """Keeps the given rows."""
        rows = integers(batch_indices)
        if self.cache is not None:
            self.cache.select(rows)
        position = self._position[rows]
        right = None if self._right is None else self._right[rows]
        self._reset(len(rows))
        self._position, self._right = position, right

    def extract(self, idx: int) -> PackedKVCache:
        """A cache of one row, not batched, with pages of its own, so that it does not keep the whole batch's."""
        out = self._like()
        if self.cache is not None:
            out.cache = self._empty_rows(0)
            out.cache.join(self.cache.fork([idx]))
            out._position = out.cache.lengths
        return out

    def adopt(self, codec: Codec) -> None:
        """Takes a codec that reads the same pages: one that codes new pages better than what a file said."""
        if self.cache is not None and self.cache.codec.fingerprint == codec.fingerprint:
            self.cache.adopt(codec)
            self.codec = codec

    def _like(self) -> PackedKVCache:
        return PackedKVCache(
            self.spec,
            codec=self.codec,
            codecs=self.codecs,
            max_pages=self.max_pages,
            backend=self.backend,
            sparse=self.sparse,
            evicting=self.evicting,
        )

    def __copy__(self) -> PackedKVCache:
        out = self._like()
        out.cache = None if self.cache is None else self.cache.fork()
        out.batched = self.batched
        out._position, out._right = self._position, self._right
        return out

    def __deepcopy__(self, memo: object) -> PackedKVCache:
        return self.__copy__()

    @property
    def state(self) -> tuple[mx.array, ...]:
        """The contents as arrays, for `mx.eval` and mlx-lm's save_prompt_cache: a JSON header as bytes, the pages (all
        that share this cache's memory), each row's page numbers and their positions, lengths (exact, packed, all),
        exact keys and values."""
        if self._pending is not None and self._pending.appended:
            self._pending = None
        header: dict[str, Any] = {
            "spec": self.spec.to_json(),
            "batched": self.batched,
            "position": self._position.tolist(),
        }
        if self.cache is None:
            return (json_array(header),)
        made, codec = self.cache, self.cache.codec
        header |= {"head_dim": codec.head_dim, "kv_heads": codec.kv_heads, "codec": codec.fingerprint}
        header["diagonal"] = None if codec.k_transform.diagonal is None else codec.k_transform.diagonal.tolist()
        counts = made.packed_lengths // PAGE
        table, starts = np.full((2, made.batch, max(1, counts.max(initial=0))), -1, np.int64)
        for row in range(made.batch):
            table[row, : counts[row]] = made.pool.addresses(made.row_pages(row)) // codec.page_bytes
            starts[row, : counts[row]] = made.page_starts(row)
        base = made.pool.base
        if base is None:
            base = mx.zeros((codec.page_bytes,), dtype=mx.uint8)
        pages = base.reshape(-1, codec.page_bytes)[: max(1, int(table.max(initial=-1)) + 1)]
        lengths = mx.array(np.stack([made.exact_lengths, made.packed_lengths, made.lengths]))
        k, v = (x[:, :, : made.exact.max_length] for x in (made.exact.k, made.exact.v))
        return json_array(header), pages, mx.array(np.stack([table, starts])), lengths, k, v

    @state.setter
    def state(self, value: Any) -> None:
        header, made = read_header(value[0], filled=len(value) > 1), self.__dict__.get("codec")
        spec = CodecSpec.from_json(header["spec"])
        layer, codec = None, made
        if len(value) > 1:
            codec = codec_said(header) if made is None else made
            if codec.fingerprint != header["codec"]:
                raise ValueError(f"[mlx_lm] expected codec {codec.fingerprint}; got a cache of codec {header['codec']}")
            layer = read_layer(value[1:], codec)
            if len(header["position"]) != layer.batch:
                raise ValueError(f"[mlx_lm] expected positions of {layer.batch} rows; got {len(header['position'])}")
        self.__init__(spec, codec=codec if header.get("diagonal") is not None else made)  # type: ignore[misc]
        self.batched = header["batched"]
        self._position = np.array(header["position"], np.int64)
        self.cache = layer

    @property
    def meta_state(self) -> str:
        """Nothing: all is in `state`. Asked for by mlx-lm before 0.32.2."""
        return ""

    @classmethod
    def from_state(cls, state: Any, meta_state: Any = None) -> PackedKVCache:
        """The inverse of `state`. A codec with matrices or centres of its own cannot be restored so, and one fitted to
        a model's weights codes new pages without shaping their errors until it is adopted again. A cache that evicted
        comes back as one that keeps all further pages."""
        out = cls()
        out.state = state
        return out
