"""A step on CUDA: everything is read from vLLM's block tables on the device, so that CUDA graphs hold whole steps."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

from ...codec.spec import PAGE
from ...ops.page_tables import Geometry, fills
from ...ops.registry import paged_steps
from .metadata import Metadata
from .past import Past

paged = paged_steps("cuda")

PAST_PAGES = 512
"""Packed pages of prompts' past that are decoded at a time: 32,768 tokens."""


class Workspace:
    """Memory that all layers of an engine work in, allocated while the model is loaded, so that vLLM counts it."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def reserve(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> None:
        """Makes a buffer hold `count` elements, zero at first."""
        have = self._buffers.get(name)
        size = count * dtype.itemsize
        if have is None or have.numel() < size:
            self._buffers[name] = torch.zeros(size, dtype=torch.uint8, device=device)

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The buffer's start as a tensor of a shape and dtype."""
        count = torch.Size(shape).numel()
        return self._buffers[name][: count * dtype.itemsize].view(dtype).view(shape)

    def zero(self, name: str) -> None:
        """Sets a buffer to zero."""
        self._buffers[name].zero_()


_workspaces: dict[int, Workspace] = {}


def workspace_of(vllm_config: Any) -> Workspace:
    """The workspace of an engine."""
    key = id(vllm_config)
    if key not in _workspaces:
        _workspaces[key] = Workspace()
        weakref.finalize(vllm_config, _workspaces.pop, key, None)
    return _workspaces[key]


def reserve(impl: Any, window: int, decode_tokens: int, exact_block: int) -> None:
    """Reserves what a layer's steps need, and begins to compile their kernels while vLLM measures its memory.

    Args:
        impl: the layer's.
        window: newest tokens kept exact.
        decode_tokens: most new tokens of a row that decodes.
        exact_block: tokens of an exact block, as far as is known; with another one, one kernel is compiled later.
    """
    most = Geometry(window, 0, 1, 0, PAGE, 1)  # no geometry with this window has more exact tokens
    config, device = impl.vllm_config, torch.device("cuda", torch.cuda.current_device())
    rows, tokens = config.scheduler_config.max_num_seqs, config.scheduler_config.max_num_batched_tokens
    space, d, heads = workspace_of(config), impl.head_size, impl.num_kv_heads
    paged.start_compiling(impl.codec, impl.num_heads, {1, decode_tokens}, impl.dtype, exact_block, device)
    for n in {1, decode_tokens}:
        sizes = paged.scratch_sizes(
            impl.codec, impl.num_heads, rows, n, config.model_config.max_model_len, most.most_exact(n), device
        )
        for name, count, dtype in zip(("parts", "counters", "lse"), sizes, (torch.float32, torch.int32, torch.float32)):
            space.reserve(name, count, dtype, device)
    space.reserve("staging", 2 * heads * PAGE * fills(rows, tokens) * d, impl.dtype, device)
    space.reserve("past", 2 * (PAST_PAGES + 1) * heads * PAGE * d, impl.dtype, device)


class DeviceStep:
    """One engine step of a group of layers.

    Args:
        geometry: of the group's blocks.
        packed, exact: what vLLM says of the step for the packed and for the exact blocks.
    """

    def __init__(self, geometry: Geometry, packed: Metadata, exact: Metadata) -> None:
        self.geometry, self.packed, self.exact = geometry, packed, exact
        builder = packed.builder
        if builder.tables is None or builder.tables.geometry != geometry:
            scheduler, model = builder.vllm_config.scheduler_config, builder.vllm_config.model_config
            builder.encoder = None
            builder.tables = paged.Tables(
                geometry,
                scheduler.max_num_seqs,
                scheduler.max_num_batched_tokens,
                model.max_model_len,
                builder.reorder_batch_threshold,
                packed.starts.device,
            )
        self.tables = builder.tables
        # Where all rows decode, a page's tokens are all in exact blocks, and the last layer encodes for all layers: a
        # few pages of one layer would leave most of the device idle, in every layer.
        self._together = packed.decode_rows == packed.rows
        self._layers: list[Any] = []
        self.tables.make(
            packed.starts, packed.lengths, packed.table, exact.table, packed.decode_rows, fill_exact=self._together
        )
        self._space = workspace_of(builder.vllm_config)
        self._space.zero("counters")  # as every launch leaves them; vLLM's sleep mode may not have kept them
        self._past: Past | None = None

    def append(self, layer: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        """Writes new tokens [tokens, kv_heads, head_dim] to the exact blocks, and encodes the pages that they fill."""
        self.packed.keep(layer, key, value)
        n, builder = self.packed.tokens, self.packed.builder
        count, staging = fills(self.packed.rows, n), None
        if not self._together:
            staging = self._space.get("staging", (2, key.shape[1], PAGE * count, key.shape[2]), key.dtype)
        paged.append(layer.blocks, self.tables, key[:n], value[:n], self.exact.slots[:n], count, staging)
        self._layers.append(layer.blocks)
        if self._together and len(self._layers) == builder.writers:
            known = builder.encoder
            if known is None or any(a is not b for a, b in zip(known.layers, self._layers, strict=True)):
                builder.encoder = known = paged.LayerEncoder(self._layers, self.tables)
            known.encode()

    def attend(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """Attends query [tokens, heads, head_dim] into `out` of the same shape."""
        m = self.packed
        split = m.decode_rows * m.decode_tokens
        if m.decode_rows:
            self._decode(layer, query[:split], out[:split])
        if split < m.tokens:
            at = slice(split, m.tokens)
            key, value = m.given(layer, key, value)
            assert key is not None
            assert value is not None
            self._prefill(layer, query[at], key[at], value[at], out[at])

    def _decode(self, layer: Any, query: torch.Tensor, out: torch.Tensor) -> None:
        m = self.packed
        shape = m.decode_rows, m.decode_tokens, *query.shape[1:]
        q, to = (x.view(shape).transpose(1, 2) for x in (query, out))
        sizes = paged.scratch_sizes(
            layer.codec,
            query.shape[1],
            m.decode_rows,
            m.decode_tokens,
            m.max_length,
            self.geometry.most_exact(m.decode_tokens),
            query.device,
        )
        kinds = ("parts", torch.float32), ("counters", torch.int32), ("lse", torch.float32)
        scratch = paged.Scratch(*(self._space.get(name, (n,), kind) for n, (name, kind) in zip(sizes, kinds)))
        length = m.max_length // PAGE * PAGE
        paged.decode_attention(q, layer.blocks, self.tables, layer.scale, layer.sink_logits, length, to, scratch)

    def _prefill(
        self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
    ) -> None:
        """All chunks of the step at once: over themselves, and over their past in pieces of `PAST_PAGES` pages."""
        from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

        if self._past is None:
            self._past = Past(self.packed, self.tables, PAST_PAGES)
        past = self._past
        options = {
            "cu_seqlens_q": past.starts,
            "max_seqlen_q": past.most_new,
            "softmax_scale": layer.scale,
            "return_softmax_lse": True,
            "fa_version": get_flash_attn_version(head_size=query.shape[-1]),
        }
        own, lse = flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_k=past.starts,
            max_seqlen_k=past.most_new,
            causal=True,
            out=None if past.pieces else out,
            **options,
        )
        for i, piece in enumerate(past.pieces):
            shape = 2, piece.pages + 1, key.shape[1], PAGE, key.shape[2]
            k, v = self._space.get("past", shape, key.dtype)
            piece.load(layer.blocks, k, v)
            one, one_lse = flash_attn_varlen_func(
                query,
                k.transpose(1, 2),
                v.transpose(1, 2),
                block_table=piece.table,
                seqused_k=piece.used,
                max_seqlen_k=piece.most_used,
                causal=False,
                **options,
            )
            last = i + 1 == len(past.pieces)
            to = out if last else torch.empty_like(own)
            to_lse = torch.empty_like(lse)
            merge_attn_states(to, one, one_lse, own, lse, to_lse)
            own, lse = to, to_lse
        if layer.sink_logits is not None:
            out *= torch.sigmoid(lse.t() - layer.sink_logits).unsqueeze(-1).to(out.dtype)
