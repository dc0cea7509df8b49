"""Rounds of eviction: pages that a layer's cache gives up, and demoted ones that it takes back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..cache.edit import decode
from ..cache.layer import LayerCache
from ..cache.pool import Ids
from ..cache.strategies import PageEviction
from ..codec import PAGE
from ..models.rope import Rope
from ..ops.arrays import from_numpy, to_numpy
from .policy import Items, effective, excess
from .recall import mass_estimates, visitors
from .settings import Eviction
from .state import Counts, Demoted, Note, Round, RowHistory
from .store import HostStore
from .triattention import Centres, join_heads

I64 = NDArray[np.int64]

SAMPLE = 64
"""Most queries of a chunk that the centres take in."""
PROMPT = 8
"""A step of more tokens is part of a prompt, from which centres are gathered."""
DECODED = 16
"""Pages decoded at a time to note their means."""


class Evictor:
    """Rounds of eviction for one `LayerCache`, given to it as `eviction`: before an append, where `interval` tokens
    have come since the last round, the policy picks whole pages to give up, until what is held fits the budget. Pages
    that stay are not touched.

    Args:
        settings: policy, interval, what becomes of evicted pages.
        rope: the layer's rotation; None where the policy wants no scores.
        fraction: share of the model's layers that are evicted from.
        centres: query centres known beforehand; None gathers them from prompts.

    Attributes:
        counts: what was done so far.
        store: demoted pages; None where they are dropped. Copies of the cache share it.
        gathers: whether query centres are taken from prompts.

    Raises:
        ValueError: no rotation for a policy that scores.
    """

    def __init__(
        self, settings: Eviction, rope: Rope | None, *, fraction: float = 1.0, centres: Centres | None = None
    ) -> None:
        if settings.policy.scored and rope is None:
            raise ValueError("[eviction] expected the model's rope for a policy that scores; got None")
        self.settings = settings
        self.rope = rope
        self.fraction = fraction if settings.fraction is None else settings.fraction
        self.centres = centres
        self.gathers = settings.policy.scored and centres is None
        self.counts = Counts()
        self.store: HostStore | None = None
        self._rows: RowHistory | None = None

    @property
    def demoted(self) -> list[int]:
        """Demoted pages of each row."""
        return [len(row) for row in self.history.demoted]

    @property
    def history(self) -> RowHistory:
        assert self._rows is not None
        return self._rows

    def attach(self, cache: LayerCache) -> None:
        if self._rows is not None:
            raise ValueError("[eviction] expected an Evictor of its own for each cache; got one that has a cache")
        if self.store is None:
            self.store = self.settings.store(cache.codec.page_bytes)
        self._rows = RowHistory.empty(cache.buffer.k.shape[0])

    def report(self, cache: LayerCache) -> dict[str, Any]:
        """`counts`, tokens held and seen, and bytes demoted (those of copies included)."""
        held = int((cache.rows.exact + cache.rows.packed).sum())
        demoted = 0 if self.store is None else self.store.nbytes
        return {**asdict(self.counts), "held": held, "seen": int(cache.rows.seen.sum()), "demoted_bytes": demoted}

    def prepare(self, cache: LayerCache, q: Any, scale: float, n: int, keep: NDArray[np.bool_] | None = None) -> None:
        m = q.shape[2]
        gather = self.gathers and m > PROMPT
        if not gather and not any(self.history.demoted):
            return
        host = to_numpy(q)
        for row in range(cache.batch):
            real = np.arange(m) if keep is None else np.flatnonzero(keep[row, n - m :])
            if not len(real):
                continue
            before = n - m if keep is None else int(keep[row, : n - m].sum())
            if gather:
                self._gather(host[row][:, real], int(cache.rows.seen[row]) + before)
            if self.history.demoted[row]:
                self._recall(cache, row, host[row][:, real], scale)

    @contextmanager
    def rounds(self, cache: LayerCache) -> Iterator[None]:
        lengths = cache.rows.seen
        due = np.flatnonzero(lengths - self.history.last >= self.settings.interval).tolist()
        rounds: list[Round] = []
        try:
            for row in due:
                rounds.append(self._plan(cache, row))
            yield
        except BaseException:
            for planned in rounds:
                self._release(planned.demoted)
            raise
        for planned in rounds:
            self.counts.rounds += bool(planned.gone.any())
            self._run(cache, planned)
        last = self.history.last.copy()
        last[due] = lengths[due]
        self._rows = replace(self.history, last=last)
        if rounds and cache.pool.spare > max(8, cache.pool.in_use // 4):
            cache.pool.compact(cache.backend)

    def trimmed(self, cache: LayerCache) -> None:
        known, gone = self.history, []
        demoted, guests = [], []
        for row, length in enumerate(cache.rows.seen.tolist()):
            gone += [d for d in known.demoted[row] if d.start + PAGE > length]
            demoted.append(tuple(d for d in known.demoted[row] if d.start + PAGE <= length))
            guests.append({s: at for s, at in known.guests[row].items() if s + PAGE <= length})
        self._rows = RowHistory(np.minimum(known.last, cache.rows.seen), tuple(demoted), tuple(guests))
        self._release(gone)

    def empty(self, rows: int) -> Evictor:
        """One like this for a cache of so many rows without tokens; they share the store."""
        out = Evictor(self.settings, self.rope, fraction=self.fraction, centres=self.centres and self.centres.copy())
        out.gathers, out.store, out.counts = self.gathers, self.store, replace(self.counts)
        return out

    def take(self, rows: I64) -> Evictor:
        known = self.history.take(rows)
        out = self.empty(len(rows))
        self._share(known.all_demoted())
        out._rows = known
        return out

    def joined(self, other: PageEviction | None) -> Evictor:
        if not isinstance(other, Evictor) or (other.store is None) != (self.store is None):
            raise ValueError("[cache.join] expected a cache that evicts in the same way; got another")
        mine, theirs = self.history, other.history
        first = not len(mine.last)  # an empty cache takes over what the other has learnt
        out = (other if first else self).empty(0)
        out.store = self.store
        demoted: list[tuple[Demoted, ...]] = []
        try:
            for row in mine.demoted:
                self._share(row)
                demoted.append(row)
            for row in theirs.demoted:
                if other.store is self.store:
                    self._share(row)
                demoted.append(row if other.store is self.store else tuple(self._copied(row, other)))
        except BaseException:
            self._release([d for row in demoted for d in row])
            raise
        out._rows = RowHistory(np.append(mine.last, theirs.last), tuple(demoted), mine.guests + theirs.guests)
        return out

    def release(self) -> None:
        known, self._rows = self._rows, None
        if known is not None and self.store is not None:
            self._release(known.all_demoted())

    def state(self) -> dict[str, Any]:
        """Centres and rounds as JSON holds them. Demoted pages are not part of it: a saved cache has dropped them."""
        centres = None
        if self.centres is not None and self.centres.count:
            centres = {name: array.tolist() for name, array in self.centres.arrays().items()}
        return {"centres": centres, "counts": asdict(self.counts), "last": self.history.last.tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        if state["centres"] is not None and self.gathers:
            assert self.rope is not None
            arrays = {name: np.array(x) for name, x in state["centres"].items()}
            self.centres = Centres.from_arrays(self.rope, arrays)
        self.counts = Counts(**state["counts"])
        self._rows = replace(self.history, last=np.array(state["last"], np.int64))

    def _gather(self, q: NDArray[Any], first: int) -> None:
        if self.centres is None:
            assert self.rope is not None
            self.centres = Centres(self.rope, len(q))
        step = -(-q.shape[1] // SAMPLE)
        self.centres.add(q[:, ::step], first + np.arange(0, q.shape[1], step))

    def _notes(self, cache: LayerCache, ids: Ids) -> list[Note]:
        """Notes of pages; unknown ones are decoded, a few at a time."""
        notes, heads = cache.pool.notes, cache.codec.kv_heads
        unknown = [page for page in ids.tolist() if page not in notes]
        for i in range(0, len(unknown), DECODED):
            some = unknown[i : i + DECODED]
            for page, k in zip(some, to_numpy(decode(cache, np.array(some))[0])):
                sizes = np.zeros((heads, 0)) if self.rope is None else np.abs(self.rope.pairs(k)).mean(1)
                notes[page] = Note(k.mean(1).astype(np.float32), sizes.astype(np.float32))
        return [notes[page] for page in ids.tolist()]

    def _scores(self, cache: LayerCache, row: int) -> NDArray[np.float64]:
        """A score for each page of a row, from those of its tokens. Keys are scored from the codes, by one dot product
        with each head's folded query; the norm term is that of the page's mean."""
        ids = cache.row_pages(row)
        if not self.settings.policy.scored or self.centres is None or not self.centres.count:
            return np.zeros(len(ids))
        folded = self.centres.folded(int(cache.rows.seen[row]), cache.codec.head_dim)
        q = from_numpy(folded[None, :, None].astype(np.float32), cache.buffer.k, "float32")
        table = cache.row(row)[0]
        assert table is not None
        trig = to_numpy(ops.qk_scores(q, cache.codec, table, 1.0, backend=cache.backend))[0, :, 0]
        sizes = np.stack([note.sizes for note in self._notes(cache, ids)], 1).astype(np.float64)
        weights = self.centres.norm_weights().reshape(len(sizes), -1, sizes.shape[2])
        norm = np.einsum("kgf,kpf->kgp", weights, sizes).reshape(len(folded), len(ids))
        tokens = trig.reshape(len(folded), len(ids), PAGE).astype(np.float64) + norm[..., None]
        joined = join_heads(tokens)
        return joined.max(1) if self.settings.join == "max" else joined.mean(1)

    def _fresh(self, cache: LayerCache, row: int) -> NDArray[np.bool_]:
        """Which pages of a row were recalled so lately that they stay."""
        limit, guests = int(cache.rows.seen[row]) - 2 * self.settings.interval, self.history.guests[row]
        return np.array([guests.get(start, -1) > limit for start in cache.page_starts(row).tolist()], np.bool_)

    def _plan(self, cache: LayerCache, row: int) -> Round:
        length, ids, fresh = int(cache.rows.seen[row]), cache.row_pages(row), self._fresh(cache, row)
        gone = np.zeros(len(ids), np.bool_)
        share = effective(self.settings.policy.share(length), self.fraction)
        held = int(cache.rows.exact[row] + cache.rows.packed[row]) - PAGE * int(fresh.sum())
        count = min(excess(held, length, share, PAGE), int((~fresh).sum()))
        if count:
            at = np.flatnonzero(~fresh)
            items = Items(cache.page_starts(row)[at], self._scores(cache, row)[at], PAGE, length)
            gone[at[self.settings.policy.choose(items, count)]] = True
        planned = Round(row, gone, [], 0)
        if self.store is not None:
            self._demote(cache, planned, ids)
        return planned

    def _demote(self, cache: LayerCache, planned: Round, ids: Ids) -> None:
        """Copies the pages that go to the store; a failure leaves it as it was."""
        assert self.store is not None
        at = np.flatnonzero(planned.gone)
        try:
            for i, note in zip(at.tolist(), self._notes(cache, ids[at])):
                if self.store.room == 0:
                    planned.lost += 1
                    continue
                page = np.asarray(cache.arrays.to_host(cache.pool.page(int(ids[i]))))
                planned.demoted.append(Demoted(int(cache.rows.starts[planned.row, i]), self.store.put(page), note))
        except BaseException:
            self._release(planned.demoted)
            raise

    def _run(self, cache: LayerCache, planned: Round) -> None:
        row, count = planned.row, int(planned.gone.sum())
        if not count:
            return
        gone = np.append(planned.gone, np.zeros(len(cache.row_pages(row)) - len(planned.gone), np.bool_))
        kept = set(cache.page_starts(row)[~gone].tolist())
        known = self.history
        demoted = sorted([*known.demoted[row], *planned.demoted], key=lambda d: d.start)
        after = known.with_row(row, demoted, {s: at for s, at in known.guests[row].items() if s in kept})
        cache.evict(row, gone)
        self._rows = after
        counts = self.counts
        counts.evicted += count
        counts.demoted += len(planned.demoted)
        counts.lost += planned.lost

    def _recall(self, cache: LayerCache, row: int, q: NDArray[Any], scale: float) -> None:
        assert self.store is not None
        waiting, ids, fresh = (
            self.history.demoted[row],
            cache.row_pages(row).copy(),
            np.flatnonzero(self._fresh(cache, row)),
        )
        means = [note.mean for note in [*self._notes(cache, ids), *(d.note for d in waiting)]]
        share = mass_estimates(q, np.stack(means), scale)
        here, away = share[: len(ids)], share[len(ids) :]
        limit = self.settings.recall_pages
        room = max(0, limit - len(fresh))
        if cache.pool.max_pages is not None:
            room = min(room, cache.pool.max_pages - cache.pool.in_use)
        come, go = visitors(away, here[fresh], self.settings.recall_share, room, limit)
        if self.store.room is not None and self.store.room < len(go):
            come, go = come[: len(come) - len(go) + self.store.room], go[: self.store.room]
        self.counts.refused += int((away >= self.settings.recall_share).sum()) - len(come)
        if not come:
            return
        chosen = [waiting[i] for i in come]
        pages = [self.store.get(d.number) for d in chosen]
        if go:
            swapped = Round(row, np.zeros(len(ids), np.bool_), [], 0)
            swapped.gone[fresh[go]] = True
            self._demote(cache, swapped, ids)
            self._run(cache, swapped)
        new = cache.pool.alloc(len(chosen))
        for page, data, d in zip(new.tolist(), pages, chosen):
            cache.pool.write(page, data)
            cache.pool.notes[page] = d.note
        known, length = self.history, int(cache.rows.seen[row])
        guests = {**known.guests[row], **{d.start: length for d in chosen}}
        after = known.with_row(row, (d for d in known.demoted[row] if d not in chosen), guests)
        cache.insert(row, new, np.array([d.start for d in chosen]))
        self._rows = after
        self._release(chosen)
        self.counts.recalled += len(chosen)

    def _share(self, pages: Iterable[Demoted]) -> None:
        for d in pages:
            assert self.store is not None
            self.store.share(d.number)

    def _copied(self, row: Sequence[Demoted], other: Evictor) -> list[Demoted]:
        """Another store's pages in this one, as far as it has room."""
        assert self.store is not None or not row
        out: list[Demoted] = []
        for d in row:
            if self.store is not None and other.store is not None and self.store.room != 0:
                out.append(Demoted(d.start, self.store.put(other.store.get(d.number)), d.note))
        return out

    def _release(self, pages: Iterable[Demoted]) -> None:
        for d in pages:
            assert self.store is not None
            self.store.free(d.number)
