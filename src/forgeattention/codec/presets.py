"""Specs by name. Measured figures: docs/results.md."""

from __future__ import annotations

from .spec import CodecSpec

DEFAULT = "balanced"
PRESETS: dict[str, CodecSpec] = {
    # Keys 3-bit trellis, values 3-bit scalar.
    "balanced": CodecSpec(),
    # Keys and values 2-bit trellis.
    "small": CodecSpec(k_bits=2, v_bits=2, v_code="trellis8"),
    # Keys 4-bit scalar, values 3-bit trellis.
    "fidelity": CodecSpec(k_bits=4, v_code="trellis8"),
}


def spec_of(spec: CodecSpec | str | None) -> CodecSpec:
    """A spec, given as itself, by the name of a preset, or as None for the default.

    Raises:
        ValueError: a name that no preset has.
    """
    if isinstance(spec, CodecSpec):
        return spec
    if spec is not None and spec not in PRESETS:
        raise ValueError(f"[codec_spec] expected a CodecSpec or one of {', '.join(PRESETS)}; got {spec!r}")
    return PRESETS[DEFAULT if spec is None else spec]
