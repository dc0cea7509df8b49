"""Layers that stay with vLLM's own attention: those with a sliding window."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import get_attn_backend

from .names import PRESET_OF

_backends: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def implementation(
    num_heads: int,
    head_size: int,
    scale: float,
    num_kv_heads: int | None = None,
    alibi_slopes: list[float] | None = None,
    sliding_window: int | None = None,
    kv_cache_dtype: str = "auto",
    logits_soft_cap: float | None = None,
    attn_type: str = AttentionType.DECODER,
    *args: Any,
    **options: Any,
) -> Any:
    """vLLM's implementation of a layer, as if no backend had been asked for."""
    config = get_current_vllm_config()
    kv_cache_dtype = "auto" if kv_cache_dtype in PRESET_OF else kv_cache_dtype
    asked, config.attention_config.backend = config.attention_config.backend, None
    try:
        backend = get_attn_backend(
            head_size,
            config.model_config.dtype,
            kv_cache_dtype,
            has_sink=options.get("sinks") is not None,
            attn_type=attn_type,
            has_sliding_window=sliding_window is not None,
        )
    finally:
        config.attention_config.backend = asked
    own = (num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap)
    made = backend.get_impl_cls()(*own, attn_type, *args, **options)
    _backends[made] = backend
    return made


def name_backends(layers: Mapping[str, Any], replaced: type) -> int:
    """Tells vLLM which backend its own layers have, where they were made under the name of another.

    Returns:
        Bytes of the smallest block that all of them can have; 0 without such layers.
    """
    least = 0
    for layer in layers.values():
        made = getattr(layer, "impl", None)  # layers of experts have none
        backend = None if made is None else _backends.get(made)
        if backend is None:
            continue
        if layer.attn_backend is replaced:
            layer.attn_backend = backend
            layer.backend = AttentionBackendEnum[backend.get_name()]
            if layer.kv_cache_dtype in PRESET_OF:
                layer.kv_cache_dtype, layer.kv_cache_torch_dtype = "auto", layer.dtype
        sizes = (getattr(size, "base", size) for size in backend.get_supported_kernel_block_sizes())
        token = 2 * layer.num_kv_heads * layer.head_size * layer.kv_cache_torch_dtype.itemsize
        least = max(least, min(sizes) * token)
    return least
