"""What a packed cache is made of: the codec's choices and the bytes they take."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, cast

PAGE = 64
"""Tokens per page."""
LANES = 32
"""Lanes over which a page's codes are dealt out: one warp, one simdgroup."""
HEAD_DIMS = (64, 80, 96, 128, 256, 512)
FORMAT_VERSION = 2


def stored_head_dim(k_dim: int, v_dim: int) -> int:
    """The head_dim of the records of heads with k_dim key and v_dim value channels: the smallest of `HEAD_DIMS` that
    holds both. The channels in between are zeros, are coded like others and count as stored bits.

    Raises:
        ValueError: more than 512 channels, or so few that more than half of each record would be zeros.
    """
    dim = next((d for d in HEAD_DIMS if d >= max(k_dim, v_dim)), None)
    if dim is None or dim > k_dim + v_dim:
        raise ValueError(
            f"[codec] expected heads of 32 to {HEAD_DIMS[-1]} channels; got {k_dim} for keys, {v_dim} for values"
        )
    return dim


Code = Literal["scalar", "trellis4", "trellis8"]
ScaleFormat = Literal["fp16", "log8"]
ScaleRule = Literal["unbiased", "least_squares", "norm"]
Rotation = Literal["hadamard", "planar", "none", "custom"]

CODES: tuple[Code, ...] = ("scalar", "trellis4", "trellis8")
SCALE_FORMATS: tuple[ScaleFormat, ...] = ("fp16", "log8")
SCALE_RULES: tuple[ScaleRule, ...] = ("unbiased", "least_squares", "norm")
ROTATIONS: tuple[Rotation, ...] = ("hadamard", "planar", "none", "custom")


@dataclass(frozen=True)
class PageFormat:
    """The bytes of one page record: 64 tokens of one KV head (docs/format.md).

    A record is K codes, K scales, the int8 mean row of K, V codes, V scales, without padding; every part
    starts at a multiple of 16 bytes.
    """

    head_dim: int
    k_bits: int = 3
    v_bits: int = 3
    k_code: Code = "scalar"
    v_code: Code = "scalar"
    scales: ScaleFormat = "fp16"

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"[page_format] expected head_dim in {HEAD_DIMS}; got {self.head_dim}")
        for name, bits, code in (("k", self.k_bits, self.k_code), ("v", self.v_bits, self.v_code)):
            check_code(name, bits, code)
        if self.scales not in SCALE_FORMATS:
            raise ValueError(f"[page_format] expected scales in {SCALE_FORMATS}; got {self.scales!r}")

    @property
    def padded_dim(self) -> int:
        """head_dim rounded up to whole groups of 32 codes."""
        return (self.head_dim + 31) // 32 * 32

    @property
    def scale_bytes(self) -> int:
        """Bytes of the 64 scales of one side."""
        return PAGE * (2 if self.scales == "fp16" else 1)

    @property
    def k_code_bytes(self) -> int:
        return PAGE * self.padded_dim * self.k_bits // 8

    @property
    def v_code_bytes(self) -> int:
        return PAGE * self.padded_dim * self.v_bits // 8

    @property
    def k_scale_offset(self) -> int:
        return self.k_code_bytes

    @property
    def mean_offset(self) -> int:
        return self.k_code_bytes + self.scale_bytes

    @property
    def v_offset(self) -> int:
        """Start of the V part; the K part is everything before it."""
        return self.mean_offset + self.padded_dim

    @property
    def v_scale_offset(self) -> int:
        return self.v_offset + self.v_code_bytes

    @property
    def record_bytes(self) -> int:
        return self.v_scale_offset + self.scale_bytes

    @property
    def effective_bits(self) -> float:
        """Stored bits per cached element, from the real record size; padding, scales and the mean included."""
        return self.record_bytes * 8 / (2 * PAGE * self.head_dim)


def check_code(side: str, bits: int, code: str) -> None:
    """Raise ValueError unless `bits` and `code` go together for the side named `side` ("k" or "v")."""
    if not isinstance(bits, int) or bits not in (2, 3, 4):
        raise ValueError(f"[codec_spec] expected {side}_bits in (2, 3, 4); got {bits}")
    if code not in CODES:
        raise ValueError(f"[codec_spec] expected {side}_code in {CODES}; got {code!r}")
    if code != "scalar" and bits == 4:
        raise ValueError(f"[codec_spec] expected {side}_code='scalar' at 4 bits; got {code!r}")


@dataclass(frozen=True)
class CodecSpec:
    """How a cache is coded. Frozen, hashable, serialisable; the same for all layers of a cache.

    Attributes:
        k_bits, v_bits: stored bits per key and value element, 2, 3 or 4.
        k_code, v_code: "scalar" (Lloyd-Max levels) or "trellis4", "trellis8" (trellis-coded, 4 or 8 states). Keys
            have a trellis of 8 states by default; at 4 bits there is none, and they are scalar.
        rotation: "hadamard" (random signs), "planar" (Givens pairs), "none" or "custom" (matrices given to `Codec`).
        planar_angle: angle of the planar pairs in degrees; None draws one angle per pair from `seed`.
        seed: seed of the random signs or angles.
        key_mean: keep the mean of each page's keys with the page and code the rest.
        k_scale_rule, v_scale_rule: how a vector's scale follows from its codes (`reference.quantize`).
        refine: the encoder codes every vector several times at nearby scales and keeps the best (`reference.quantize`).
        scales: "fp16", or "log8" (one byte: 32 steps per octave above a base kept once per page).
        sinks: first tokens kept exact.
        window: newest tokens kept exact; between `window` and `window` + 63 of them at any time.
    """

    k_bits: int = 3
    v_bits: int = 3
    k_code: Code | Literal["auto"] = "auto"
    v_code: Code = "scalar"
    rotation: Rotation = "hadamard"
    planar_angle: float | None = 45.0
    seed: int = 1
    key_mean: bool = True
    k_scale_rule: ScaleRule = "unbiased"
    v_scale_rule: ScaleRule = "unbiased"
    refine: bool = True
    scales: ScaleFormat = "log8"
    sinks: int = 4
    window: int = 128
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.k_code == "auto":
            object.__setattr__(self, "k_code", "scalar" if self.k_bits == 4 else "trellis8")
        check_code("k", self.k_bits, self.k_code)
        check_code("v", self.v_bits, self.v_code)
        for name, value, known in (
            ("rotation", self.rotation, ROTATIONS),
            ("k_scale_rule", self.k_scale_rule, SCALE_RULES),
            ("v_scale_rule", self.v_scale_rule, SCALE_RULES),
            ("scales", self.scales, SCALE_FORMATS),
        ):
            if value not in known:
                raise ValueError(f"[codec_spec] expected {name} in {known}; got {value!r}")
        for name, number in (("sinks", self.sinks), ("window", self.window), ("seed", self.seed)):
            if not isinstance(number, int) or number < 0:
                raise ValueError(f"[codec_spec] expected {name} >= 0; got {number!r}")
        angle = self.planar_angle
        if angle is not None and not (isinstance(angle, int | float) and math.isfinite(angle)):
            raise ValueError(f"[codec_spec] expected planar_angle as degrees or None; got {angle!r}")
        if self.version != FORMAT_VERSION:
            raise ValueError(f"[codec_spec] expected format version {FORMAT_VERSION}; got {self.version!r}")

    def page_format(self, head_dim: int) -> PageFormat:
        """The record of one page for this head_dim. Raises ValueError for an unsupported one."""
        return PageFormat(head_dim, self.k_bits, self.v_bits, cast(Code, self.k_code), self.v_code, self.scales)

    def with_bits(self, k_bits: int | None = None, v_bits: int | None = None) -> CodecSpec:
        """This spec at other bits. A side whose bits stay the same, or are None, keeps its code.

        At new bits, keys get the default code of those bits. Values get a trellis at 2 bits, where scalar levels lose
        most, are scalar at 4 bits, which have no trellis, and keep their code at 3 bits.

        Args:
            k_bits, v_bits: stored bits per key and value element; None for those of this spec.

        Raises:
            ValueError: bits that do not exist.
        """
        changes: dict[str, Any] = {}
        if k_bits is not None and k_bits != self.k_bits:
            changes |= {"k_bits": k_bits, "k_code": "auto"}
        if v_bits is not None and v_bits != self.v_bits:
            changes |= {"v_bits": v_bits, "v_code": {2: "trellis8", 4: "scalar"}.get(v_bits, self.v_code)}
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """A canonical JSON text; equal specs give equal texts."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> CodecSpec:
        """The inverse of `to_json`. Raises ValueError on unknown fields or values."""
        known = {f.name for f in dataclasses.fields(cls)}
        try:
            fields: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"[codec_spec] expected a spec as JSON; got {type(error).__name__}") from None
        if not isinstance(fields, dict) or set(fields) != known:
            got = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
            raise ValueError(f"[codec_spec] expected the fields {sorted(known)}; got {got}")
        return cls(**fields)
