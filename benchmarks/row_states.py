"""Exact and simulated caches of many rows of different lengths behind one shared beginning, for batched decoding.

Rows are kept without padding: row r's token i lies at place i of its own states, so that a simulated cache codes each
row's blocks by that row's own length, as its system would for that sequence alone. The beginning that rows share is
held once and attended to by all rows together. A decode step has fixed shapes and waits for nothing: it can be a CUDA
graph.
"""

from __future__ import annotations

from typing import Any

import torch
from peer_caches import Peer, coded_layers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache

NAME = "forge_benchmark_rows"
PREFIX_PARTS = 8
"""Pieces that the shared beginning is attended to in, side by side, where it is long."""


class RowStates(DynamicCache):
    """Keys and values of the rows of a batch, in a model whose layers all have full attention.

    Args:
        model: a transformers model; it runs with the attention implementation `NAME`.
        rows: of the batch.
        room: most tokens of a row, those of the shared beginning not counted.
        peer: how old tokens are coded; None for an exact cache.
        sinks, window: tokens that `peer` leaves exact.
        shared: a cache of one row, with the beginning of all rows coded as `peer` does; None for none.
    """

    def __init__(
        self, model: Any, rows: int, room: int, peer: Peer | None, sinks: int, window: int, shared: Any = None
    ) -> None:
        super().__init__(config=model.config)
        config = model.config.get_text_config(decoder=True)
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.peer, self.window, self.rows = peer, window, rows
        self.coded_in = [] if peer is None else coded_layers(model.config, peer)
        self.prefix: tuple[torch.Tensor, torch.Tensor] | None = None
        where: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        tail, self.before, first_coded = 0, 0, sinks
        if shared is not None:
            self.before, tail = self._take(shared, sinks)
            first_coded = 0 if self.before else sinks
        shape = layers, rows, heads, tail + room, dim
        self.keys, self.values = (torch.zeros(shape, **where) for _ in range(2))
        if tail:
            for number, layer in enumerate(shared.layers):
                for own, held in ((self.keys, layer.keys), (self.values, layer.values)):
                    own[number, :, :, :tail] = held[:, :, self.before :]
        self.tail = self.held = tail
        self.starts = [first_coded] * rows
        self.lengths = torch.full((rows,), tail, dtype=torch.int64, device=model.device)
        self.known = [tail] * rows
        self.decoding = False

    def _take(self, shared: Any, sinks: int) -> tuple[int, int]:
        """Code what of the shared beginning is due, and keep what is coded in every layer: tokens kept, tokens left."""
        total = shared.layers[0].keys.shape[2]
        block = 64 if self.peer is None else self.peer.block
        before = max(sinks + (total - self.window - sinks) // block * block, 0)
        for layer in shared.layers:
            if hasattr(layer, "catch_up"):
                layer.catch_up()
        if before:
            both = (torch.stack([getattr(x, n)[0, :, :before] for x in shared.layers]) for n in ("keys", "values"))
            self.prefix = tuple(both)  # type: ignore[assignment]
        return before, total - before

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *a: Any, **k: Any) -> Any:
        """Stores new tokens; gives a handle that the attention function asks for the rest."""
        n = key_states.shape[2]
        if self.decoding:
            where = torch.arange(self.rows, device=self.lengths.device)
            for own, new in ((self.keys, key_states), (self.values, value_states)):
                own[layer_idx].transpose(1, 2)[where, self.lengths] = new[:, :, 0]
        else:
            for own, new in ((self.keys, key_states), (self.values, value_states)):
                own[layer_idx, :, :, self.held : self.held + n] = new
        return (handle := (self, layer_idx, n)), handle

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.before + self.held

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return self.before + self.held + 1, 0

    def read(self, count: int, lengths: list[int]) -> None:
        """So many tokens of prompts of these lengths, padded on the right, have been read more."""
        self.held += count
        self.known = [min(self.tail + n, self.held) for n in lengths]
        self.code()

    def end_of_prompts(self) -> None:
        """From now on every row takes one token at a time, behind its own last."""
        self.lengths.copy_(torch.tensor(self.known))
        self.decoding = True

    def advance(self) -> None:
        """After a decode step: one more token in every row."""
        self.lengths += 1
        self.known = [n + 1 for n in self.known]

    def code(self) -> None:
        """Code the blocks that have left the rows' windows."""
        if self.peer is None:
            return
        block = self.peer.block
        while due := [r for r, n in enumerate(self.known) if n - self.window - self.starts[r] >= block]:
            rows = torch.tensor(due, device=self.lengths.device)
            at = torch.tensor([self.starts[r] for r in due], device=self.lengths.device)
            at = at[:, None] + torch.arange(block, device=at.device)
            for own, coder in ((self.keys, self.peer.keys), (self.values, self.peer.values)):
                for numbers in self._together():
                    there = own[numbers[0] : numbers[-1] + 1].transpose(2, 3)
                    old = there[:, rows[:, None], at].transpose(2, 3)
                    new = coder(old if len(numbers) > 1 else old[0], numbers[0]).to(own.dtype)
                    there[:, rows[:, None], at] = new.reshape(old.shape).transpose(2, 3)
            for r in due:
                self.starts[r] += block

    def _together(self) -> list[list[int]]:
        """Layers that are coded in one go: all, unless coders differ from layer to layer."""
        assert self.peer is not None
        return [[i] for i in self.coded_in] if self.peer.by_layer else [self.coded_in]

    def attend(self, q: torch.Tensor, layer: int, n: int, scale: float) -> torch.Tensor:
        """[rows, q_heads, n, head_dim] of queries [rows, q_heads, n, head_dim] at the newest tokens."""
        rows, q_heads, _, dim = q.shape
        k, v = self.keys[layer], self.values[layer]
        heads = k.shape[1]
        grouped = q.reshape(rows, heads, q_heads // heads * n, dim)
        parts = []
        if self.prefix is not None:
            parts.append(self._over_prefix(grouped, layer, scale))
        if self.decoding:
            places = torch.arange(k.shape[2], device=k.device)
            bias = torch.where(places <= self.lengths[:, None], 0.0, -torch.inf).to(q.dtype)
            parts.append(_attention(grouped, k, v, scale, bias=bias[:, None, None].expand(*grouped.shape[:3], -1)))
        else:
            if self.held:
                parts.append(_attention(grouped, k[:, :, : self.held], v[:, :, : self.held], scale))
            new = slice(self.held, self.held + n)
            o, lse = _attention(q, k[:, :, new], v[:, :, new], scale, causal=n > 1)
            parts.append((o.reshape(grouped.shape), lse.reshape(grouped.shape[:3])))
        return _merged(parts).reshape(q.shape).to(q.dtype)

    def _over_prefix(self, q: torch.Tensor, layer: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.prefix is not None
        k, v = (x[layer] for x in self.prefix)
        heads, tokens, dim = k.shape
        every = q.transpose(0, 1).reshape(1, heads, -1, dim)
        if self.decoding:
            o, lse = _plain_attention(every[0].float(), k.float(), v.float(), scale)
            return o.reshape(heads, q.shape[0], -1, dim).transpose(0, 1), lse.reshape(heads, q.shape[0], -1).transpose(
                0, 1
            )
        parts = PREFIX_PARTS if tokens >= 64 * PREFIX_PARTS else 1
        cut = tokens // parts
        whole = [x[:, : cut * parts].reshape(heads, parts, cut, dim).transpose(0, 1).contiguous() for x in (k, v)]
        o, lse = _attention(every.expand(parts, -1, -1, -1).contiguous(), *whole, scale)
        pieces = [(o[i : i + 1], lse[i : i + 1]) for i in range(parts)]
        if cut * parts < tokens:
            pieces.append(_attention(every, k[None, :, cut * parts :], v[None, :, cut * parts :], scale))
        joined, total = _merged(pieces), torch.logsumexp(torch.stack([x for _, x in pieces]), 0)
        shape = heads, q.shape[0], -1
        return joined.reshape(*shape, dim).transpose(0, 1), total.reshape(shape).transpose(0, 1)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False, bias: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp by torch's kernels; q with as many heads as k or a multiple."""
    aten = torch.ops.aten
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if q.device.type == "cpu":
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
        return o, lse
    if bias is not None:
        # The kernel wants rows of the bias at multiples of 16 bytes.
        padded = bias.new_empty(*bias.shape[:3], -(-bias.shape[-1] // 8) * 8)[..., : bias.shape[-1]]
        bias = padded.copy_(bias)
    o, lse = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scale)[:2]
    return o, lse[..., : q.shape[2]]


def _plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of [heads, queries, head_dim] by matrix products: faster in float32 where scores fit into memory."""
    scores = q @ k.transpose(1, 2) * scale
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp_() @ v, lse


def _merged(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """One attention of several over disjoint tokens, by their log-sum-exps, in float32."""
    if len(parts) == 1:
        return parts[0][0].float()
    lse = torch.stack([x for _, x in parts])
    weights = (lse - torch.logsumexp(lse, 0)).exp()
    return sum(o.float() * w[..., None] for (o, _), w in zip(parts, weights, strict=True))  # type: ignore[return-value]


def _attend(module: Any, q: torch.Tensor, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> tuple[Any, None]:
    states, layer, n = k
    return states.attend(q, layer, n, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
