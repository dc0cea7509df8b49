import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import METAL, SPARSE_MASS

from forgeattention.backends.metal import sparse as metal_sparse
from forgeattention.backends.reference import pages as oracle_pages
from forgeattention.backends.reference import scores as oracle_scores
from forgeattention.backends.reference import sparse as oracle_sparse
from forgeattention.ops import PageTable, Scores
from forgeattention.reference.sparse import page_statistics

from .cases import CASES, FORMATS, HEAD_DIMS, Emulator, make_codec, make_table, queries, relative_error

SCALE = 0.3


def check(rng, codec, lengths, k=None, group=2, n=1, q=None, p=None, other=False):
    """All three ops against the oracle's, each on the same inputs."""
    table = make_table(rng, codec, lengths)
    q = queries(rng, codec, len(lengths), group, n) if q is None else q
    device = Emulator()
    scores = metal_sparse.sparse_scores(q, codec, table, SCALE, device)
    assert relative_error(scores.scores, oracle_scores.qk_scores(q, codec, table, SCALE)) < METAL["float32"]
    assert relative_error(scores.pages, page_statistics(scores.scores)) < SPARSE_MASS
    exact = None
    if other:
        shape = (*scores.scores.shape[:3], codec.head_dim)
        exact = rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape[:3]).astype(np.float32)
    chosen = scores, table, k, p, None if exact is None else exact[1]
    threshold, want = metal_sparse.sparse_threshold(*chosen, device), oracle_sparse.sparse_threshold(*chosen)
    same_threshold(threshold, want, p)
    got = metal_sparse.sparse_attention(scores, threshold, codec, table, exact, device)
    want = oracle_sparse.sparse_attention(scores, threshold, codec, table, exact)
    assert relative_error(got[0], want[0]) < METAL["float32"]
    assert relative_error(got[1], want[1]) < METAL["float32"]
    return device


def same_threshold(got, want, p=None):
    if p is None:
        for name in ("score", "last", "kept"):
            assert np.array_equal(getattr(got, name), getattr(want, name)), name
    else:  # the last token kept is decided by a sum, to its rounding
        assert (got.dropped <= 1 - p + SPARSE_MASS).all()
        assert (np.abs(got.kept - want.kept) <= 1).all()
    assert np.allclose(got.dropped, want.dropped, atol=SPARSE_MASS if p is None else 1 - p)
    assert np.array_equal(got.top, want.top)


def given_scores(line):
    """Scores [tokens] of one query, as `sparse_scores` gives them, and their table."""
    line = np.asarray(line, np.float32)[None, None, None]
    tokens = line.shape[-1]
    table = PageTable(np.zeros(16, np.uint8), np.zeros((1, -(-tokens // 64)), np.int64), np.int32([tokens]), tokens)
    return Scores(line, page_statistics(line).astype(np.float32)), table


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_formats(fmt):
    check(np.random.default_rng(1), make_codec(fmt), [70, 330], 20)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim):
    check(np.random.default_rng(2), make_codec(FORMATS[1], head_dim), [300], 16, group=4)


@pytest.mark.parametrize("k", [0, 1, 2, 63, 256, 599, 600, 1000])
def test_numbers_of_survivors(k):
    check(np.random.default_rng(3), make_codec(), [600, 7, 0], k)


@pytest.mark.parametrize("length", [1, 64, 255, 256, 257, 700])
def test_ragged_lengths(length):
    check(np.random.default_rng(4), make_codec(), [length], 9)


@pytest.mark.parametrize("k", [1, 5, 200, 520])
def test_ties_go_to_earlier_tokens(k):
    codec = make_codec()
    check(np.random.default_rng(5), codec, [520], k, q=np.zeros((1, 4, 1, 64), np.float32))


@pytest.mark.parametrize(("group", "n"), [(1, 1), (8, 1), (9, 1), (2, 5)])
def test_query_blocks(group, n):
    check(np.random.default_rng(6), make_codec(), [280, 100], 30, group=group, n=n)


def test_centred():
    rng = np.random.default_rng(7)
    check(rng, make_codec(k_mu=rng.standard_normal((2, 64)), v_mu=rng.standard_normal(64)), [300, 0], 10)


@pytest.mark.parametrize("p", [0.1, 0.9, 0.995, 0.99999])
@pytest.mark.parametrize("other", [False, True])
def test_shares_of_the_mass(p, other):
    check(np.random.default_rng(9), make_codec(), [600, 7, 0], p=p, other=other)


def test_budgets_of_heads():
    budgets = np.array([0, 1, 70, 9999], np.int32)
    check(np.random.default_rng(10), make_codec(), [300, 90], budgets, other=True)


@pytest.mark.parametrize("k", [1, 5, 64, 200, 519, 520])
def test_all_scores_equal(k):
    scores, table = given_scores(np.full(520, 0.25))
    t = metal_sparse.sparse_threshold(scores, table, k, None, None, Emulator())
    assert (t.score.item(), t.last.item(), t.kept.item()) == (0.25, k - 1, k)
    half = metal_sparse.sparse_threshold(scores, table, None, 0.5, None, Emulator())
    assert half.last.item() == 259


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.sampled_from([-3.0, -0.0, 0.0, 1e-30, 0.5, 2.0, 80.0, -200.0]), min_size=1, max_size=400),
    k=st.integers(0, 420),
    p=st.sampled_from([None, 0.01, 0.5, 0.9, 0.999]),
    lse=st.sampled_from([None, -5.0, 3.0, 200.0]),
)
def test_few_values_and_many_ties(values, k, p, lse):
    scores, table = given_scores(values)
    exact = None if lse is None else np.full((1, 1, 1), lse, np.float32)
    chosen = scores, table, None if p else k, p, exact
    same_threshold(metal_sparse.sparse_threshold(*chosen, Emulator()), oracle_sparse.sparse_threshold(*chosen), p)


@pytest.mark.parametrize("position", [0, 300, 1030])
def test_tiles_without_survivors_are_not_read(position):
    """One survivor: only its page's values, and the headers and scales of its tile, are read."""
    rng = np.random.default_rng(8)
    codec, device = make_codec(kv_heads=1), Emulator()
    table = make_table(rng, codec, [1031])
    line = np.zeros(1031, np.float32)
    line[position] = 1
    scores, _ = given_scores(line)
    threshold = metal_sparse.sparse_threshold(scores, table, 1, None, None, device)
    out, _ = metal_sparse.sparse_attention(scores, threshold, codec, table, None, device)
    _, v = oracle_pages.decode_pages(codec, table, "float64", False)
    assert relative_error(out[0, 0, 0], v[0, 0, position]) < METAL["float32"]
    tokens = min(256, 1031 - position // 256 * 256)
    pages = -(-tokens // 64)
    headers = 32 * (pages if pages == 4 else 1)
    if v[0, 0, position].any():  # a token of zero scale has no weight
        assert device.bytes_read["base"] == codec.format.v_code_bytes + headers + 2 * tokens
    assert device.bytes_read["scores"] == 4 * tokens


def test_thresholds_pass_over_pages_that_cannot_reach_them():
    """Of 20 pages the best is searched, in eight passes and once for ties."""
    line = np.zeros(1280, np.float32)
    line[640:704] = np.linspace(1, 2, 64)
    scores, table = given_scores(line)
    device = Emulator()
    threshold = metal_sparse.sparse_threshold(scores, table, 10, None, None, device)
    assert threshold.kept.item() == 10
    assert device.bytes_read["scores"] <= 4 * 64 * (8 * 10 + 1)


@pytest.mark.parametrize(("fmt", "head_dim"), CASES, ids=str)
def test_page_scores(fmt, head_dim):
    rng = np.random.default_rng(11)
    codec = make_codec(fmt, head_dim, k_mu=rng.standard_normal((2, head_dim)))
    table = make_table(rng, codec, [300, 64, 0])
    q = queries(rng, codec, 3, 2, 1)
    got, want = (
        metal_sparse.page_scores(q, codec, table, SCALE, Emulator()),
        oracle_sparse.page_scores(q, codec, table, SCALE),
    )
    assert np.array_equal(np.isinf(got), np.isinf(want))
    assert relative_error(got, want) < METAL["float32"]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 700), min_size=1, max_size=8), k=st.integers(0, 400), seed=st.integers(0, 2**32 - 1)
)
def test_any_lengths(lengths, k, seed):
    check(np.random.default_rng(seed), make_codec(kv_heads=1), lengths, k, group=1)
