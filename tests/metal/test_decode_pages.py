import numpy as np
import pytest
from tolerances import METAL

from forgeattention.backends.metal import pages as metal_pages
from forgeattention.backends.reference import pages as oracle_pages

from .cases import FORMATS, HEAD_DIMS, Emulator, make_codec, make_table, relative_error


def check(rng, codec, lengths, dtype="float32", rotated=True, slack=0):
    table = make_table(rng, codec, lengths)
    table = type(table)(table.base, table.page_table, table.lengths, table.max_length + slack)
    ours = metal_pages.decode_pages(codec, table, dtype, rotated, Emulator())
    for got, want in zip(ours, oracle_pages.decode_pages(codec, table, "float64", rotated)):
        assert got.dtype == dtype
        assert relative_error(got, want) < METAL[dtype]
        for row, length in enumerate(lengths):
            assert (got[row, :, length:] == 0).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_formats_and_head_dims(fmt, head_dim):
    check(np.random.default_rng(1), make_codec(fmt, head_dim), [70, 64])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("rotated", [True, False])
def test_dtypes_and_coordinates(dtype, rotated):
    rng = np.random.default_rng(2)
    check(rng, make_codec(head_dim=80), [100, 3, 0], dtype, rotated)
    check(rng, make_codec(k_mu=rng.standard_normal((2, 64)), v_mu=rng.standard_normal(64)), [90, 20], dtype, rotated)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 255, 256, 257])
def test_ragged_lengths(length):
    check(np.random.default_rng(3), make_codec(), [length], slack=20)
    check(np.random.default_rng(4), make_codec(), [length, 80, 0])
