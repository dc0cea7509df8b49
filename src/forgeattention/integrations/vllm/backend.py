"""The attention backend: packed pages and exact tokens in vLLM's KV blocks."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionType, MultipleOf, max_decode_query_len
from vllm.v1.kv_cache_interface import KVCacheLayout

from ...codec import PAGE, Codec
from ...codec.spec import HEAD_DIMS, CodecSpec
from ...models.weights.vllm import layer_codec
from ...ops.page_tables import Blocks, Geometry, exact_block_tokens
from ...ops.registry import paged_steps
from . import check_version, own
from .blocks import ExactSpec
from .metadata import Builder, Metadata
from .names import PRESET_OF
from .settings import Settings

check_version()

log = logging.getLogger("forgeattention")

SUFFIX = ".exact"
CONNECTORS = ("SimpleCPUOffloadConnector",)
"""vLLM's KV connectors that find a prefix by `blocks.ExactManager`. Others look for a sliding window's last blocks, and
would miss the sinks."""


class PackedBackend(AttentionBackend):
    """vLLM's CUSTOM attention backend. A KV block holds one page per 64 tokens, heads side by side (docs/format.md)."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", *PRESET_OF]
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
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_combination(cls, head_size: int, dtype: torch.dtype, *args: Any, **kwargs: Any) -> str | None:
        if not current_platform.is_cpu() and (dtype == torch.float32 or head_size > 256):
            return "prompts on CUDA need 16-bit dtypes and head sizes up to 256"
        return None

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return KVCacheLayout.LBNHC, KVCacheLayout.LBHNC, KVCacheLayout.BLNHC, KVCacheLayout.BLHNC

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

    def __init__(self, impl: PackedImpl) -> None:
        self.impl = impl
        self.kv_cache = torch.empty(0)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return ExactBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> ExactSpec:
        return self.impl.exact_spec


class PackedImpl(AttentionImpl[Metadata]):
    """Attention of one layer over packed pages and exact tokens."""

    blocks: Blocks
    geometry: Geometry
    """Of the layer's memory, once vLLM has given it some."""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """A layer with a sliding window gets vLLM's own implementation: what it keeps is short already."""
        given = dict(zip(("num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window"), args))
        if (given | options).get("sliding_window") is None:
            return super().__new__(cls, *args, **options)
        return own.implementation(*args, **options)

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
            "soft-capped logits": logits_soft_cap,
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            f"kv_cache_dtype {kv_cache_dtype}": kv_cache_dtype
            not in ("auto", "float32", "float16", "bfloat16", *PRESET_OF),
        }
        if got := [name for name, value in refused.items() if value]:
            raise ValueError(f"[vllm] expected plain full attention; got {', '.join(got)}")
        self.vllm_config = get_current_vllm_config()
        transfer = self.vllm_config.kv_transfer_config
        if transfer is not None and transfer.kv_connector not in CONNECTORS:
            raise ValueError(
                f"[vllm] expected no KV connector but {' or '.join(CONNECTORS)}, which asks our block manager what a "
                f"prefix needs; got {transfer.kv_connector}"
            )
        if self.vllm_config.parallel_config.use_ubatching:
            raise ValueError("[vllm] expected whole batches; got microbatches, whose layers would share work memory")
        if self.vllm_config.cache_config.kv_sharing_fast_prefill:
            raise ValueError(
                "[vllm] expected --kv-sharing-fast-prefill to be off: layers must see the same tokens; got it on"
            )
        self.settings = Settings.read(self.vllm_config.additional_config, PRESET_OF.get(kv_cache_dtype))
        self.num_heads = num_heads
        self.head_size = head_size
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.dtype = self.vllm_config.model_config.dtype
        self.shared_with = kv_sharing_target_layer_name
        self.read_by_others = False
        self.sinks = sinks
        self.sink_logits: torch.Tensor | None = None
        PackedBackend.spec = self.settings.spec
        self._codec: Codec | None = None
        self._bound: tuple[int, ...] = ()

    @property
    def source(self) -> PackedImpl:
        """Of the layer whose keys and values this one reads: itself, but where layers share them."""
        if self.shared_with is None:
            return self
        return self.vllm_config.compilation_config.static_forward_context[self.shared_with].impl

    @property
    def codec(self) -> Codec:
        """The layer's codec, known once the weights are loaded."""
        codec = self.source._codec
        assert codec is not None
        return codec

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        layers = self.vllm_config.compilation_config.static_forward_context
        self.sink_logits = None if self.sinks is None else self.sinks.float()
        if self.shared_with is not None:
            self.source.read_by_others = True
            return
        name = next(name for name, layer in layers.items() if getattr(layer, "impl", None) is self)
        self._codec = layer_codec(
            self.vllm_config, name, self.settings.spec, self.head_size, self.num_kv_heads, fit=self.settings.fit
        )
        layers[name + SUFFIX] = ExactLayer(self)
        cache = self.vllm_config.cache_config
        block = cache.block_size if cache.user_specified_block_size else PAGE
        page = block // PAGE * self.codec.page_bytes
        least = own.name_backends(layers, PackedBackend)
        if 0 < least <= page:
            cache.skip_page_size_padded = page  # all blocks are of one size: theirs hold as many tokens as fit
        elif least > page:
            log.warning(
                "packed blocks are padded from %d to at least %d bytes: choose a larger --block-size", page, least
            )
        if not current_platform.is_cpu():
            from .device import reserve

            token = 2 * self.num_kv_heads * self.head_size * self.dtype.itemsize
            decode_tokens = max_decode_query_len(self.vllm_config)
            reserve(self, self.settings.window, decode_tokens, exact_block_tokens(page, token))

    @cached_property
    def exact_spec(self) -> ExactSpec:
        """The blocks of the exact tokens.

        Kept from the first question on: vLLM sets its config's block size to the smallest of all groups later.

        Raises:
            ValueError: the hybrid KV cache manager is off, or blocks do not hold whole pages.
        """
        config = self.vllm_config
        block = config.cache_config.block_size
        if config.scheduler_config.disable_hybrid_kv_cache_manager:
            raise ValueError("[vllm] expected the hybrid KV cache manager, which keeps exact tokens; got it disabled")
        if not block or block % PAGE:
            raise ValueError(f"[vllm] expected a block size that is a multiple of {PAGE}; got {block}")
        page = block // PAGE * self.codec.page_bytes
        token = 2 * self.num_kv_heads * self.head_size * self.dtype.itemsize
        tokens = exact_block_tokens(page, token)
        return ExactSpec(
            block_size=tokens,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.dtype,
            page_size_padded=page if tokens * token < page else None,
            sliding_window=self.settings.window + PAGE,
            sink_blocks=-(-self.settings.sinks // tokens),
            slack=max_decode_query_len(config) * (1 + config.max_concurrent_batches),
        )

    def _bind(self, kv_cache: torch.Tensor, exact: torch.Tensor) -> None:
        """Takes the views that the layers were given and checks that the blocks are laid out as asked."""
        packed, tokens = kv_cache.permute(0, 2, 1, 3), exact.permute(0, 2, 1, 3)
        record = self.codec.format.record_bytes
        want = [self.num_kv_heads, record]
        if kv_cache.dtype != torch.uint8 or list(packed.shape[2:]) != want or not packed[0].is_contiguous():
            raise ValueError(
                f"[vllm] expected blocks uint8 [pages, {want}], heads side by side (block size {PAGE}, or a layout "
                f"..NHC); got {list(packed.shape)} with strides {list(packed.stride())}"
            )
        if tokens.dtype != self.dtype or tokens.stride(3) != 1:
            raise ValueError(f"[vllm] expected blocks of {self.dtype}; got {tokens.dtype}")
        span = (packed.shape[0] - 1) * packed.stride(0) + packed[0].numel()
        self.blocks = Blocks(self.codec, packed.as_strided((span,), (1,)), tokens)
        self.geometry = Geometry(
            self.settings.window,
            self.codec.page_bytes,
            packed.shape[1],
            packed.stride(0),
            self.source.exact_spec.block_size,
            self.source.exact_spec.sink_blocks,
        )
        if kv_cache.device.type != "cpu":
            paged_steps("cuda").prepare(self.blocks, self.num_heads, {1, max_decode_query_len(self.vllm_config)})

    def _step(self, layer: Any, kv_cache: torch.Tensor) -> Any:
        context = get_forward_context()
        if context.attn_metadata is None:
            return None
        name = self.shared_with or layer.layer_name
        exact_cache = context.no_compile_layers[name + SUFFIX].kv_cache
        now = (kv_cache.data_ptr(), *kv_cache.shape, exact_cache.data_ptr(), *exact_cache.shape)
        if now != self._bound:
            self._bind(kv_cache, exact_cache)
            self._bound = now
        packed, exact = context.attn_metadata[name], context.attn_metadata[name + SUFFIX]
        if packed.step is None:
            if kv_cache.device.type == "cpu":
                from .host import HostStep

                packed.step = HostStep(self.geometry, packed, exact)
            else:
                from .device import DeviceStep

                packed.step = DeviceStep(self.geometry, packed, exact)
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
        if step is not None:
            step.append(self, key, value)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Metadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends query [tokens, heads, head_dim] into output of the same shape. Without key and value, those of the
        layer that this one shares them with."""
        if output_scale is not None or output_block_scale is not None:
            raise ValueError("[vllm] expected an output that is not quantised; got a scale for it")
        step = self._step(layer, kv_cache)
        if step is not None:
            step.attend(self, query, key, value, output)
        return output
