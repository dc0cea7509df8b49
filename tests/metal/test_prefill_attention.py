import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import METAL

from forgeattention.backends.metal import attention as metal_attention
from forgeattention.backends.reference import attention as oracle_attention

from .cases import FORMATS, HEAD_DIMS, Emulator, make_codec, make_table, queries, relative_error


def check(rng, codec, lengths, group=2, n=10, dtype="float32"):
    table = make_table(rng, codec, lengths)
    q = queries(rng, codec, len(lengths), group, n, dtype)
    scale = codec.head_dim**-0.5
    out, lse = metal_attention.prefill_attention(q, codec, table, scale, Emulator())
    want, want_lse = oracle_attention.prefill_attention(q.astype(np.float32), codec, table, scale)
    assert out.dtype == lse.dtype == np.float32
    assert relative_error(out, want) < METAL["float32"]
    assert relative_error(lse, want_lse) < METAL["float32"]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_formats(fmt):
    check(np.random.default_rng(1), make_codec(fmt), [70, 64])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim):
    check(np.random.default_rng(2), make_codec(FORMATS[1], head_dim), [130])


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 257])
def test_ragged_lengths(length):
    check(np.random.default_rng(3), make_codec(), [length, 40, 0])


@pytest.mark.parametrize(("group", "n"), [(1, 1), (1, 31), (1, 33), (3, 11), (8, 20)])
def test_query_blocks(group, n):
    check(np.random.default_rng(4), make_codec(kv_heads=1), [100, 64], group=group, n=n)


def test_half_precision_queries():
    check(np.random.default_rng(5), make_codec(), [90], dtype="float16")


def test_centred():
    rng = np.random.default_rng(6)
    check(rng, make_codec(k_mu=rng.standard_normal((2, 64)), v_mu=rng.standard_normal(64)), [90, 0])


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=8), n=st.integers(1, 40), seed=st.integers(0, 2**32 - 1)
)
def test_any_lengths(lengths, n, seed):
    check(np.random.default_rng(seed), make_codec(kv_heads=1), lengths, group=1, n=n)
