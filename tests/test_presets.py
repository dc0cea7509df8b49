"""Presets: what they promise about size, and that CodecSpec() is the default one."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import PRESET_ERROR

from forgeattention import CodecSpec, reference
from forgeattention.codec import Codec
from forgeattention.codec.presets import DEFAULT, PRESETS

MOST_BITS = {"balanced": (3.20, 3.13), "small": (2.40, 2.40), "fidelity": (3.75, 3.65)}


def test_the_default_is_a_preset() -> None:
    assert set(PRESETS) == set(MOST_BITS)
    assert CodecSpec() == PRESETS[DEFAULT]


@pytest.mark.parametrize("name", MOST_BITS)
def test_size(name: str) -> None:
    for head_dim, most in zip((64, 128), MOST_BITS[name]):
        assert PRESETS[name].page_format(head_dim).effective_bits <= most


@pytest.mark.parametrize("name", MOST_BITS)
def test_specs_survive_json(name: str) -> None:
    assert CodecSpec.from_json(PRESETS[name].to_json()) == PRESETS[name]


@pytest.mark.parametrize(("bits", "code"), [(2, "trellis8"), (3, "trellis8"), (4, "scalar")])
def test_keys_have_a_trellis_where_there_is_one(bits: int, code: str) -> None:
    assert CodecSpec(k_bits=bits).k_code == code


@pytest.mark.parametrize("name", MOST_BITS)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_squared_error_of_normal_values(name: str, head_dim: int) -> None:
    codec = Codec(PRESETS[name], head_dim, 1)
    k, v = np.random.default_rng(0).standard_normal((2, 1, 64, head_dim))
    decoded = reference.decode_pages(reference.encode(k, v, codec), codec)
    for side, (x, got) in enumerate(zip((k, v), decoded)):
        assert ((got - x) ** 2).mean() / (x**2).mean() < PRESET_ERROR[name][side]
