"""Sparse attention on CUDA against the float64 oracle, on a GPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tolerances
from cuda_cases import CASES, Case

from forgeattention import ops
from forgeattention.backends.cuda import nvrtc
from forgeattention.codec.spec import PAGE
from forgeattention.ops import PageTable, Scores
from forgeattention.reference import sparse

available, reason = nvrtc.available()
pytestmark = pytest.mark.skipif(not available, reason=reason)
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def setup():
    from test_cuda_ops import Setup

    return Setup


def attend(made, other, **chosen):
    scores = ops.sparse_scores(made.q, made.codec, made.table, made.case.head_dim**-0.5)
    chosen |= {"exact_lse": other[1]} if other is not None else {}
    threshold = ops.sparse_threshold(scores, made.table, **chosen)
    return scores, threshold, ops.sparse_attention(scores, threshold, made.codec, made.table, other=other)


def check(made, **chosen):
    """Scores against float64, the threshold exactly, the output against float64 over the tokens kept."""
    case, scale = made.case, made.case.head_dim**-0.5
    other = ops.decode_attention(made.q, made.codec, None, made.exact, scale, causal=False)
    scores, threshold, (out, lse) = attend(made, other, **chosen)
    k, v = (x.double() for x in ops.decode_pages(made.codec, made.table, backend="cuda"))
    if "top_k" in chosen:
        want = ops.sparse_threshold(scores, made.table, exact_lse=other[1], backend="reference", **chosen)
        for name in ("score", "last", "kept"):
            assert torch.equal(getattr(threshold, name), getattr(want, name)), name
        assert torch.allclose(threshold.dropped, want.dropped, atol=tolerances.CUDA_SPARSE_MASS)
    for row, length in enumerate(made.lengths):
        s = scores.scores[row]
        assert torch.isneginf(s[..., length:]).all()
        keys, values = (x[row, :, :length].repeat_interleave(case.group, 0) for x in (k, v))
        true = scale * made.q[row].double() @ keys.transpose(1, 2)
        if length:
            worst = (s[..., :length].double() - true).abs().max() / true.abs().max()
            assert float(worst) < tolerances.CUDA_SCORES
        keep = sparse.survivors(s.cpu(), threshold.score[row].cpu(), threshold.last[row].cpu())[..., :length]
        assert (torch.from_numpy(keep).sum(-1) == threshold.kept[row].cpu()).all()
        kept = s[..., :length].double().masked_fill(~torch.from_numpy(keep).cuda(), -math.inf)
        joined = torch.cat([kept, other[1][row, ..., None].double()], -1)
        want_lse = joined.logsumexp(-1)
        weights = torch.nan_to_num(torch.exp(joined - want_lse[..., None]))
        want = weights[..., :length] @ values + weights[..., length:] * other[0][row].double()
        error = (out[row].double() - want).norm() / want.norm().clamp_min(1e-3)
        assert float(error) < tolerances.CUDA_ATTENTION[case.dtype]
        assert torch.equal(torch.isfinite(lse[row]), torch.isfinite(want_lse))
        finite = torch.isfinite(want_lse)
        assert float((lse[row].double() - want_lse)[finite].abs().sum()) < tolerances.CUDA_LSE * want_lse.numel()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_formats_and_shapes(setup, case: Case) -> None:
    check(setup(case, [1000, 0, 64, 321], [40, 7, 3, 0], mu=True), top_k=50)


@pytest.mark.parametrize("k", [0, 1, 63, 1024, 29999, 30000, 10**6])
def test_numbers_of_survivors(setup, k: int) -> None:
    check(setup(Case(), [30000, 700], [9, 0]), top_k=k)


def test_budgets_of_heads(setup) -> None:
    check(setup(Case(), [5000], [9]), top_k=torch.tensor([0, 1, 64, 100, 999, 5000, 7, 9999], dtype=torch.int32).cuda())


@pytest.mark.parametrize("p", [0.5, 0.9, 0.995, 0.9999])
def test_shares_of_the_mass(setup, p: float) -> None:
    made = setup(Case(), [30000, 700, 0, 64], [9, 0, 3, 400])
    check(made, top_p=p)
    other = ops.decode_attention(made.q, made.codec, None, made.exact, 128**-0.5, causal=False)
    scores, threshold, _ = attend(made, other, top_p=p)
    want = ops.sparse_threshold(scores, made.table, top_p=p, exact_lse=other[1], backend="reference")
    assert (threshold.dropped <= 1 - p + tolerances.CUDA_SPARSE_MASS).all()
    assert ((threshold.kept - want.kept).abs() <= 1 + want.kept // 1000).all()


def given(lines):
    """Scores [rows, tokens] of one query head each, as `sparse_scores` gives them, and their table."""
    rows, tokens = lines.shape
    scores = torch.as_tensor(lines, dtype=torch.float32)[:, None, None]
    pages = torch.from_numpy(sparse.page_statistics(scores).astype(np.float32)).cuda()
    offsets = torch.zeros(rows, -(-tokens // PAGE), dtype=torch.int64).cuda()
    lengths = torch.full((rows,), tokens, dtype=torch.int32).cuda()
    table = PageTable(torch.zeros(16, dtype=torch.uint8).cuda(), offsets, lengths, tokens)
    return Scores(scores.cuda(), pages), table


@pytest.mark.parametrize("tokens", [1, 63, 520, 40000])
@pytest.mark.parametrize("kind", ["equal", "steps", "normal", "giant", "wide", "negative"])
def test_thresholds_of_adversarial_scores(tokens: int, kind: str) -> None:
    """Ties within and across pages, lists that overflow, ranges beyond the bins."""
    rng = np.random.default_rng(tokens)
    lines = {
        "equal": np.full((3, tokens), 0.25),
        "steps": rng.integers(-2, 3, (3, tokens)).astype(float),
        "normal": rng.normal(size=(3, tokens)),
        "giant": np.where(np.arange(tokens) == tokens // 2, 90.0, rng.normal(size=(3, tokens))),
        "wide": rng.standard_t(1.5, (3, tokens)).clip(-300, 300),
        "negative": -np.exp(3 * rng.normal(size=(3, tokens))),
    }[kind]
    scores, table = given(lines)
    for k in (1, 2, 17, tokens // 3, tokens - 1, tokens):
        got = ops.sparse_threshold(scores, table, top_k=k)
        want = ops.sparse_threshold(scores, table, top_k=k, backend="reference")
        for name in ("score", "last", "kept"):
            assert torch.equal(getattr(got, name), getattr(want, name)), (k, name)
        assert torch.allclose(got.dropped, want.dropped, atol=tolerances.CUDA_SPARSE_MASS)
    for p in (0.5, 0.995):
        got = ops.sparse_threshold(scores, table, top_p=p)
        want = ops.sparse_threshold(scores, table, top_p=p, backend="reference")
        assert (got.dropped <= 1 - p + tolerances.CUDA_SPARSE_MASS).all()
        assert ((got.kept - want.kept).abs() <= 1 + want.kept // 1000).all()


def test_rows_do_not_depend_on_the_batch(setup) -> None:
    made = setup(Case(), [3000, 70, 700], [5, 5, 5])
    _, _, (out, _) = attend(made, None, top_k=100)
    for row, length in enumerate(made.lengths):
        one = slice(row, row + 1)
        table = PageTable(made.buffer, made.page_table[one], made.table.lengths[one], length)
        scores = ops.sparse_scores(made.q[one], made.codec, table, 128**-0.5)
        threshold = ops.sparse_threshold(scores, table, top_k=100)
        alone = ops.sparse_attention(scores, threshold, made.codec, table)[0]
        assert torch.equal(alone[0], out[row])


def test_graphs_replay_with_other_lengths(setup) -> None:
    made = setup(Case(), [3000], [5])
    scale, lengths = 128**-0.5, made.table.lengths

    def step():
        other = ops.decode_attention(made.q, made.codec, None, made.exact, scale, causal=False)
        return attend(made, other, top_p=0.9)[2]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out, lse = step()
    for length in (3000, 1, 0, 1500):
        lengths.fill_(length)
        graph.replay()
        torch.cuda.synchronize()
        want = step()
        assert torch.equal(out, want[0])
        assert torch.equal(lse, want[1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_page_scores(setup, case: Case) -> None:
    made = setup(case, [1000, 0, 64, 321], [40, 7, 3, 0], mu=True)
    scale = case.head_dim**-0.5
    got = ops.page_scores(made.q, made.codec, made.table, scale)
    want = ops.page_scores(made.q, made.codec, made.table, scale, backend="reference")
    assert torch.equal(torch.isneginf(got), torch.isneginf(want))
    finite = torch.isfinite(want)
    assert float((got - want)[finite].abs().max()) < tolerances.CUDA_SCORES * float(want[finite].abs().max())


@pytest.mark.parametrize("rotation", ["hadamard", "custom"])
def test_pages_by_their_means(setup, rotation: str) -> None:
    """All pages read is dense attention; some read is dense attention over a table of those."""
    from forgeattention.sparse import SparseLayer, SparseSpec

    made = setup(Case(rotation=rotation), [3200, 640], [40, 7])
    scale = 128**-0.5
    dense = ops.decode_attention(made.q, made.codec, made.table, made.exact, scale)
    for spec in (SparseSpec(top_k=6400, fast=True), SparseSpec(top_p=0.999999, fast=True)):
        out, lse, _ = SparseLayer(spec).attend(made.q, made.codec, made.table, made.exact, scale, True, None, "auto")
        assert float((out - dense[0]).norm() / dense[0].norm()) < tolerances.CUDA_ATTENTION["float16"]
        assert float((lse - dense[1]).abs().max()) < tolerances.CUDA_LSE
    out, _, step = SparseLayer(SparseSpec(top_k=640, fast=True)).attend(
        made.q, made.codec, made.table, made.exact, scale, True, None, "auto"
    )
    assert step.fast[1].sum(-1).tolist() == [[10, 10], [10, 10]]
    for head in range(2):
        pages = step.fast[1][0, head].nonzero()[:, 0]
        table = PageTable(made.buffer, made.page_table[:1, pages], torch.tensor([640], dtype=torch.int32).cuda(), 640)
        exact = ops.ExactTokens(made.ek[:1], made.ev[:1], made.exact.lengths[:1], made.exact.max_length)
        want = ops.decode_attention(made.q[:1], made.codec, table, exact, scale)[0]
        rows = slice(4 * head, 4 * head + 4)
        error = (out[0, rows] - want[0, rows]).float().norm() / want[0, rows].float().norm()
        assert float(error) < tolerances.CUDA_ATTENTION["float16"]
