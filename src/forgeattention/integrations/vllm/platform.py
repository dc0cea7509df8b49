"""vLLM's CPU platform, which ignores the attention backend CUSTOM, with that backend honoured."""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform

from . import check_version
from .names import PRESET_OF
from .settings import KEY, Settings


def asked(vllm_config: Any) -> bool:
    """Whether a VllmConfig names the attention backend CUSTOM.

    Raises:
        ValueError: it holds our settings and names another backend, which would ignore them.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if vllm_config.attention_config.backend is AttentionBackendEnum.CUSTOM:
        return True
    if isinstance(vllm_config.additional_config, dict) and KEY in vllm_config.additional_config:
        got = vllm_config.attention_config.backend
        raise ValueError(f"[vllm] expected --attention-backend CUSTOM with settings under {KEY!r}; got {got}")
    return False


class ForgeCpuPlatform(CpuPlatform):
    """vLLM's CPU platform; only `--attention-backend CUSTOM` changes anything."""

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        packed = asked(vllm_config)
        if packed:
            check_version()
            Settings.read(vllm_config.additional_config, PRESET_OF.get(vllm_config.cache_config.cache_dtype))
        super().check_and_update_config(vllm_config)
        if packed and not vllm_config.cache_config.user_specified_block_size:
            vllm_config.cache_config.block_size = 64

    @classmethod
    def get_attn_backend_cls(cls, selected_backend: Any, attn_selector_config: Any, num_heads: Any = None) -> str:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        if selected_backend is not AttentionBackendEnum.CUSTOM:
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        backend = AttentionBackendEnum.CUSTOM.get_class()
        reasons = backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise ValueError(f"[vllm] expected layers that the packed cache supports; got {', '.join(reasons)}")
        return AttentionBackendEnum.CUSTOM.get_path()
