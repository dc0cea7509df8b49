import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import METAL

from forgeattention.backends.metal import scores as metal_scores
from forgeattention.backends.reference import scores as oracle_scores

from .cases import CASES, Emulator, make_codec, make_table, relative_error


def check(rng, codec, lengths, group=2, n=1, skip=True, keep=1.0):
    table = make_table(rng, codec, lengths)
    shape = (len(lengths), codec.kv_heads * group, n, table.max_length)
    p = rng.standard_normal(shape).astype(np.float32) * (rng.random(shape) < keep)
    want = oracle_scores.value_sum(p, codec, table)
    for row, length in enumerate(lengths):
        p[row, ..., length:] = np.nan
    out = metal_scores.value_sum(p, codec, table, skip, Emulator())
    assert relative_error(out, want) < METAL["float32"]
    return p, table, out


@pytest.mark.parametrize(("fmt", "head_dim"), CASES, ids=str)
def test_formats_and_head_dims(fmt, head_dim):
    check(np.random.default_rng(1), make_codec(fmt, head_dim), [70, 330], skip=head_dim != 128)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 255, 256, 257, 1100])
def test_ragged_lengths(length, skip):
    check(np.random.default_rng(2), make_codec(), [length], skip=skip)
    check(np.random.default_rng(3), make_codec(), [length, 40, 0], skip=skip)


@pytest.mark.parametrize(("group", "n"), [(1, 1), (3, 1), (8, 1), (9, 1), (2, 7)])
def test_query_blocks(group, n):
    check(np.random.default_rng(4), make_codec(), [100, 64], group=group, n=n)


def test_centred_values():
    rng = np.random.default_rng(5)
    check(rng, make_codec(k_mu=rng.standard_normal((2, 64)), v_mu=rng.standard_normal(64)), [90])


@pytest.mark.parametrize("keep", [0.0, 0.002, 0.05])
def test_skipping_equals_dense(keep):
    p, table, out = check(np.random.default_rng(6), make_codec(), [900, 300], keep=keep)
    assert (out == metal_scores.value_sum(p, make_codec(), table, False, Emulator())).all()


def test_pages_without_weight_are_not_read():
    rng = np.random.default_rng(7)
    codec, device = make_codec(kv_heads=1), Emulator()
    table = make_table(rng, codec, [256])
    p = np.zeros((1, 1, 1, 256), np.float32)
    p[..., 70:90] = 1
    read = {}
    for skip in (True, False):
        metal_scores.value_sum(p, codec, table, skip, device)
        read[skip] = device.bytes_read["base"]
    assert read[False] - read[True] == 3 * codec.format.v_code_bytes


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 900), min_size=1, max_size=9), seed=st.integers(0, 2**32 - 1), keep=st.floats(0, 1)
)
def test_any_lengths(lengths, seed, keep):
    check(np.random.default_rng(seed), make_codec(kv_heads=1), lengths, keep=keep)
