"""vLLM 0.32 and 0.33: attention backend CUSTOM with the packed page as KV block (docs/serving.md).

    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"forgeattention": {"preset": "balanced"}}'

Two entry points bring it in: `register` (group vllm.general_plugins, in every process of the engine) and `platform`
(vllm.platform_plugins), since vLLM's own CPU platform ignores CUSTOM.
"""

from __future__ import annotations

import logging
from importlib.metadata import entry_points

log = logging.getLogger("forgeattention")

TESTED = ("0.32.", "0.33.")
"""vLLM versions that the backend was tested with start so; the hooks it uses are internal and change."""
BACKEND = f"{__name__}.backend.PackedBackend"
PLATFORM = f"{__name__}.platform.ForgeCpuPlatform"
GUARD = f"{__name__}.guard.GuardedCpuBackend"


def check_version() -> None:
    """Raises ValueError unless vLLM's version is a tested one."""
    import vllm

    if not vllm.__version__.startswith(TESTED):
        raise ValueError(
            f"[vllm] expected vLLM {' or '.join(f'{v}x' for v in TESTED)}, which this backend was tested with; "
            f"got {vllm.__version__}"
        )


def register() -> None:
    """Makes the attention backend CUSTOM and its kinds of KV blocks known to this process; may be called again.

    A vLLM of another version is left alone: naming CUSTOM raises there.
    """
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    if not vllm.__version__.startswith(TESTED):
        log.warning("vLLM %s: the packed cache was not tested with it and is not offered", vllm.__version__)
        return
    from .blocks import register_blocks
    from .names import register_names

    register_blocks()
    register_names()
    if current_platform.is_cpu() and PLATFORM.rpartition(".")[2] != type(current_platform).__name__:
        register_backend(AttentionBackendEnum.CPU_ATTN, GUARD)


def platform() -> str | None:
    """Names vLLM's CPU platform with CUSTOM honoured, where vLLM would choose its own CPU platform; else None.

    Without `--attention-backend CUSTOM` that platform is vLLM's own. Another plugin's platform goes first.
    """
    from vllm.platforms import cpu_platform_plugin

    others = [e for e in entry_points(group="vllm.platform_plugins") if e.value != f"{__name__}:platform"]
    if others or cpu_platform_plugin() != "vllm.platforms.cpu.CpuPlatform":
        return None
    return PLATFORM
