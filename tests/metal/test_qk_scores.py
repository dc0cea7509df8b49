import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import METAL

from forgeattention.backends.metal import scores as metal_scores
from forgeattention.backends.reference import scores as oracle_scores

from .cases import CASES, Emulator, make_codec, make_table, queries, relative_error


def check(rng, codec, lengths, group=2, n=1, slack=0):
    table = make_table(rng, codec, lengths)
    table = type(table)(table.base, table.page_table, table.lengths, table.max_length + slack)
    q = queries(rng, codec, len(lengths), group, n)
    scores = metal_scores.qk_scores(q, codec, table, 0.2, Emulator())
    assert relative_error(scores, oracle_scores.qk_scores(q, codec, table, 0.2)) < METAL["float32"]


@pytest.mark.parametrize(("fmt", "head_dim"), CASES, ids=str)
def test_formats_and_head_dims(fmt, head_dim):
    check(np.random.default_rng(1), make_codec(fmt, head_dim), [70, 130])


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 255, 256, 257, 700])
def test_ragged_lengths(length):
    check(np.random.default_rng(2), make_codec(), [length])
    check(np.random.default_rng(3), make_codec(), [length, 40, 0], slack=30)


@pytest.mark.parametrize(("group", "n"), [(1, 1), (3, 1), (8, 1), (9, 1), (2, 7)])
def test_query_blocks(group, n):
    check(np.random.default_rng(4), make_codec(), [100, 64], group=group, n=n)


def test_centred_keys():
    rng = np.random.default_rng(5)
    check(rng, make_codec(k_mu=rng.standard_normal((2, 64)), v_mu=rng.standard_normal(64)), [90])


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 600), min_size=1, max_size=9), seed=st.integers(0, 2**32 - 1))
def test_any_lengths(lengths, seed):
    check(np.random.default_rng(seed), make_codec(kv_heads=1), lengths)
