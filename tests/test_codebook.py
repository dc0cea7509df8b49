"""Codebooks: the solver against published constants, the trellis against its definition."""

import itertools

import numpy as np
import pytest
from tolerances import LLOYD_MAX, TRELLIS_LEVELS

from forgeattention.codec.codebook import (
    TRAINED,
    codebook,
    lloyd_max,
    to_int8,
    train_trellis,
    trellis_encode,
    trellis_levels,
    trellis_step,
)

# Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6 (1960), table I: positive levels for N(0, 1).
PUBLISHED = {
    4: [0.4528, 1.510],
    8: [0.2451, 0.7560, 1.344, 2.152],
    16: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}
# Mean squared errors of the same table.
DISTORTION = {4: 0.1175, 8: 0.03454, 16: 0.009497}


@pytest.mark.parametrize("levels", PUBLISHED)
def test_solver_gives_the_published_levels(levels):
    found = lloyd_max(levels)
    np.testing.assert_allclose(found[levels // 2 :], PUBLISHED[levels], atol=LLOYD_MAX)
    np.testing.assert_array_equal(found, -found[::-1])
    x = np.random.default_rng(0).standard_normal(400_000)
    nearest = found[np.searchsorted((found[1:] + found[:-1]) / 2, x)]
    assert ((x - nearest) ** 2).mean() == pytest.approx(DISTORTION[levels], rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_int8_levels_are_the_solver_s(bits):
    book = codebook(bits, "scalar")
    levels, unit = to_int8(lloyd_max(1 << bits))
    assert (book.levels, book.unit) == (levels, unit)
    assert max(book.levels) == 127
    assert book.levels == tuple(-v for v in reversed(book.levels))


@pytest.mark.parametrize(("bits", "states"), TRAINED)
def test_trained_levels_are_what_training_gives(bits, states):
    values = train_trellis(bits, states)
    book = codebook(bits, f"trellis{states}")
    np.testing.assert_allclose(book.values, values, atol=TRELLIS_LEVELS)
    assert len(book.levels) == 2 << bits


@pytest.mark.parametrize("states", [4, 8])
@pytest.mark.parametrize("bits", [2, 3])
def test_levels_follow_the_trellis_step_by_step(bits, states):
    codes = np.random.default_rng(1).integers(0, 1 << bits, (50, 32), dtype=np.uint8)
    levels = trellis_levels(codes, bits, states)
    for path, got in zip(codes, levels):
        state = 0
        for code in path:  # once around, to reach the state before the first code
            state, _ = trellis_step(state, int(code) & 1, states)
        for code, level in zip(path, got):
            state, subset = trellis_step(state, int(code) & 1, states)
            assert level == int(code) >> 1 << 2 | subset


@pytest.mark.parametrize("states", [4, 8])
def test_encoder_finds_the_best_of_all_paths(states):
    """On paths of 5 codes every one of the 2^10 paths can be tried."""
    values = codebook(2, f"trellis{states}").values
    every = np.array(list(itertools.product(range(4), repeat=5)), np.uint8)
    decoded = values[trellis_levels(every, 2, states)]
    x = np.random.default_rng(2).standard_normal((40, 5))
    best = ((x[:, None] - decoded) ** 2).sum(-1).min(1)
    codes = trellis_encode(x, values, 2, states)
    got = ((x - values[trellis_levels(codes, 2, states)]) ** 2).sum(-1)
    np.testing.assert_allclose(got, best, rtol=1e-12)


def test_trellis_beats_the_scalar_code():
    x = np.random.default_rng(3).standard_normal((2000, 32))
    error = {}
    for code in ("trellis4", "trellis8"):
        book = codebook(3, code)
        codes = trellis_encode(x, book.values, 3, book.states)
        error[code] = ((x - book.values[trellis_levels(codes, 3, book.states)]) ** 2).mean()
    assert error["trellis8"] < error["trellis4"] < 0.75 * DISTORTION[8]


def test_unknown_codes_are_refused():
    with pytest.raises(ValueError, match=r"\[codec_spec\] expected .*_bits in \(2, 3, 4\); got 5"):
        codebook(5, "scalar")
    with pytest.raises(ValueError, match=r"\[codec_spec\] expected .*_code='scalar' at 4 bits; got 'trellis8'"):
        codebook(4, "trellis8")
