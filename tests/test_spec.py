"""Specs: frozen, hashable, serialisable, checked; bits from the real record."""

import dataclasses

import pytest

from forgeattention import CodecSpec
from forgeattention.codec import Codec, PageFormat
from forgeattention.codec.packing import split_record
from forgeattention.codec.spec import HEAD_DIMS


def test_round_trip_and_hash():
    spec = CodecSpec(k_bits=2, v_bits=4, scales="fp16", seed=9)
    assert CodecSpec.from_json(spec.to_json()) == spec
    assert len({spec, CodecSpec.from_json(spec.to_json()), CodecSpec()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.k_bits = 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"k_bits": 5},
        {"v_bits": 1},
        {"k_code": "lattice"},
        {"v_bits": 4, "v_code": "trellis4"},
        {"rotation": "fourier"},
        {"scales": "fp8"},
        {"k_scale_rule": "max"},
        {"sinks": -1},
        {"window": 1.5},
        {"version": 1},
    ],
)
def test_wrong_fields_are_refused(wrong):
    with pytest.raises(ValueError, match=r"\[codec_spec\] expected .*; got"):
        CodecSpec(**wrong)


def test_unknown_json_is_refused():
    with pytest.raises(ValueError, match=r"\[codec_spec\] expected the fields"):
        CodecSpec.from_json('{"k_bits": 3}')


@pytest.mark.parametrize("head_dim", [32, 72, 192, 0])
def test_unsupported_head_dims_are_refused(head_dim):
    with pytest.raises(ValueError, match=r"\[page_format\] expected head_dim in .*; got"):
        CodecSpec().page_format(head_dim)


def test_effective_bits_count_everything():
    assert PageFormat(64, scales="log8").record_bytes == 3264
    assert PageFormat(64, scales="log8").effective_bits == 3.1875
    assert PageFormat(128, scales="log8").effective_bits == 3.125
    # 80 channels are stored as 96.
    assert PageFormat(80, scales="fp16").effective_bits == (96 * 64 * 3 / 8 * 2 + 4 * 64 + 96) * 8 / (2 * 64 * 80)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("scales", ["fp16", "log8"])
def test_parts_fill_the_record_and_start_at_16_bytes(head_dim, scales):
    import numpy as np

    for k_bits in (2, 3, 4):
        for v_bits in (2, 3, 4):
            fmt = PageFormat(head_dim, k_bits, v_bits, scales=scales)
            parts = split_record(np.zeros(fmt.record_bytes, np.uint8), fmt)
            assert sum(p.nbytes for p in parts.values()) == fmt.record_bytes
            starts = (fmt.k_scale_offset, fmt.mean_offset, fmt.v_offset, fmt.v_scale_offset, fmt.record_bytes)
            assert all(start % 16 == 0 for start in starts)


def test_fingerprints_tell_codecs_apart():
    one = Codec(CodecSpec(), 64, 2)
    assert one.fingerprint == Codec(CodecSpec(), 64, 2).fingerprint
    others = [Codec(CodecSpec(), 128, 2), Codec(CodecSpec(), 64, 3), Codec(CodecSpec(seed=2), 64, 2)]
    assert len({c.fingerprint for c in [one, *others]}) == 4


def test_other_bits_have_one_rule():
    """The command line, vLLM's settings and calibrations all ask `with_bits`."""
    from argparse import Namespace

    from forgeattention.codec.presets import PRESETS
    from forgeattention.integrations.vllm.settings import Settings
    from forgeattention.tools.evaluation.setup import spec_from

    balanced, fidelity = PRESETS["balanced"], PRESETS["fidelity"]
    assert balanced.with_bits() == balanced.with_bits(3, 3) == balanced
    assert balanced.with_bits(2, 2) == PRESETS["small"]
    assert balanced.with_bits(4, 3) == CodecSpec(k_bits=4)
    assert fidelity.with_bits(3).k_code == "trellis8"
    assert fidelity.with_bits(v_bits=4) == CodecSpec(k_bits=4, v_bits=4)
    assert CodecSpec(k_code="scalar").with_bits(3, 2).k_code == "scalar"
    with pytest.raises(ValueError, match=r"\[codec_spec\] expected k_bits in \(2, 3, 4\); got 5"):
        balanced.with_bits(5)
    for k_bits, v_bits in ((2, 2), (3, 2), (4, 3), (None, 4), (2, None)):
        spec = spec_from(Namespace(preset="balanced", k_bits=k_bits, v_bits=v_bits))
        settings = Settings("balanced", k_bits, v_bits)
        assert spec == balanced.with_bits(k_bits, v_bits)
        assert settings.spec == dataclasses.replace(spec, sinks=settings.sinks, window=settings.window)
