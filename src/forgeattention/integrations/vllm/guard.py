"""Where another CPU platform than ours is chosen, it ignores the attention backend CUSTOM: this makes that an error."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from .platform import asked


class GuardedCpuBackend(CPUAttentionBackend):
    """vLLM's CPU backend, which refuses to stand in for CUSTOM."""

    @staticmethod
    def get_impl_cls() -> Any:
        from vllm.config import get_current_vllm_config

        if asked(get_current_vllm_config()):
            raise ValueError(
                "[vllm] expected forgeattention's CPU platform for --attention-backend CUSTOM; got another (unset "
                "VLLM_TARGET_DEVICE, name forgeattention in VLLM_PLUGINS, remove other platform plugins)"
            )
        return CPUAttentionBackend.get_impl_cls()
