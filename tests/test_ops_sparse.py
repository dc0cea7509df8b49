"""Sparse attention of the CPU kernels against the oracle, and what the oracle itself promises."""

import numpy as np
import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import CODES, DTYPES, make_case, relative

from forgeattention import ops
from forgeattention.backends.cpu import native
from forgeattention.codec import PAGE, CodecSpec
from forgeattention.ops import PageTable, Scores
from forgeattention.reference import sparse


@pytest.fixture(params=native.isas())
def isa(request):
    before = native.isas()[0]
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


def check(case, backend="auto", other=True, **chosen):
    """All three ops against the oracle's, each on the same inputs."""
    args = case.q, case.codec, case.table, case.scale
    scores, oracle = ops.sparse_scores(*args, backend=backend), ops.sparse_scores(*args, backend="reference")
    assert relative(scores.scores, oracle.scores) < tolerances.CPU_SCORES
    assert relative(scores.pages, sparse.page_statistics(scores.scores)) < tolerances.SPARSE_MASS
    exact = ops.decode_attention(case.q, case.codec, None, case.exact, case.scale, causal=False) if other else None
    chosen |= {"exact_lse": exact[1]} if exact else {}
    threshold = ops.sparse_threshold(scores, case.table, backend=backend, **chosen)
    want = ops.sparse_threshold(scores, case.table, backend="reference", **chosen)
    same_threshold(threshold, want, chosen.get("top_p"))
    out, lse = ops.sparse_attention(scores, threshold, case.codec, case.table, other=exact, backend=backend)
    want = ops.sparse_attention(scores, threshold, case.codec, case.table, other=exact, backend="reference")
    assert relative(out, want[0]) < tolerances.CPU_ATTENTION[str(out.dtype).split(".")[1]]
    assert relative(lse, want[1]) < tolerances.CPU_LSE
    return scores, threshold


def same_threshold(got, want, top_p=None):
    if top_p is None:
        assert torch.equal(got.score, want.score)
        assert torch.equal(got.last, want.last)
        assert torch.equal(got.kept, want.kept)
    else:  # the last token kept is decided by a sum, to its rounding
        assert (got.dropped <= 1 - top_p + tolerances.SPARSE_MASS).all()
        assert ((got.kept - want.kept).abs() <= 1).all()
    assert torch.allclose(got.dropped, want.dropped, atol=tolerances.SPARSE_MASS if top_p is None else 1 - top_p)


def given_scores(lines, lengths=None):
    """Scores [rows, tokens] of one query head each, as `sparse_scores` gives them, and their table."""
    lines = np.atleast_2d(np.asarray(lines, np.float32))
    rows, tokens = lines.shape
    lengths = [tokens] * rows if lengths is None else lengths
    scores = np.where(np.arange(tokens) < np.array(lengths)[:, None], lines, -np.inf)[:, None, None]
    pages = sparse.page_statistics(scores).astype(np.float32)
    offsets = torch.zeros(rows, -(-tokens // PAGE), dtype=torch.int64)
    table = PageTable(torch.zeros(16, dtype=torch.uint8), offsets, torch.tensor(lengths, dtype=torch.int32), tokens)
    return Scores(torch.from_numpy(scores.astype(np.float32)), torch.from_numpy(pages)), table


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256, 512])
@pytest.mark.parametrize("n", [1, 3])
def test_head_dims(isa, head_dim, n):
    check(make_case(CodecSpec(), head_dim, lengths=(150, 0, 320), n=n, exact=(9, 9, 9), centred=True), top_k=40)


@pytest.mark.parametrize(("bits", "code"), CODES)
def test_codes(bits, code):
    check(make_case(CodecSpec(bits, bits, code, code), 128, 1, lengths=(300,), exact=(1,)), top_k=30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    check(make_case(CodecSpec(), dtype=dtype), top_p=0.9)


@pytest.mark.parametrize("k", [0, 1, 63, 64, 256, 4999, 5000, 10**6])
def test_numbers_of_survivors(k):
    """Several pieces of pages; K = 0, K >= T, and no exact tokens to fall back on."""
    _, threshold = check(make_case(CodecSpec(), 64, 1, lengths=(5000, 7), exact=(3, 3)), other=False, top_k=k)
    assert torch.equal(threshold.kept[..., 0], torch.tensor([[min(k, 5000)] * 3, [min(k, 7)] * 3], dtype=torch.int32))


@pytest.mark.parametrize("p", [0.1, 0.9, 0.995, 0.99999])
def test_shares_of_the_mass(p):
    check(make_case(CodecSpec(), 64, 2, lengths=(5000, 7, 0), exact=(40, 7, 3)), top_p=p)


def test_budgets_of_heads():
    _, threshold = check(make_case(CodecSpec()), top_k=torch.tensor([0, 1, 7, 64, 150, 9999], dtype=torch.int32))
    assert threshold.kept[0, :, 0].tolist() == [0, 1, 7, 64, 150, 150]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("k", [1, 5, 64, 200, 519, 520])
def test_all_scores_equal(backend, k):
    scores, table = given_scores(np.full(520, 0.25))
    t = ops.sparse_threshold(scores, table, top_k=k, backend=backend)
    assert (t.score.item(), t.last.item(), t.kept.item()) == (0.25, k - 1, k)
    assert abs(t.dropped.item() - (1 - k / 520)) < tolerances.SPARSE_MASS
    half = ops.sparse_threshold(scores, table, top_p=0.5, backend=backend)
    assert half.last.item() == 259


@pytest.mark.parametrize("k", [3, 70, 71, 400])
def test_ties_go_to_earlier_tokens(k):
    line = np.random.default_rng(k).integers(0, 4, 700).astype(np.float32)
    scores, table = given_scores(line)
    t = ops.sparse_threshold(scores, table, top_k=k)
    kept = sparse.survivors(line, t.score.item(), t.last.item())
    assert kept.tolist() == np.isin(np.arange(700), np.argsort(-line, kind="stable")[:k]).tolist()


def test_one_survivor_in_the_last_partial_page():
    case = make_case(CodecSpec(), 64, 1, 1, lengths=(513,), exact=(1,))
    scores = ops.sparse_scores(case.q, case.codec, case.table, case.scale)
    scores.scores[..., 512] = 99
    scores = Scores(scores.scores, torch.from_numpy(sparse.page_statistics(scores.scores).astype(np.float32)))
    t = ops.sparse_threshold(scores, case.table, top_k=1)
    assert t.last.item() == 512
    out, lse = ops.sparse_attention(scores, t, case.codec, case.table)
    _, v = ops.decode_pages(case.codec, case.table)
    assert relative(out[0, 0], v[0, 0, 512:513]) < tolerances.CPU_ATTENTION["float32"]
    assert lse.item() == pytest.approx(99)


def test_pages_without_survivors_are_not_read():
    """A cluster of survivors in one page: the other pages' values may be anything, and theirs decide."""
    case = make_case(CodecSpec(scales="fp16"), 64, 2, 2, lengths=(640,), exact=(1,))
    scores = ops.sparse_scores(case.q, case.codec, case.table, case.scale)
    scores.scores[..., 256:320] += 50
    scores = Scores(scores.scores, torch.from_numpy(sparse.page_statistics(scores.scores).astype(np.float32)))
    t = ops.sparse_threshold(scores, case.table, top_k=64)
    assert (sparse.survivors(scores.scores, t.score, t.last).nonzero()[3] // 64 == 4).all()
    before = ops.sparse_attention(scores, t, case.codec, case.table)[0]
    fmt, pool = case.codec.format, case.table.base
    for page, offset in enumerate(case.table.page_table[0, :10].tolist()):
        for head in range(2):
            at = offset + head * fmt.record_bytes
            if page != 4:
                pool[at + fmt.v_offset : at + fmt.record_bytes] = 0xFF  # scales of NaN
    assert torch.equal(before, ops.sparse_attention(scores, t, case.codec, case.table)[0])


def adversarial(rng, tokens):
    """Scores near the threshold's edge: flat, one giant, steps, heavy tails, equal pages."""
    kind = rng.integers(5)
    if kind == 0:
        return rng.normal(0, 1e-3, tokens)
    if kind == 1:
        return np.where(np.arange(tokens) == rng.integers(tokens), 30.0, rng.normal(size=tokens))
    if kind == 2:
        return np.repeat(rng.normal(0, 3, -(-tokens // PAGE)), PAGE)[:tokens]
    if kind == 3:
        return rng.standard_t(2, tokens).clip(-80, 80)
    return rng.integers(-3, 4, tokens).astype(float)


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 900), p=st.sampled_from([0.5, 0.9, 0.99, 0.995, 0.9999]), seed=st.integers(0, 2**32 - 1))
def test_bound_of_top_p(tokens, p, seed):
    """|o - o_dense| <= 2 (1 - p) max|v|, with values made to disagree where tokens are dropped."""
    rng = np.random.default_rng(seed)
    line = adversarial(rng, tokens).astype(np.float32)
    exact = np.float32(rng.choice([-np.inf, rng.normal(0, 5)]))
    scores, table = given_scores(line)
    t = ops.sparse_threshold(scores, table, top_p=p, exact_lse=torch.full((1, 1, 1), float(exact)))
    keep = sparse.survivors(line, t.score.item(), t.last.item())
    assert keep.sum() == t.kept.item()
    v = np.where(keep, 1.0, -1.0)[None, :, None] * np.ones(3)
    own = np.ones((1, 1, 3))
    from forgeattention.reference import merge

    def attend(mask):
        part = sparse.sparse_attention(line[None, None], mask[None, None], v)
        return merge([part, (own, np.full((1, 1), float(exact)))])[0]

    error = np.abs(attend(keep) - attend(np.ones(tokens, bool))).max()
    assert error <= 2 * (1 - p) + tolerances.SPARSE_MASS
    assert abs(error / 2 - t.dropped.item()) < tolerances.SPARSE_MASS  # these values reach the bound
    fewest = sparse.sparse_threshold(line, None, p, float(exact))[2]
    assert abs(t.kept.item() - fewest) <= 1


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 900), k=st.integers(0, 900), seed=st.integers(0, 2**32 - 1))
def test_exact_top_k(tokens, k, seed):
    rng = np.random.default_rng(seed)
    line = adversarial(rng, max(tokens, 1)).astype(np.float32)
    scores, table = given_scores(line, [tokens])
    same_threshold(
        ops.sparse_threshold(scores, table, top_k=k), ops.sparse_threshold(scores, table, top_k=k, backend="reference")
    )


def test_everything_kept_is_dense_attention():
    case = make_case(CodecSpec())
    exact = ops.decode_attention(case.q, case.codec, None, case.exact, case.scale, causal=False)
    scores = ops.sparse_scores(case.q, case.codec, case.table, case.scale)
    t = ops.sparse_threshold(scores, case.table, top_k=10**6, exact_lse=exact[1])
    out, lse = ops.sparse_attention(scores, t, case.codec, case.table, other=exact)
    dense = case.attend()
    assert relative(out, dense[0]) < tolerances.CPU_ATTENTION["float32"]
    assert relative(lse, dense[1]) < tolerances.CPU_LSE


def test_rows_do_not_depend_on_each_other():
    case = make_case(CodecSpec(), lengths=(5000, 300, 64))
    scores = ops.sparse_scores(case.q, case.codec, case.table, case.scale)
    t = ops.sparse_threshold(scores, case.table, top_k=100)
    out, _ = ops.sparse_attention(scores, t, case.codec, case.table)
    for b in range(3):
        one = case.row(b)
        own = ops.sparse_scores(one.q, one.codec, one.table, one.scale)
        mine = ops.sparse_threshold(own, one.table, top_k=100)
        assert torch.equal(ops.sparse_attention(own, mine, one.codec, one.table)[0][0], out[b])


def test_queries_that_are_not_finite():
    case = make_case(CodecSpec())
    case.q[0, 2] = float("nan")
    scores = ops.sparse_scores(case.q, case.codec, case.table, case.scale)
    t = ops.sparse_threshold(scores, case.table, top_k=10)
    out, _ = ops.sparse_attention(scores, t, case.codec, case.table)
    assert out[0, 2].isnan().all()
    assert out[0, :2].isfinite().all()
    assert out[1:].isfinite().all()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({}, "either top_k or top_p"),
        ({"top_k": 3, "top_p": 0.5}, "either top_k or top_p"),
        ({"top_k": -1}, "top_k >= 0; got -1"),
        ({"top_p": 1.0}, "0 < top_p < 1; got 1.0"),
        ({"top_k": torch.ones(2, dtype=torch.int32)}, r"top_k int32 \[1\]; got int32 \[2\]"),
        ({"top_k": 1, "exact_lse": torch.zeros(1)}, r"exact_lse float32 \[1, 1, 1\]; got float32 \[1\]"),
    ],
)
def test_errors(chosen, message):
    scores, table = given_scores(np.zeros(70))
    with pytest.raises(ValueError, match=r"\[sparse_threshold\] expected " + message):
        ops.sparse_threshold(scores, table, **chosen)


def test_scores_of_another_table():
    scores, _ = given_scores(np.zeros(70))
    _, table = given_scores(np.zeros(71))
    with pytest.raises(ValueError, match=r"\[sparse_threshold\] expected scores of 71 tokens"):
        ops.sparse_threshold(scores, table, top_k=1)
