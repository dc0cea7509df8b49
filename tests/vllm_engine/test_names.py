"""Presets as KV cache dtypes, with stand-ins of vLLM 0.33's registry: 0.32, which has a CPU wheel, lacks it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forgeattention.integrations.vllm import names
from forgeattention.integrations.vllm.backend import PackedBackend
from forgeattention.integrations.vllm.settings import Settings


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Handlers by name, as `vllm.config.cache` of 0.33 keeps them: a name may be registered once."""
    from vllm.config import cache
    from vllm.v1 import kv_cache_interface

    known: dict[str, Any] = {}

    def register(name: str) -> Any:
        def keep(handler: type) -> type:
            assert name not in known
            known[name] = handler()
            return handler

        return keep

    monkeypatch.setattr(cache, "register_kv_cache_dtype", register, raising=False)
    monkeypatch.setattr(cache, "is_known_kv_cache_dtype", lambda name: name in known, raising=False)
    monkeypatch.setattr(kv_cache_interface, "KVQuantMode", SimpleNamespace(CUSTOM="custom"))
    return known


def test_three_names_are_registered_once(registry: dict[str, Any]) -> None:
    names.register_names()
    names.register_names()
    assert sorted(registry) == ["forge2", "forge3", "forge4"]
    for name, handler in registry.items():
        assert handler.name == name
        assert handler.torch_dtype() is torch.uint8
        assert handler.quant_mode() == "custom"
        assert name in PackedBackend.supported_kv_cache_dtypes


def test_a_name_is_a_preset() -> None:
    presets = {name: Settings.read({}, preset).preset for name, preset in names.PRESET_OF.items()}
    assert presets == {"forge2": "small", "forge3": "balanced", "forge4": "fidelity"}
    also = {"forgeattention": {"window": 128}}
    assert Settings.read(also, names.PRESET_OF["forge2"]) == Settings(preset="small", window=128)
    with pytest.raises(ValueError, match="expected preset 'small', as the KV cache's dtype; got 'balanced'"):
        Settings.read({"forgeattention": {"preset": "balanced"}}, names.PRESET_OF["forge2"])


def test_without_that_registry_nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import cache

    monkeypatch.delattr(cache, "register_kv_cache_dtype", raising=False)
    names.register_names()
