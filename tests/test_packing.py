"""The byte layout: codes survive packing, and packing.py and format.h say the same."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import forgeattention
from forgeattention.codec import PageFormat, packing
from forgeattention.codec.codebook import trellis_levels
from forgeattention.codec.spec import LANES

DIMS = (64, 96, 128, 256, 512)
CODES = {"scalar": 0, "trellis4": 1, "trellis8": 2}


@given(
    dim=st.sampled_from(DIMS),
    bits=st.sampled_from([2, 3, 4]),
    side=st.sampled_from("kv"),
    trellis=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_survive_packing(dim, bits, side, trellis, seed):
    trellis &= bits < 4
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (64, dim), dtype=np.uint8)
    data = packing.pack_codes(codes, bits, side, trellis)
    assert data.shape == (64 * dim * bits // 8,)
    np.testing.assert_array_equal(packing.unpack_codes(data, dim, bits, side, trellis), codes)


@given(
    dim=st.sampled_from(DIMS),
    step=st.floats(0, 60000, width=16),
    bases=st.tuples(st.integers(-128, 127), st.integers(-128, 127)),
    seed=st.integers(0, 2**32 - 1),
)
def test_header_rides_in_the_low_bits(dim, step, bases, seed):
    mean = np.random.default_rng(seed).uniform(-126.5, 126.5, dim)
    row = packing.pack_header(mean, step, *bases)
    assert packing.unpack_header(row) == (step, *bases)
    assert np.abs(row - mean)[:32].max() <= 1.5
    assert np.abs(row - mean)[32:].max() <= 0.5


@given(
    top=st.floats(1e-30, 1e30),
    seed=st.integers(0, 2**32 - 1),
)
def test_logarithmic_scales_are_within_half_a_step(top, seed):
    scales = top * 2.0 ** -np.random.default_rng(seed).uniform(0, 6.9, 64)
    scales[0], scales[1] = top, 0
    base = packing.log8_base(scales)
    codes = packing.log8_encode(scales, base)
    decoded = packing.log8_decode(codes, base)
    assert (codes[1], decoded[1]) == (0, 0)
    octaves = np.abs(np.log2(decoded[scales > 0] / scales[scales > 0]))
    assert octaves.max() <= 0.5 / packing.LOG8_STEPS + 1e-9


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """Lines that format.h prints of itself, by kind, and the words given to it."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("format") / "table"
    include = Path(forgeattention.__file__).parent / "kernels"
    source = Path(__file__).parent / "format_table.cpp"
    subprocess.run([compiler, "-std=c++17", "-O1", "-I", include, source, "-o", program], check=True)
    words = np.random.default_rng(0).integers(0, 2**32, (200, 4), dtype=np.uint32)
    text = "\n".join(" ".join(map(str, row)) for row in words.tolist())
    out = subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout
    lines: dict[str, list[list[int]]] = {}
    for line in out.splitlines():
        kind, *numbers = line.split()
        lines.setdefault(kind, []).append([int(n) for n in numbers])
    return lines, words


def test_record_offsets_agree(header):
    lines, _ = header
    assert len(lines["record"]) == len(DIMS) * 2 * 9
    for dim, k_bits, v_bits, scales, *offsets in lines["record"]:
        fmt = PageFormat(dim, k_bits, v_bits, scales=("fp16", "log8")[scales])
        want = [fmt.k_scale_offset, fmt.mean_offset, fmt.v_offset, fmt.v_scale_offset, fmt.record_bytes]
        assert offsets == want


def test_places_of_codes_agree(header):
    lines, _ = header
    table = np.array(lines["code"])
    for dim in DIMS:
        _, lane, unit, code, k_token, k_channel, v_token, v_channel = table[table[:, 0] == dim].T
        assert len(lane) == 64 * dim
        token, channel = packing.k_layout(dim)
        np.testing.assert_array_equal(token[lane, unit, code], k_token)
        np.testing.assert_array_equal(channel[lane, unit, code], k_channel)
        token, channel = packing.v_layout(dim)
        np.testing.assert_array_equal(token[lane, unit, code], v_token)
        np.testing.assert_array_equal(channel[lane, unit, code], v_channel)


def test_places_of_words_agree(header):
    lines, _ = header
    for dim in DIMS:
        rows = [row for row in lines["words"] if row[0] == dim]
        for bits in (2, 3, 4):
            words = np.arange(LANES * dim // 16 * bits, dtype=np.uint32).reshape(LANES, dim // 16, bits)
            stored = packing.words_to_bytes(words).view("<u4")
            for _, lane, unit, *index in rows:
                assert stored[index[bits - 2]] == words[lane, unit, bits - 1]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nibbles_agree(header, bits, code):
    if bits == 4 and code != "scalar":
        with pytest.raises(ValueError, match="expected k_code='scalar' at 4 bits"):
            PageFormat(64, k_bits=4, k_code=code)
        return
    lines, words = header
    got = np.array([row[2:] for row in lines["nibbles"] if row[:2] == [bits, CODES[code]]], np.uint32)
    assert len(got) == len(words)
    codes = packing.unpack_unit(words[:, :bits], bits, code != "scalar")
    levels = codes if code == "scalar" else trellis_levels(codes, bits, int(code[-1]))
    nibbles = got[:, None, :] >> np.arange(0, 32, 4, dtype=np.uint32)[:, None] & 15
    np.testing.assert_array_equal(nibbles.reshape(-1, 32), levels)
