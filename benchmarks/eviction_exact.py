"""Eviction from an exact cache, in plain torch: what a policy costs by itself, at any granularity.

    tokens  single tokens are given up (no packed cache could free their memory without coding survivors again)
    entry   single tokens, once, when they leave the exact window: survivors could be coded once; later rounds are none
    pages   runs of 64 tokens, as in the packed cache

Rows of a batch are not supported.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, DynamicLayer

from forgeattention.codec import PAGE
from forgeattention.eviction import Centres, Policy, Rope, rope_of
from forgeattention.eviction.policy import Items, excess
from forgeattention.eviction.recall import mass_estimates
from forgeattention.eviction.triattention import join_heads

SINKS, WINDOW = 4, 128


@dataclass(frozen=True)
class Exact:
    """How an exact cache is evicted from."""

    policy: Policy
    granularity: str = "pages"
    join: str = "max"
    demote: bool = False
    recall_share: float = 0.05
    recall_pages: int = 8
    interval: int = 128


class EvictedLayer(DynamicLayer):
    """One layer: the keys kept, their positions, what was given up."""

    def __init__(self, how: Exact, rope: Rope) -> None:
        super().__init__()
        self.how, self.rope = how, rope
        self.positions = np.zeros(0, np.int64)
        self.seen = self.last = self.entered = 0
        self.rounds = self.evicted = self.recalled = self.wanted = self.missed = self.needless = 0
        self.centres: Centres | None = None
        self.demoted: list[tuple[int, torch.Tensor, torch.Tensor, Any]] = []
        self.stamp: dict[int, int] = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.seen - self.last >= self.how.interval:
            self._round()
        n = key_states.shape[2]
        k, v = super().update(key_states, value_states)
        self.positions = np.concatenate([self.positions, np.arange(self.seen, self.seen + n)])
        self.seen += n
        k.evicted = self
        return k, v

    def get_seq_length(self) -> int:
        return self.seen

    def attend(self, q: torch.Tensor, scale: float) -> torch.Tensor:
        n = q.shape[2]
        host = q[0].float().cpu().numpy()
        if self.centres is None:
            self.centres = Centres(self.rope, q.shape[1])
        if n > 1:
            self.centres.add(host[:, -64:], np.arange(self.seen - min(n, 64), self.seen))
        if self.demoted:
            self._recall(host, scale)
        held = self.keys.shape[2]
        mask = torch.ones(n, held, dtype=torch.bool, device=q.device).tril(held - n)
        group = q.shape[1] // self.keys.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (self.keys, self.values))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    def _items(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Indices of candidate tokens [items, size], their first positions, tokens of an item."""
        at = np.flatnonzero((self.positions >= SINKS) & (self.positions < self.seen - WINDOW))
        if self.how.granularity == "tokens":
            return at[:, None], self.positions[at], 1
        if self.how.granularity == "entry":
            at = at[self.positions[at] >= self.entered]
            return at[:, None], self.positions[at], 1
        page = (self.positions[at] - SINKS) // PAGE
        ids, counts = np.unique(page, return_counts=True)
        ids = ids[counts == PAGE]
        index = np.array([at[page == i] for i in ids], np.int64).reshape(-1, PAGE)
        return index, ids * PAGE + SINKS, PAGE

    def _scores(self, index: np.ndarray) -> np.ndarray:
        if not self.how.policy.scored or self.centres is None or not index.size:
            return np.zeros(len(index))
        keys = self.keys[0].float().cpu().numpy()[:, index.reshape(-1)]
        folded = self.centres.folded(self.seen, keys.shape[2])
        norms, weights = np.abs(self.rope.pairs(keys)), self.centres.norm_weights()
        group = len(folded) // len(keys)
        pairs = enumerate(zip(folded, weights))
        scores = np.stack([keys[h // group] @ q + norms[h // group] @ w for h, (q, w) in pairs])
        if self.how.join == "mean-first":
            return join_heads(scores.reshape(len(scores), *index.shape).mean(2))
        joined = join_heads(scores).reshape(index.shape)
        if self.how.join == "mean":
            return joined.mean(1)
        if self.how.join == "top8":
            return np.sort(joined, 1)[:, -8:].mean(1)
        return joined.max(1)

    def _round(self) -> None:
        index, starts, size = self._items()
        share, held = self.how.policy.share(self.seen), len(self.positions)
        if self.how.granularity == "entry":
            count = round(len(starts) * (1 - share))
            self.entered = self.seen - WINDOW
        else:
            count = excess(held, self.seen, share, size)
        self.last = self.seen
        guest = np.array([self._guest(int(s)) for s in starts], bool)
        index, starts = index[~guest], starts[~guest]
        if guest.any():
            count = excess(held - size * int(guest.sum()), self.seen, share, size)
        if count <= 0 or not len(starts):
            return
        gone = self.how.policy.choose(Items(starts, self._scores(index), size, self.seen), count)
        self.rounds += 1
        self.evicted += len(gone) * size
        for i in gone if self.how.demote else ():
            at = torch.from_numpy(index[i]).to(self.keys.device)
            k, v = self.keys.index_select(2, at), self.values.index_select(2, at)
            self.demoted.append((int(starts[i]), k, v, k[0].float().mean(1).cpu().numpy()))
        keep = np.ones(held, bool)
        keep[index[gone].reshape(-1)] = False
        at = torch.from_numpy(np.flatnonzero(keep)).to(self.keys.device)
        self.keys, self.values = self.keys.index_select(2, at), self.values.index_select(2, at)
        self.positions = self.positions[keep]

    def _guest(self, start: int) -> bool:
        return start in self.stamp and self.seen - self.stamp[start] < 2 * self.how.interval

    def _recall(self, q: np.ndarray, scale: float) -> None:
        index, _, _ = self._items()
        keys = self.keys[0].float().cpu().numpy()
        resident = keys[:, index].mean(2).transpose(1, 0, 2)
        means = np.stack([d[3] for d in self.demoted])
        share = mass_estimates(q, np.concatenate([resident, means]), scale)[len(resident) :]
        room = max(0, self.how.recall_pages - sum(self._guest(s) for s in self.stamp))
        order = np.argsort(-share)[:room]
        chosen = [int(i) for i in order if share[i] >= self.how.recall_share]
        self._judge(q, index, scale, chosen)
        if not chosen:
            return
        self.recalled += len(chosen)
        k, v, positions = [self.keys], [self.values], [self.positions]
        for i in chosen:
            start, page_k, page_v, _ = self.demoted[i]
            self.stamp[start] = self.seen
            k.append(page_k), v.append(page_v), positions.append(np.arange(start, start + PAGE))
        self.demoted = [d for i, d in enumerate(self.demoted) if i not in chosen]
        every = np.concatenate(positions)
        order = np.argsort(every, kind="stable")
        at = torch.from_numpy(order).to(self.keys.device)
        self.keys, self.values = (torch.cat(x, 2).index_select(2, at) for x in (k, v))
        self.positions = every[order]

    def _judge(self, q: np.ndarray, index: np.ndarray, scale: float, chosen: list[int]) -> None:
        """Counts pages whose real share of the packed tokens' attention is large, and those of them left behind."""
        heads = self.keys.shape[1]
        here = self.keys[0].float()[:, torch.from_numpy(index.reshape(-1)).to(self.keys.device)]
        there = torch.cat([d[1][0].float() for d in self.demoted], 1)
        keys = torch.cat([here, there], 1)
        queries = torch.from_numpy(q).to(keys.device).reshape(heads, -1, q.shape[2]) * scale
        weights = (queries @ keys.transpose(1, 2)).softmax(-1)[:, :, here.shape[1] :]
        real = weights.unflatten(2, (-1, PAGE)).sum(3).amax((0, 1)).cpu().numpy() >= self.how.recall_share
        self.wanted += int(real.sum())
        self.missed += int(real.sum()) - int(real[chosen].sum())
        self.needless += int((~real[chosen]).sum())


class EvictedCache(DynamicCache):
    """An exact cache that gives up tokens. Runs with attn_implementation="evicted"."""

    def __init__(self, model: Any, how: Exact) -> None:
        super().__init__(config=model.config)
        rope = rope_of(model.config)
        self.layers = [EvictedLayer(how, rope) for _ in self.layers]

    def counts(self) -> dict[str, int]:
        names = ("rounds", "evicted", "recalled", "wanted", "missed", "needless")
        found = {name: sum(getattr(layer, name) for layer in self.layers) for name in names}
        found["held"] = sum(len(layer.positions) for layer in self.layers)
        found["seen"] = sum(layer.seen for layer in self.layers)
        return found

    def __deepcopy__(self, memo: Any) -> EvictedCache:
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        for layer in other.layers:
            layer.demoted, layer.stamp = list(layer.demoted), dict(layer.stamp)
            layer.centres = layer.centres and layer.centres.copy()
        return other


def _attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
    return key.evicted.attend(query, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register("evicted", _attention)
AttentionMaskInterface.register("evicted", lambda *args, **kwargs: None)
