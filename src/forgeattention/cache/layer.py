"""The cache of one layer: exact sinks, packed pages, exact recent tokens, for a batch of rows of any length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..codec import PAGE, Codec
from ..ops.arrays import dtype_of
from ..ops.table import ExactTokens, PageTable
from .arrays import arrays_of
from .pool import Ids, PagePool
from .rows import I64, Rows


@dataclass
class _Append:
    """What an append will do to one row: `pages` new pages, then `tail` follows the first `keep` exact tokens."""

    row: int
    k: Any
    v: Any
    count: int
    pages: Ids = field(default_factory=lambda: np.zeros(0, np.int64))


class LayerCache(Rows):
    """Keys and values of one layer for a batch of rows.

    A row is [sinks | packed pages | recent tokens]. The first `spec.sinks` tokens and the newest `spec.window` to
    `spec.window` + 63 are exact; when `spec.window` + 64 recent tokens would be held, the oldest leave in pages of
    64. What a row holds depends only on what was appended to, trimmed and evicted from it. Each page knows its
    position, so that pages may be missing. A call that raises leaves the cache as it was.

    The lengths and the page table lie on the device and are mirrored on the host; appending and attending one token
    waits for no device.

    Attributes:
        sparse: which tokens `attend` reads; None for all.
        sparse_step: what its last call left out; None for nothing.

    Args:
        codec: the layer's codec.
        batch: rows, all empty.
        arrays: framework and device; see `arrays_of`.
        dtype: of the exact tokens: "float32", "float16" or "bfloat16".
        pool: pages shared with other caches of the same codec, or None for an own pool.
        max_pages: most pages of an own pool.
        backend: which kernels encode and attend, "auto" or a name of `ops`.
    """

    @classmethod
    def like(cls, k: Any, codec: Codec, **options: Any) -> LayerCache:
        """An empty cache for keys such as `k` [batch, kv_heads, tokens, head_dim]; `options` as for the constructor."""
        arrays = arrays_of(k)
        return cls(codec, k.shape[0], arrays, dtype_of(k), **options)

    def prepare(self, q: Any, scale: float, n: int, keep: NDArray[np.bool_] | None = None) -> None:
        """Told, before `append`, of the queries q [batch, q_heads, m, head_dim] of the last m of n tokens to come (real
        where `keep` [batch, n] says so). Nothing here; a cache that evicts may recall pages."""

    def append(
        self, k: Any, v: Any, keep: NDArray[np.bool_] | None = None, confirm: Callable[[], int] | None = None
    ) -> None:
        """Adds tokens to every row.

        A long append is encoded from `k` and `v` where they lie; no copy of them is kept.

        Args:
            k, v: [batch, kv_heads, n, head_dim] in the cache's dtype, on its device, the last axis contiguous.
            keep: bool [batch, n] on the host: which tokens are real; None for all.
            confirm: what `check` gave for the same arguments, where it was called before.

        Raises:
            ValueError: a wrong shape, dtype or device; NaN or infinity (off the CPU this is looked for where more
                than 8 tokens are appended, and else left to the encoder); a full pool.
        """
        n = (confirm or self.check(k, v, keep))()
        if keep is None and self._exact_max + n < self._flush_at:
            self._write(k, v, n)
        else:
            self._append_rows(k, v, keep)

    def attend(self, q: Any, scale: float, *, causal: bool = True, sink_logits: Any = None) -> tuple[Any, Any]:
        """`ops.decode_attention` of q [batch, q_heads, n, head_dim] over the whole cache; with `sparse` over what
        matters of the rows that are long enough for it."""
        table, self.sparse_step = self.table, None
        if self.sparse is None or table is None:
            return self._attend(q, scale, causal, sink_logits)
        dense = self._packed < max(self.sparse.spec.min_context, 1)
        if dense.all():
            return self._attend(q, scale, causal, sink_logits)
        out, lse, self.sparse_step = self.sparse.attend(
            q, self.codec, table, self._exact_tokens, scale, causal, sink_logits, self.backend
        )
        if dense.any():  # a row's result is the same in any batch
            rows = self.arrays.index(np.flatnonzero(dense))
            whole, whole_lse = self._attend(q, scale, causal, sink_logits)
            out[rows], lse[rows] = whole[rows], whole_lse[rows]
        return out, lse

    def _attend(self, q: Any, scale: float, causal: bool, sink_logits: Any) -> tuple[Any, Any]:
        return ops.decode_attention(
            q,
            self.codec,
            self.table,
            self._exact_tokens,
            scale,
            causal=causal,
            sink_logits=sink_logits,
            backend=self.backend,
        )

    @property
    def capacity(self) -> int:
        """Exact tokens at which a row's oldest recent ones leave in pages."""
        return self._flush_at

    def reserve(self, tokens: int) -> None:
        """Widens the page table to `tokens` packed tokens a row, so that it stays where it is until then."""
        pages = -(-tokens // PAGE)
        if pages > self._ids.shape[1]:
            self._widen(pages)
            self._set_lengths(self._exact, self._packed, self._seen)

    def make_room(self, n: int) -> None:
        """Packs what would leave the rows if `n` more tokens came.

        Raises:
            ValueError: a full pool.
        """
        self._append_rows(self._k[:, :, :0], self._v[:, :, :0], None, n)

    def advance(self, n: int) -> None:
        """Takes note of n tokens that were written behind every row's exact ones by other means; with 0, only sets the
        device's lengths to the host's."""
        if n:
            self._exact += n
            self._seen += n
            self._exact_max += n
            self._exact_tokens = ExactTokens(self._k, self._v, self._exact_device, self._exact_max)
        else:
            self._set_lengths(self._exact, self._packed, self._seen)

    def attend_packed(self, q: Any, table: PageTable | None, scale: float) -> tuple[Any, Any] | None:
        """`ops.prefill_attention` of q over `table`, this cache's or one row's packed tokens; None without any."""
        return None if table is None else ops.prefill_attention(q, self.codec, table, scale, backend=self.backend)

    def trim(self, n: int | Sequence[int] | I64) -> None:
        """Removes the newest `n` tokens of each row (one number, or one per row), evicted ones counted.

        Where the cut falls inside a page, the page's remaining tokens return from their codes as exact ones. They keep
        the error that the codes had, and when they are packed again it adds a second one.

        Raises:
            ValueError: a negative number, or more tokens than a row has.
        """
        lengths = self._seen
        drop = np.broadcast_to(np.asarray(n, np.int64), lengths.shape)
        if (drop < 0).any() or (drop > lengths).any():
            raise ValueError(f"[cache.trim] expected 0 <= n <= tokens {lengths.tolist()}; got {drop.tolist()}")
        if not drop.any():
            return
        sinks, seen = self.codec.spec.sinks, lengths - drop
        counts = self._packed // PAGE
        left = np.arange(self._starts.shape[1]) < counts[:, None]
        whole = (left & (self._starts + PAGE <= seen[:, None])).sum(1)
        cut = np.flatnonzero((left & (self._starts < seen[:, None])).sum(1) > whole)
        if len(cut):
            decoded = self._decode(self._ids[cut, whole[cut]])
        # Recent tokens are the newest positions without a gap.
        recent = np.maximum(np.maximum(self._exact - sinks, 0) - drop, 0)
        recent[cut] = seen[cut] - self._starts[cut, whole[cut]]
        for i, row in enumerate(cut.tolist()):
            count = int(recent[row])
            for buffer, tokens in zip((self._k, self._v), decoded):
                buffer[row, :, sinks : sinks + count] = tokens[i, :, :count]
        for row in np.flatnonzero(whole < counts).tolist():
            self.pool.free(self._ids[row, whole[row] : counts[row]])
        self._set_lengths(np.minimum(seen, sinks) + recent, whole * PAGE, seen)

    def empty(self, rows: int, pool: PagePool) -> LayerCache:
        """A cache like this one with empty rows and the given pool."""
        return LayerCache(self.codec, rows, self.arrays, self.dtype, pool=pool, backend=self.backend)

    def clear(self) -> None:
        """Removes all tokens; the rows stay."""
        self.trim(self._seen)

    def check(self, k: Any, v: Any, keep: NDArray[np.bool_] | None = None) -> Callable[[], int]:
        """Raises what `append` would raise for these arguments, but for a full pool and for values. What it gives
        raises for values and gives n; it waits for the device, which may be given other work before."""
        want = (self.batch, self.codec.kv_heads, k.shape[2] if len(k.shape) == 4 else 0, self.codec.head_dim)
        for name, x in (("k", k), ("v", v)):
            if tuple(x.shape) != want:
                shape = f"[{want[0]}, {want[1]}, n, {want[3]}]"
                raise ValueError(f"[cache.append] expected {name} {shape}; got {list(x.shape)}")
            if not self.arrays.owns(x) or dtype_of(x) != self.dtype:
                raise ValueError(f"[cache.append] expected {name} in {self.dtype} on the cache's device; got {x.dtype}")
        n = want[2]
        if keep is not None and (keep.shape != (self.batch, n) or keep.dtype != np.bool_):
            got = f"{keep.dtype} {list(keep.shape)}"
            raise ValueError(f"[cache.append] expected keep bool [{self.batch}, {n}]; got {got}")
        if not self.arrays.on_host and n <= 8:
            return lambda: n
        finite = self.arrays.finite((k, v))

        def confirm() -> int:
            for name, good in zip("kv", finite()):
                if not good:
                    raise ValueError(f"[cache.append] expected finite {name}; got NaN or infinity")
            return n

        return confirm

    def _write(self, k: Any, v: Any, n: int) -> None:
        """Appends to the exact tokens of every row, which have room."""
        if self._uniform:
            end = self._exact_max
            self._k[:, :, end : end + n] = k
            self._v[:, :, end : end + n] = v
        else:
            at = self._exact_device[:, None] + self._steps[:n]
            self._k[self._rows, :, at] = k.swapaxes(1, 2)
            self._v[self._rows, :, at] = v.swapaxes(1, 2)
        self._exact += n
        self._seen += n
        self._exact_max += n
        self._exact_device += n
        self._exact_tokens = ExactTokens(self._k, self._v, self._exact_device, self._exact_max)

    def _append_rows(self, k: Any, v: Any, keep: NDArray[np.bool_] | None, room: int = 0) -> None:
        plans = []
        for row in range(self.batch):
            picked: Any = slice(None)
            if keep is not None:
                real = np.flatnonzero(keep[row])
                contiguous = len(real) == 0 or real[-1] - real[0] + 1 == len(real)
                start = int(real[0]) if len(real) else 0
                picked = slice(start, start + len(real)) if contiguous else self.arrays.index(real)
            row_k, row_v = k[row][:, picked], v[row][:, picked]
            plans.append(_Append(row, row_k, row_v, row_k.shape[1]))
        wanted = [max(0, (int(self._exact[p.row]) + p.count + room - self._flush_at) // PAGE + 1) for p in plans]
        ids = self.pool.alloc(sum(wanted))
        try:
            for plan, count in zip(plans, wanted):
                plan.pages, ids = ids[:count], ids[count:]
                self._encode(plan)
        except BaseException:
            self.pool.free(np.concatenate([p.pages for p in plans] + [ids]))
            raise
        self._commit(plans)

    def _encode(self, plan: _Append) -> None:
        """Encodes what leaves a row: its oldest recent tokens, joined with the first new ones, then new ones alone."""
        pages, sinks, held = len(plan.pages), self.codec.spec.sinks, int(self._exact[plan.row])
        if not pages:
            return
        addresses = self.pool.addresses(plan.pages)
        mixed = min(pages, -(-max(held - sinks, 0) // PAGE))
        if mixed:
            end = sinks + mixed * PAGE
            k, v = (
                self.arrays.concat([buffer[plan.row, :, sinks : min(held, end)], new[:, : max(end - held, 0)]], 1)
                for buffer, new in ((self._k, plan.k), (self._v, plan.v))
            )
            at = self.arrays.index(addresses[:mixed])
            ops.encode(k, v, self.codec, self.pool.base, at, backend=self.backend)
        if pages > mixed:
            new = slice(sinks + mixed * PAGE - held, sinks + pages * PAGE - held)
            at = self.arrays.index(addresses[mixed:])
            ops.encode(plan.k[:, new], plan.v[:, new], self.codec, self.pool.base, at, backend=self.backend)

    def _commit(self, plans: list[_Append]) -> None:
        sinks, (exact, packed, seen) = self.codec.spec.sinks, (x.copy() for x in self._host_lengths)
        most = max((int(packed[p.row]) // PAGE + len(p.pages) for p in plans), default=0)
        if most > self._ids.shape[1]:
            self._widen(max(most, self._ids.shape[1] * 5 // 4))
        for p in plans:
            held, gone = int(exact[p.row]), PAGE * len(p.pages)
            for buffer, new in ((self._k, p.k), (self._v, p.v)):
                if not gone:
                    buffer[p.row, :, held : held + p.count] = new
                    continue
                if held < sinks:
                    buffer[p.row, :, held:sinks] = new[:, : sinks - held]
                left = max(held - sinks - gone, 0)
                if left:
                    buffer[p.row, :, sinks : sinks + left] = self.arrays.copy(buffer[p.row, :, sinks + gone : held])
                total = held + p.count - gone
                buffer[p.row, :, sinks + left : total] = new[:, p.count - (total - sinks - left) :]
            if gone:
                first = int(packed[p.row]) // PAGE
                at = p.row, slice(first, first + len(p.pages))
                self._ids[at] = p.pages
                oldest = max(int(seen[p.row]) - max(held - sinks, 0), sinks)
                self._starts[at] = oldest + PAGE * np.arange(len(p.pages))
                self.arrays.assign(self._offsets, self.pool.addresses(p.pages), at)
            exact[p.row] += p.count - gone
            packed[p.row] += gone
            seen[p.row] += p.count
        self._set_lengths(exact, packed, seen)

    def _decode(self, pages: Ids) -> tuple[Any, Any]:
        """Keys and values [pages, kv_heads, 64, head_dim] of single pages."""
        offsets = self.arrays.zeros((len(pages), 1), "int64")
        self.arrays.assign(offsets, self.pool.addresses(pages)[:, None])
        lengths = self.arrays.zeros((len(pages),), "int32") + PAGE
        return ops.decode_pages(self.codec, PageTable(self.pool.base, offsets, lengths, PAGE), backend=self.backend)
