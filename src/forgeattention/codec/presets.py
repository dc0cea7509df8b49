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
