"""What `--additional-config '{"forgeattention": {...}}'` may say."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

from ...codec.presets import DEFAULT, PRESETS
from ...codec.spec import CodecSpec

KEY = "forgeattention"
WINDOW = 64


@dataclass(frozen=True)
class Settings:
    """The cache's settings.

    Attributes:
        preset: one of `codec.presets.PRESETS`.
        k_bits, v_bits: stored bits per key and value element in place of the preset's.
        sinks: first tokens kept exact, rounded up to whole exact blocks (4 to 64 tokens); 0 for none.
        window: newest tokens kept exact besides the unfinished page, a multiple of 64.
        fit: fit the codecs of the keys to the model's weights (`models.weights`), where they lie on this machine.
    """

    preset: str = DEFAULT
    k_bits: int | None = None
    v_bits: int | None = None
    sinks: int = 4
    window: int = WINDOW
    fit: bool = True

    @classmethod
    def read(cls, additional_config: Any, preset: str | None = None) -> Settings:
        """Reads a VllmConfig's `additional_config`; defaults without our key.

        Args:
            additional_config: of the VllmConfig.
            preset: what `--kv-cache-dtype` names, or None.

        Raises:
            ValueError: an unknown setting, a value out of range, or two presets.
        """
        given = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
        known = {field.name: field for field in dataclasses.fields(cls)}
        if not isinstance(given, dict) or not set(given) <= set(known):
            raise ValueError(f"[vllm] expected settings among {sorted(known)} under {KEY!r}; got {given!r}")
        if preset is not None and given.get("preset", preset) != preset:
            raise ValueError(f"[vllm] expected preset {preset!r}, as the KV cache's dtype; got {given['preset']!r}")
        settings = cls(**given if preset is None else given | {"preset": preset})
        for name, number in (("sinks", settings.sinks), ("window", settings.window)):
            if type(number) is not int or number < 0:
                raise ValueError(f"[vllm] expected {name} >= 0; got {number!r}")
        if settings.preset not in PRESETS:
            raise ValueError(f"[vllm] expected preset in {sorted(PRESETS)}; got {settings.preset!r}")
        if settings.window % 64:
            raise ValueError(f"[vllm] expected window a multiple of 64; got {settings.window}")
        if settings.sinks > 64:
            raise ValueError(f"[vllm] expected sinks <= 64; got {settings.sinks}")
        if type(settings.fit) is not bool:
            raise ValueError(f"[vllm] expected fit true or false; got {settings.fit!r}")
        _ = settings.spec
        return settings

    @classmethod
    def of(cls, spec: CodecSpec) -> Settings:
        """The settings that name a spec, but for its window.

        Raises:
            ValueError: a spec that is no preset with other bits.
        """
        for name in PRESETS:
            settings = cls(name, spec.k_bits, spec.v_bits, sinks=spec.sinks)
            if settings.spec == replace(spec, window=settings.window):
                return settings
        raise ValueError(f"[vllm] expected a preset, perhaps with other bits; got {spec}")

    @property
    def spec(self) -> CodecSpec:
        """The codec's spec. Raises ValueError for bits that do not exist."""
        spec = PRESETS[self.preset].with_bits(self.k_bits, self.v_bits)
        return replace(spec, sinks=self.sinks, window=self.window)
