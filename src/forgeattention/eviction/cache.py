"""A layer's cache that gives up pages, and recalls those that were demoted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..cache.arrays import Arrays
from ..cache.layer import LayerCache
from ..cache.pool import Ids, PagePool
from ..codec import PAGE, Codec
from ..models.rope import Rope
from ..ops.arrays import from_numpy, to_numpy
from .policy import Items, effective, excess
from .recall import mass_estimates, visitors
from .settings import Eviction
from .triattention import Centres, join_heads

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]

SAMPLE = 64
"""Most queries of a chunk that the centres take in."""
PROMPT = 8
"""A step of more tokens is part of a prompt, from which centres are gathered."""
DECODED = 16
"""Pages decoded at a time to note their means."""


@dataclass(frozen=True, eq=False)
class Note:
    """What is remembered of a page: the mean of its keys [kv_heads, head_dim] and the mean size of their rotated pairs
    [kv_heads, n_rot / 2] (none without a rotation)."""

    mean: F32
    sizes: F32


@dataclass(frozen=True, eq=False)
class Demoted:
    """A page in the store: its first position, its number there, its note."""

    start: int
    number: int
    note: Note


@dataclass
class Counts:
    """What eviction did so far, in pages but for `rounds`.

    Attributes:
        rounds: rounds in which a page was given up.
        evicted: pages given up, those demoted among them.
        demoted: pages put into the store.
        recalled: pages that came back.
        refused: pages that were wanted back while `recall_pages` others were there.
        lost: pages dropped because the store was full.
    """

    rounds: int = 0
    evicted: int = 0
    demoted: int = 0
    recalled: int = 0
    refused: int = 0
    lost: int = 0


@dataclass
class _Round:
    """One row's round, planned: which pages go, and what became of their bytes."""

    row: int
    gone: NDArray[np.bool_]
    demoted: list[Demoted]
    lost: int


class EvictingCache(LayerCache):
    """A `LayerCache` with rounds of eviction: before an append, where `interval` tokens have come since the last round,
    the policy picks whole pages to give up, until what is held fits the budget. Pages that stay are not touched.

    Args:
        codec, batch, arrays, dtype: as for `LayerCache`.
        eviction: policy, interval, what becomes of evicted pages.
        rope: the layer's rotation; None where the policy wants no scores.
        fraction: share of the model's layers that are evicted from.
        centres: query centres known beforehand; None gathers them from prompts.
        options: as for `LayerCache`.

    Attributes:
        counts: what was done so far.
    """

    def __init__(
        self,
        codec: Codec,
        batch: int,
        arrays: Arrays,
        dtype: str = "float32",
        *,
        eviction: Eviction,
        rope: Rope | None,
        fraction: float = 1.0,
        centres: Centres | None = None,
        **options: Any,
    ) -> None:
        if eviction.policy.scored and rope is None:
            raise ValueError("[eviction] expected the model's rope for a policy that scores; got None")
        self._demoted: list[list[Demoted]] = [[] for _ in range(batch)]
        super().__init__(codec, batch, arrays, dtype, **options)
        self.eviction = eviction
        self.rope = rope
        self.fraction = fraction if eviction.fraction is None else eviction.fraction
        self.centres = centres
        self._gathers = eviction.policy.scored and centres is None
        self.counts = Counts()
        self.store = eviction.store(codec.page_bytes)
        self._last = np.zeros(batch, np.int64)
        # Recalled pages by first position, with the length at which they came.
        self._guests: list[dict[int, int]] = [{} for _ in range(batch)]

    @property
    def demoted(self) -> list[int]:
        """Demoted pages of each row."""
        return [len(row) for row in self._demoted]

    def report(self) -> dict[str, Any]:
        """`counts`, tokens held and seen, and bytes demoted (those of forks included)."""
        held = int((self._exact + self._packed).sum())
        demoted = 0 if self.store is None else self.store.nbytes
        return {**asdict(self.counts), "held": held, "seen": int(self._seen.sum()), "demoted_bytes": demoted}

    def prepare(self, q: Any, scale: float, n: int, keep: NDArray[np.bool_] | None = None) -> None:
        m = q.shape[2]
        gather = self._gathers and m > PROMPT
        if not gather and not any(self._demoted):
            return
        host = to_numpy(q)
        for row in range(self.batch):
            real = np.arange(m) if keep is None else np.flatnonzero(keep[row, n - m :])
            if not len(real):
                continue
            before = n - m if keep is None else int(keep[row, : n - m].sum())
            if gather:
                self._gather(host[row][:, real], int(self._seen[row]) + before)
            if self._demoted[row]:
                self._recall(row, host[row][:, real], scale)

    def append(
        self, k: Any, v: Any, keep: NDArray[np.bool_] | None = None, confirm: Callable[[], int] | None = None
    ) -> None:
        self._with_rounds(lambda: super(EvictingCache, self).append(k, v, keep, confirm))

    def make_room(self, n: int) -> None:
        self._with_rounds(lambda: super(EvictingCache, self).make_room(n))

    def _with_rounds(self, step: Callable[[], None]) -> None:
        """A step, with the rounds that are due before it: planned, which may fail, then the step, then carried out."""
        lengths = self._seen.copy()
        due = np.flatnonzero(lengths - self._last >= self.eviction.interval).tolist()
        rounds: list[_Round] = []
        try:
            for row in due:
                rounds.append(self._plan(row))
            step()
        except BaseException:
            for planned in rounds:
                self._release(planned.demoted)
            raise
        for planned in rounds:
            self.counts.rounds += bool(planned.gone.any())
            self._run(planned)
        self._last[due] = lengths[due]
        if rounds and self.pool.spare > max(8, self.pool.in_use // 4):
            self.pool.compact(self.backend)

    def trim(self, n: int | Sequence[int] | I64) -> None:
        super().trim(n)
        for row, length in enumerate(self._seen.tolist()):
            gone = [d for d in self._demoted[row] if d.start + PAGE > length]
            self._release(gone)
            self._demoted[row] = [d for d in self._demoted[row] if d.start + PAGE <= length]
            self._guests[row] = {s: at for s, at in self._guests[row].items() if s + PAGE <= length}
        self._last = np.minimum(self._last, self._seen)

    def select(self, rows: Iterable[int]) -> None:
        index = self._row_index(rows)
        super().select(index)
        old, self._demoted = self._demoted, [self._shared(self._demoted[row]) for row in index.tolist()]
        for row in old:
            self._release(row)
        self._last, self._guests = self._last[index], [dict(self._guests[row]) for row in index.tolist()]

    def empty(self, rows: int, pool: PagePool) -> EvictingCache:
        out = EvictingCache(
            self.codec, rows, self.arrays, self.dtype, eviction=self.eviction, rope=self.rope, fraction=self.fraction,
            centres=None if self.centres is None else self.centres.copy(), pool=pool, backend=self.backend,
        )  # fmt: skip
        out._gathers, out.store = self._gathers, self.store
        out.counts = Counts(**asdict(self.counts))
        return out

    def fork(self, rows: Iterable[int] | None = None) -> LayerCache:
        index = self._row_index(range(self.batch) if rows is None else rows)
        other = super().fork(index)
        assert isinstance(other, EvictingCache)
        other._demoted = [self._shared(self._demoted[row]) for row in index.tolist()]
        other._last, other._guests = self._last[index], [dict(self._guests[row]) for row in index.tolist()]
        return other

    def join(self, other: LayerCache) -> None:
        if not isinstance(other, EvictingCache) or (other.store is None) != (self.store is None):
            raise ValueError("[cache.join] expected a cache that evicts in the same way; got another")
        batch = self.batch
        theirs = [
            self._shared(row) if other.store is self.store else self._copied(row, other) for row in other._demoted
        ]
        try:
            super().join(other)
        except BaseException:
            for row in theirs:
                self._release(row)
            raise
        self._demoted += theirs
        self._last, self._guests = np.append(self._last, other._last), self._guests + list(map(dict, other._guests))
        if not batch:
            self.centres, self.counts = other.centres and other.centres.copy(), Counts(**asdict(other.counts))

    def __del__(self) -> None:
        if getattr(self, "store", None) is not None:
            for row in self._demoted:
                self._release(row)
            self._demoted = []
        super().__del__()

    def state(self) -> dict[str, Any]:
        """Centres and rounds as JSON holds them. Demoted pages are not part of it: a saved cache has dropped them."""
        centres = None
        if self.centres is not None and self.centres.count:
            centres = {name: array.tolist() for name, array in self.centres.arrays().items()}
        return {"centres": centres, "counts": asdict(self.counts), "last": self._last.tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        if state["centres"] is not None and self._gathers:
            assert self.rope is not None
            arrays = {name: np.array(x) for name, x in state["centres"].items()}
            self.centres = Centres.from_arrays(self.rope, arrays)
        self.counts = Counts(**state["counts"])
        self._last = np.array(state["last"], np.int64)

    def _gather(self, q: NDArray[Any], first: int) -> None:
        if self.centres is None:
            assert self.rope is not None
            self.centres = Centres(self.rope, len(q))
        step = -(-q.shape[1] // SAMPLE)
        self.centres.add(q[:, ::step], first + np.arange(0, q.shape[1], step))

    def _notes(self, ids: Ids) -> list[Note]:
        """Notes of pages; unknown ones are decoded, a few at a time."""
        notes, heads = self.pool.notes, self.codec.kv_heads
        unknown = [page for page in ids.tolist() if page not in notes]
        for i in range(0, len(unknown), DECODED):
            some = unknown[i : i + DECODED]
            for page, k in zip(some, to_numpy(self._decode(np.array(some))[0])):
                sizes = np.zeros((heads, 0)) if self.rope is None else np.abs(self.rope.pairs(k)).mean(1)
                notes[page] = Note(k.mean(1).astype(np.float32), sizes.astype(np.float32))
        return [notes[page] for page in ids.tolist()]

    def _scores(self, row: int) -> NDArray[np.float64]:
        """A score for each page of a row, from those of its tokens. Keys are scored from the codes, by one dot product
        with each head's folded query; the norm term is that of the page's mean."""
        ids = self.row_pages(row)
        if not self.eviction.policy.scored or self.centres is None or not self.centres.count:
            return np.zeros(len(ids))
        folded = self.centres.folded(int(self._seen[row]), self.codec.head_dim)
        q = from_numpy(folded[None, :, None].astype(np.float32), self._k, "float32")
        table = self.row(row)[0]
        assert table is not None
        trig = to_numpy(ops.qk_scores(q, self.codec, table, 1.0, backend=self.backend))[0, :, 0]
        sizes = np.stack([note.sizes for note in self._notes(ids)], 1).astype(np.float64)
        weights = self.centres.norm_weights().reshape(len(sizes), -1, sizes.shape[2])
        norm = np.einsum("kgf,kpf->kgp", weights, sizes).reshape(len(folded), len(ids))
        tokens = trig.reshape(len(folded), len(ids), PAGE).astype(np.float64) + norm[..., None]
        joined = join_heads(tokens)
        return joined.max(1) if self.eviction.join == "max" else joined.mean(1)

    def _fresh(self, row: int) -> NDArray[np.bool_]:
        """Which pages of a row were recalled so lately that they stay."""
        limit, guests = int(self._seen[row]) - 2 * self.eviction.interval, self._guests[row]
        return np.array([guests.get(start, -1) > limit for start in self.page_starts(row).tolist()], np.bool_)

    def _plan(self, row: int) -> _Round:
        length, ids, fresh = int(self._seen[row]), self.row_pages(row), self._fresh(row)
        gone = np.zeros(len(ids), np.bool_)
        share = effective(self.eviction.policy.share(length), self.fraction)
        held = int(self._exact[row] + self._packed[row]) - PAGE * int(fresh.sum())
        count = min(excess(held, length, share, PAGE), int((~fresh).sum()))
        if count:
            at = np.flatnonzero(~fresh)
            items = Items(self.page_starts(row)[at], self._scores(row)[at], PAGE, length)
            gone[at[self.eviction.policy.choose(items, count)]] = True
        planned = _Round(row, gone, [], 0)
        if self.store is not None:
            self._demote(planned, ids)
        return planned

    def _demote(self, planned: _Round, ids: Ids) -> None:
        """Copies the pages that go to the store; a failure leaves it as it was."""
        assert self.store is not None
        at = np.flatnonzero(planned.gone)
        try:
            for i, note in zip(at.tolist(), self._notes(ids[at])):
                if self.store.room == 0:
                    planned.lost += 1
                    continue
                page = np.asarray(self.arrays.to_host(self.pool.page(int(ids[i]))))
                planned.demoted.append(Demoted(int(self._starts[planned.row, i]), self.store.put(page), note))
        except BaseException:
            self._release(planned.demoted)
            raise

    def _run(self, planned: _Round) -> None:
        row, count = planned.row, int(planned.gone.sum())
        if not count:
            return
        new = len(self.row_pages(row)) - len(planned.gone)
        self.evict(row, np.append(planned.gone, np.zeros(new, np.bool_)))
        self._demoted[row] = sorted(self._demoted[row] + planned.demoted, key=lambda d: d.start)
        kept = set(self.page_starts(row).tolist())
        self._guests[row] = {s: at for s, at in self._guests[row].items() if s in kept}
        counts = self.counts
        counts.evicted += count
        counts.demoted += len(planned.demoted)
        counts.lost += planned.lost

    def _recall(self, row: int, q: NDArray[Any], scale: float) -> None:
        assert self.store is not None
        waiting, ids, fresh = self._demoted[row], self.row_pages(row).copy(), np.flatnonzero(self._fresh(row))
        means = [note.mean for note in [*self._notes(ids), *(d.note for d in waiting)]]
        share = mass_estimates(q, np.stack(means), scale)
        here, away = share[: len(ids)], share[len(ids) :]
        limit = self.eviction.recall_pages
        room = max(0, limit - len(fresh))
        if self.pool.max_pages is not None:
            room = min(room, self.pool.max_pages - self.pool.in_use)
        come, go = visitors(away, here[fresh], self.eviction.recall_share, room, limit)
        if self.store.room is not None and self.store.room < len(go):
            come, go = come[: len(come) - len(go) + self.store.room], go[: self.store.room]
        self.counts.refused += int((away >= self.eviction.recall_share).sum()) - len(come)
        if not come:
            return
        chosen = [waiting[i] for i in come]
        pages = [self.store.get(d.number) for d in chosen]
        if go:
            swapped = _Round(row, np.zeros(len(ids), np.bool_), [], 0)
            swapped.gone[fresh[go]] = True
            self._demote(swapped, ids)
            self._run(swapped)
        new = self.pool.alloc(len(chosen))
        for page, data, d in zip(new.tolist(), pages, chosen):
            self.pool.write(page, data)
            self.pool.notes[page] = d.note
        self.insert(row, new, np.array([d.start for d in chosen]))
        self._guests[row] |= {d.start: int(self._seen[row]) for d in chosen}
        self._demoted[row] = [d for d in self._demoted[row] if d not in chosen]
        self._release(chosen)
        self.counts.recalled += len(chosen)

    def _shared(self, row: list[Demoted]) -> list[Demoted]:
        for d in row:
            assert self.store is not None
            self.store.share(d.number)
        return list(row)

    def _copied(self, row: list[Demoted], other: EvictingCache) -> list[Demoted]:
        """Another store's pages in this one, as far as it has room."""
        assert self.store is not None or not row
        out: list[Demoted] = []
        for d in row:
            if self.store is not None and other.store is not None and self.store.room != 0:
                out.append(Demoted(d.start, self.store.put(other.store.get(d.number)), d.note))
        return out

    def _release(self, row: list[Demoted]) -> None:
        for d in row:
            assert self.store is not None
            self.store.free(d.number)
