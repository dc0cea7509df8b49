import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import METAL

from forgeattention.backends.metal import attention as metal_attention
from forgeattention.backends.metal import plan
from forgeattention.backends.reference import attention as oracle_attention
from forgeattention.codec.codec import Codec
from forgeattention.codec.spec import CodecSpec

from .cases import FORMATS, HEAD_DIMS, Emulator, make_codec, make_exact, make_table, queries, relative_error


def check(
    rng, codec, lengths, exact_lengths, group=2, n=1, dtype="float32", q_dtype="float32", causal=True, sinks=False
):
    table = make_table(rng, codec, lengths) if lengths is not None else None
    batch = len(lengths if lengths is not None else exact_lengths)
    ours = theirs = None
    if exact_lengths is not None:
        ours, theirs = make_exact(rng, codec, exact_lengths, max(exact_lengths) + 3, dtype)
    q = queries(rng, codec, batch, group, n, q_dtype)
    logits = rng.standard_normal(q.shape[1]).astype(np.float32) * 3 if sinks else None
    scale = codec.head_dim**-0.5
    out, lse = metal_attention.decode_attention(q, codec, table, ours, scale, causal, logits, Emulator())
    want, want_lse = oracle_attention.decode_attention(
        q.astype(np.float32), codec, table, theirs, scale, causal, logits
    )
    assert out.dtype == q.dtype
    assert relative_error(out, want) < METAL[q_dtype]
    assert relative_error(lse, want_lse) < METAL["float32"]
    return q, table, ours, out, lse


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_formats(fmt, head_dim):
    check(np.random.default_rng(1), make_codec(fmt, head_dim), [200, 329], [5, 40])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("fmt", FORMATS[:2], ids=str)
def test_head_dims(fmt, head_dim):
    check(np.random.default_rng(2), make_codec(fmt, head_dim), [300], [33], group=4)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 255, 256, 257, 511, 513, 1100])
def test_ragged_lengths(length):
    check(np.random.default_rng(3), make_codec(), [length], [0], causal=False)
    check(np.random.default_rng(4), make_codec(), [length, 70], [1, 130])


@pytest.mark.parametrize("exact", [1, 31, 32, 33, 127, 128, 129, 300])
def test_exact_lengths(exact):
    check(np.random.default_rng(5), make_codec(), None, [exact, 1])
    check(np.random.default_rng(6), make_codec(), [90, 0], [exact, 1])


@pytest.mark.parametrize(("group", "n"), [(1, 1), (3, 1), (8, 1), (9, 1), (1, 5), (4, 3), (2, 16)])
@pytest.mark.parametrize("causal", [True, False])
def test_query_blocks(group, n, causal):
    check(np.random.default_rng(7), make_codec(), [280, 100], [20, 16], group=group, n=n, causal=causal)


@pytest.mark.parametrize("head_dim", [256, 512])
def test_large_heads_with_many_rows(head_dim):
    check(np.random.default_rng(8), make_codec(head_dim=head_dim, kv_heads=1), [130], [9], group=6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_dtypes(dtype, head_dim):
    check(np.random.default_rng(9), make_codec(head_dim=head_dim), [150], [50], dtype=dtype)
    check(np.random.default_rng(9), make_codec(head_dim=head_dim), [150], [50], dtype=dtype, q_dtype="float16")


def test_sink_logits():
    check(np.random.default_rng(10), make_codec(), [200, 0], [30, 2], sinks=True)
    check(np.random.default_rng(10), make_codec(), [0], [0], sinks=True, causal=False)


def test_nothing_attended():
    codec = make_codec()
    _, _, _, out, lse = check(np.random.default_rng(11), codec, [0, 70], [0, 0], causal=False)
    assert (out[0] == 0).all()
    assert (lse[0] == -np.inf).all()


def test_custom_transform():
    rng = np.random.default_rng(12)
    matrices = rng.standard_normal((2, 2, 64, 64)) / 8 + 2 * np.eye(64)
    mu = rng.standard_normal((2, 2, 64))
    codec = Codec(
        CodecSpec(rotation="custom"), 64, 2, k_matrix=matrices[0], v_matrix=matrices[1], k_mu=mu[0], v_mu=mu[1]
    )
    check(rng, codec, [200, 3], [30, 4], n=2)


def test_large_scores():
    """Scores far apart: the running maximum moves by hundreds between tiles."""
    rng = np.random.default_rng(13)
    codec = make_codec()
    table = make_table(rng, codec, [700])
    q = queries(rng, codec, 1, 2, 1) * 200
    out, lse = metal_attention.decode_attention(q, codec, table, None, 0.125, False, None, Emulator())
    want, want_lse = oracle_attention.decode_attention(q, codec, table, None, 0.125, False, None)
    assert relative_error(lse, want_lse) < METAL["float32"]
    # a score of 1000 in float32 is known to 1e-4, and so is its probability
    assert relative_error(out, want) < METAL["large_scores"]


def test_batch_rows_do_not_depend_on_each_other():
    rng = np.random.default_rng(14)
    codec = make_codec()
    lengths, exact_lengths = [1500, 70, 300, 0, 64, 257, 600, 129], [3, 20, 1, 9, 130, 64, 2, 2]
    q, table, exact, out, lse = check(rng, codec, lengths, exact_lengths)
    for row in range(len(lengths)):
        one = type(table)(table.base, table.page_table[row : row + 1], table.lengths[row : row + 1], lengths[row])
        mine = type(exact)(
            exact.k[row : row + 1], exact.v[row : row + 1], exact.lengths[row : row + 1], exact.max_length
        )
        alone, alone_lse = metal_attention.decode_attention(
            q[row : row + 1], codec, one, mine, 0.125, True, None, Emulator()
        )
        assert (alone == out[row]).all()
        assert (alone_lse == lse[row]).all()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_gqa_group_reads_the_pages_once(head_dim):
    rng = np.random.default_rng(15)
    codec, device = make_codec(head_dim=head_dim, kv_heads=1), Emulator()
    table = make_table(rng, codec, [512])
    run = device.run
    read = []
    device.run = lambda launch: (run(launch), read.append(dict(device.bytes_read)))[0]
    q = queries(rng, codec, 1, 8, 1)
    with plan.override(8):
        metal_attention.decode_attention(q, codec, table, None, 0.1, False, None, device)
    # one record per page and its 32 header bytes twice (for the keys' and the values' scales); pages 1, 4 and 7 have no
    # mean, so that their mean row is not read
    once = 8 * (codec.format.record_bytes + 2 * 32) - 3 * codec.format.padded_dim
    assert read[0]["base"] == once
    # by default a block is of as many rows as stay in registers
    metal_attention.decode_attention(q, codec, table, None, 0.1, False, None, device)
    assert read[2]["base"] == 2 * once


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 900), st.integers(3, 200)), min_size=1, max_size=3),
    n=st.integers(1, 3),
    causal=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_lengths(rows, n, causal, seed):
    lengths, exact = zip(*rows)
    check(np.random.default_rng(seed), make_codec(kv_heads=1), list(lengths), list(exact), n=n, causal=causal)
