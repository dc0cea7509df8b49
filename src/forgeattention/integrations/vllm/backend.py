"""The attention backend: packed pages and exact tokens in vLLM's KV blocks, read by `forgeattention.ops`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from ... import ops
from ...codec import PAGE, Codec
from ...codec.spec import HEAD_DIMS, CodecSpec
from ...models.weights.vllm import layer_codec
from ...ops.table import ExactTokens, PageTable
from ..hf.attention import attend
from . import check_version
from .blocks import ExactSpec
from .settings import Settings
from .step import Exact, Layout, Pages, Step

check_version()

log = logging.getLogger("forgeattention")

SUFFIX = ".exact"


@dataclass
class Metadata:
    """A step of one group of layers, and `step`, which the first layer to need it makes."""

    starts: np.ndarray
    lengths: np.ndarray
    table: np.ndarray
    slots: torch.Tensor
    step: Step | None = field(default=None, repr=False)


class Builder(AttentionMetadataBuilder[Metadata]):
    """Copies what a step's layers need to the host."""

    reorder_batch_threshold = 1

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Metadata:
        m = common_attn_metadata
        if m.causal is not True:
            raise ValueError("[vllm] expected causal attention; got another mask")
        starts = m.query_start_loc_cpu.numpy().astype(np.int64)
        lengths = m.seq_lens_cpu_upper_bound.numpy().astype(np.int64)
        return Metadata(starts, lengths, m.block_table_tensor.cpu().numpy().astype(np.int64), m.slot_mapping)


class PackedBackend(AttentionBackend):
    """vLLM's CUSTOM attention backend. A KV block holds one page per 64 tokens, heads side by side (docs/format.md)."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]
    forward_includes_kv_cache_update = False
    spec: ClassVar[CodecSpec]
    """Of the engine whose layers this process made last."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[PackedImpl]:
        return PackedImpl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(PAGE)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_DIMS)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBNHC,)

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        record = cls.spec.page_format(spec.head_size).record_bytes
        return replace(spec, dtype=torch.uint8, state_content_bytes=record, tokens_per_state=PAGE)


class ExactBackend(PackedBackend):
    """Of the exact layers, which only hold blocks."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(1)]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return spec


class ExactLayer(AttentionLayerBase):
    """The exact tokens of one packed layer: a layer of its own to vLLM's block manager.

    Args:
        impl: the packed layer's implementation.
    """

    spec: ExactSpec

    def __init__(self, impl: PackedImpl) -> None:
        self.impl = impl
        self.kv_cache = torch.empty(0)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return ExactBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> ExactSpec:
        impl, block = self.impl, vllm_config.cache_config.block_size
        if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            raise ValueError("[vllm] expected the hybrid KV cache manager, which keeps exact tokens; got it disabled")
        if not block or block % PAGE:
            raise ValueError(f"[vllm] expected a block size that is a multiple of {PAGE}; got {block}")
        page = block // PAGE * impl.codec.page_bytes
        token = 2 * impl.num_kv_heads * impl.head_size * impl.dtype.itemsize
        tokens = min(PAGE, 1 << (page // token).bit_length() - 1)
        # vLLM sets its config's block size to the smallest of all groups later.
        self.spec = ExactSpec(
            block_size=tokens,
            num_kv_heads=impl.num_kv_heads,
            head_size=impl.head_size,
            dtype=impl.dtype,
            page_size_padded=page if tokens * token < page else None,
            sliding_window=impl.settings.window + PAGE,
            sink_blocks=-(-impl.settings.sinks // tokens),
        )
        return self.spec


class PackedImpl(AttentionImpl[Metadata]):
    """Attention of one layer over packed pages and exact tokens."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        refused = {
            "ALiBi": alibi_slopes,
            "a sliding window": sliding_window,
            "soft-capped logits": logits_soft_cap,
            "KV shared between layers": kv_sharing_target_layer_name,
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            f"kv_cache_dtype {kv_cache_dtype}": kv_cache_dtype not in ("auto", "float32", "float16", "bfloat16"),
        }
        if got := [name for name, value in refused.items() if value]:
            raise ValueError(f"[vllm] expected plain full attention; got {', '.join(got)}")
        self.vllm_config = get_current_vllm_config()
        if self.vllm_config.speculative_config is not None or self.vllm_config.kv_transfer_config is not None:
            raise ValueError("[vllm] expected no speculative decoding and no KV connector; got one of them")
        self.settings = Settings.read(self.vllm_config.additional_config)
        self.num_heads = num_heads
        self.head_size = head_size
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.dtype = self.vllm_config.model_config.dtype
        self.sinks = sinks
        PackedBackend.spec = self.settings.spec
        self._codec: Codec | None = None
        self._layout: Layout | None = None

    @property
    def codec(self) -> Codec:
        """The layer's codec, known once the weights are loaded."""
        assert self._codec is not None
        return self._codec

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        layers = self.vllm_config.compilation_config.static_forward_context
        name = next(name for name, layer in layers.items() if getattr(layer, "impl", None) is self)
        settings = self.settings
        self._codec = layer_codec(
            self.vllm_config, name, settings.spec, self.head_size, self.num_kv_heads, fit=settings.fit
        )
        layers[name + SUFFIX] = ExactLayer(self)

    def _bind(self, kv_cache: torch.Tensor, exact: ExactLayer) -> None:
        """Takes the views that the layers were given and checks that the blocks are laid out as asked."""
        packed = kv_cache.permute(0, 2, 1, 3)
        tokens = exact.kv_cache.permute(0, 2, 1, 3)
        want = [self.num_kv_heads, self.codec.format.record_bytes]
        if kv_cache.dtype != torch.uint8 or list(packed.shape[2:]) != want or not packed.is_contiguous():
            raise ValueError(f"[vllm] expected contiguous blocks uint8 [pages, {want}]; got {list(packed.shape)}")
        row = tokens.shape[1:].numel()
        if tokens.dtype != self.dtype or not tokens[0].is_contiguous():
            raise ValueError(f"[vllm] expected contiguous blocks of {self.dtype}; got {tokens.dtype}")
        self._pages = packed.reshape(-1)
        self._tokens = tokens
        self._blocks = tokens.as_strided((tokens.shape[0], row), (tokens.stride(0), 1))
        self._layout = Layout(
            self.settings.window,
            self.codec.page_bytes,
            packed.shape[1],
            packed.stride(0),
            exact.spec.block_size,
            exact.spec.sink_blocks,
        )

    def _step(self, layer: Any, kv_cache: torch.Tensor) -> Step | None:
        context = get_forward_context()
        if context.attn_metadata is None:
            return None
        name = layer.layer_name
        if self._layout is None or self._pages.data_ptr() != kv_cache.data_ptr():
            self._bind(kv_cache, context.no_compile_layers[name + SUFFIX])
        assert self._layout is not None
        packed, exact = context.attn_metadata[name], context.attn_metadata[name + SUFFIX]
        if packed.step is None:
            packed.step = Step.make(self._layout, packed.starts, packed.lengths, packed.table, exact.table, exact.slots)
        return packed.step

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Stores new keys and values [tokens, kv_heads, head_dim] as exact and encodes the pages they complete."""
        step = self._step(layer, kv_cache)
        if step is None:
            return
        n = step.tokens
        self._tokens[step.blocks, step.slots] = torch.cat([key[:n], value[:n]], -1)
        if len(step.encode_offsets):
            k, v = self._gather(step.encode_ids)
            ops.encode(k, v, self.codec, self._pages, step.encode_offsets)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Metadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends query [tokens, heads, head_dim] into output of the same shape.

        Rows with one new token are one call of `ops.decode_attention`; others go one by one, as chunks that attend to
        the past and causally to themselves.
        """
        if output_scale is not None or output_block_scale is not None:
            raise ValueError("[vllm] expected an output that is not quantised; got a scale for it")
        step = self._step(layer, kv_cache)
        if step is None:
            return output
        if step.rows:
            assert step.exact is not None
            q = query[: step.rows].unsqueeze(2)
            table = None if step.pages is None else self._table(step.pages)
            own = self._exact(step.exact)
            out, _ = ops.decode_attention(q, self.codec, table, own, self.scale, sink_logits=self._sink_logits)
            output[: step.rows] = out[:, :, 0]
        for chunk in step.chunks:
            at = slice(chunk.start, chunk.stop)
            q, k, v = (x[at].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
            packed = None
            if chunk.pages is not None:
                packed = ops.prefill_attention(q, self.codec, self._table(chunk.pages), self.scale)
            exact = None if chunk.exact is None else self._exact(chunk.exact)
            out = attend(q, k, v, exact, packed, self.scale, self._sink_logits)
            output[at] = out[0].transpose(0, 1)
        return output

    @property
    def _sink_logits(self) -> torch.Tensor | None:
        return None if self.sinks is None else self.sinks.float()

    def _table(self, pages: Pages) -> PageTable:
        return PageTable(self._pages, pages.offsets, pages.lengths, pages.max_length)

    def _exact(self, exact: Exact) -> ExactTokens:
        k, v = (x.unflatten(1, (len(exact.ids), -1)).transpose(0, 1) for x in self._gather(exact.ids.flatten()))
        return ExactTokens(k, v, exact.lengths, exact.max_length)

    def _gather(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [kv_heads, tokens, head_dim] of exact blocks, views of a copy."""
        copied = self._blocks.index_select(0, ids).view(-1, self.num_kv_heads, 2, self.head_size)
        return copied[:, :, 0].transpose(0, 1), copied[:, :, 1].transpose(0, 1)
