"""Sparse steps through the cache: rules, statistics, fast mode, budgets."""

import hashlib
import json

import numpy as np
import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import make_case, relative

from forgeattention import ops
from forgeattention.cache import LayerCache
from forgeattention.codec import Codec, CodecSpec
from forgeattention.ops import ExactTokens, PageTable
from forgeattention.sparse import Budgets, SparseLayer, SparseSpec
from forgeattention.sparse.budgets import water_fill

SCALE = 0.125
TOLERANCE = tolerances.CPU_ATTENTION["float32"]


def make_cache(tokens=1500, batch=2, own_diagonals=False, wrap=lambda x: x):
    g = torch.Generator().manual_seed(3)
    diagonal = {"k_diagonal": np.exp(0.3 * np.random.default_rng(0).normal(size=(2, 64)))} if own_diagonals else {}
    codec = Codec(CodecSpec(), 64, 2, **diagonal)
    k, v = torch.randn(2, batch, 2, tokens, 64, generator=g)
    k += 2 * torch.randn(batch, 2, 1, 64, generator=g)
    cache = LayerCache.like(wrap(k), codec)
    cache.append(wrap(k), wrap(v))
    return cache, wrap(2 * torch.randn(batch, 6, 1, 64, generator=g))


def reading(cache, sparse):
    """The same tokens in a cache that reads them by other rules."""
    out = LayerCache(cache.codec, 0, cache.arrays, cache.dtype, pool=cache.pool, sparse=sparse)
    out.join(cache)
    return out


def sparse(cache, q, **options):
    cache = reading(cache, SparseLayer(SparseSpec(min_context=0, **options), log=[]))
    out = cache.attend(q, SCALE)
    return *out, cache.sparse.log[0]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: x.numpy()], ids=["torch", "numpy"])
@pytest.mark.parametrize("own_diagonals", [False, True])
@pytest.mark.parametrize(
    "everything", [{"top_k": 9999}, {"top_k": 6400, "fast": True}, {"top_p": 1 - 1e-9, "fast": True}]
)
def test_everything_kept_is_dense(wrap, own_diagonals, everything):
    cache, q = make_cache(own_diagonals=own_diagonals, wrap=wrap)
    dense = cache.attend(q, SCALE)
    out, lse, found = sparse(cache, q, **everything)
    assert relative(out, dense[0]) < TOLERANCE
    assert relative(lse, dense[1]) < tolerances.CPU_LSE
    assert found["kept_tokens"] == 1344
    assert found["dropped_mass"] < tolerances.SPARSE_MASS
    assert found["tiles_skipped"] == found["pages_unread"] == 0


@pytest.mark.parametrize("own_diagonals", [False, True])
def test_fast_is_dense_over_the_best_pages(own_diagonals):
    cache, q = make_cache(own_diagonals=own_diagonals)
    out, _, found = sparse(cache, q, top_k=256, fast=True)
    means = ops.page_scores(q, cache.codec, cache.table, SCALE, backend="reference").reshape(2, 2, 3, -1)
    rank = (means - means.logsumexp(-1, keepdim=True)).amax(2)
    for row, head in np.ndindex(2, 2):
        best = rank[row, head].topk(4).indices
        table = PageTable(
            None, cache.table.page_table[row : row + 1, best], torch.tensor([256], dtype=torch.int32), 256
        )
        exact = cache.exact
        own = ExactTokens(*(x[row : row + 1] for x in (exact.k, exact.v, exact.lengths)), exact.max_length)
        want = ops.decode_attention(q[row : row + 1], cache.codec, table, own, SCALE)[0]
        heads = slice(3 * head, 3 * head + 3)
        assert relative(out[row, heads], want[0, heads]) < TOLERANCE
    pages, record = 2 * 2 * 21, cache.codec.format.record_bytes
    assert found["bytes_read"] == pages * 64 + 2 * 2 * 4 * record
    assert found["bytes_dense"] == pages * record


def test_fast_covers_the_estimated_mass():
    cache, q = make_cache()
    shares = [sparse(cache, q, top_p=p, fast=True)[2] for p in (0.5, 0.9, 0.99)]
    for share, p in zip(shares, (0.5, 0.9, 0.99)):
        assert share["dropped_mass_worst"] < 1.3 * (1 - p)  # of what was read, the estimate is replaced by the truth
    assert shares[0]["bytes_read"] < shares[1]["bytes_read"] < shares[2]["bytes_read"]


def test_sink_logits_take_their_share():
    cache, q = make_cache()
    sinks = torch.randn(6)
    dense = cache.attend(q, SCALE, sink_logits=sinks)
    for options in ({"top_k": 9999}, {"top_k": 6400, "fast": True}):
        cache = reading(cache, SparseLayer(SparseSpec(min_context=0, **options)))
        out, lse = cache.attend(q, SCALE, sink_logits=sinks)
        assert relative(out, dense[0]) < TOLERANCE
        assert relative(lse, dense[1]) < tolerances.CPU_LSE


def test_short_rows_stay_dense_in_any_batch():
    g = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, 2, 2, 1500, 64, generator=g)
    keep = np.ones((2, 1500), bool)
    keep[1, 700:] = False
    cache = LayerCache.like(k, Codec(CodecSpec(), 64, 2))
    cache.append(k, v, keep)
    q = torch.randn(2, 6, 1, 64, generator=g)
    dense = cache.attend(q, SCALE)[0]
    cache = reading(cache, SparseLayer(SparseSpec(top_k=50, min_context=1000)))
    both = cache.attend(q, SCALE)[0]
    assert torch.equal(both[1], dense[1])
    assert not torch.allclose(both[0], dense[0])
    assert cache.fork([1]).attend(q[1:], SCALE)[0].equal(both[1:])
    assert cache.fork([0]).attend(q[:1], SCALE)[0].equal(both[:1])
    cache = reading(cache, SparseLayer(SparseSpec(top_k=50, min_context=2000)))
    assert torch.equal(cache.attend(q, SCALE)[0], dense)
    assert cache.sparse_step is None


def test_statistics():
    cache, q = make_cache()
    _, _, found = sparse(cache, q, top_k=1)
    assert found["kept_tokens"] == 1
    assert found["pages_skipped"] == pytest.approx(20 / 21)
    assert found["tiles_skipped"] == pytest.approx(5 / 6)
    unread, fmt = found["pages_unread"], cache.codec.format
    assert found["bytes_read"] == pytest.approx(84 * (fmt.v_offset + (1 - unread) * (fmt.record_bytes - fmt.v_offset)))
    assert 0 < found["dropped_mass"] <= found["dropped_mass_worst"] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"one of top_k, top_p and budgets; got \[\]"),
        ({"top_k": 1, "top_p": 0.5}, "one of top_k, top_p and budgets"),
        ({"top_k": -1}, "top_k >= 0; got -1"),
        ({"top_p": 1.0}, "0 < top_p < 1; got 1.0"),
        ({"top_k": 65, "fast": True}, "a positive multiple of 64 with fast; got 65"),
        ({"budgets": "x", "fast": True}, "with fast; got budgets"),
        ({"top_k": 1, "min_context": -1}, "min_context >= 0; got -1"),
    ],
)
def test_specs_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=r"\[sparse_spec\] expected .*" + message):
        SparseSpec(**options)


def test_rules_of_the_command_line():
    assert SparseSpec.parse("top_k=1024", min_context=0) == SparseSpec(top_k=1024, min_context=0)
    assert SparseSpec.parse("top_p=0.99,fast") == SparseSpec(top_p=0.99, fast=True)
    assert SparseSpec.parse("budgets=a=b.json").budgets == "a=b.json"
    for wrong in ("top_k", "top_k=", "k=3", "top_k=x", "top_k=64,slow"):
        with pytest.raises(ValueError, match=r"\[sparse_spec\] expected"):
            SparseSpec.parse(wrong)


def test_budgets_are_kept_with_their_model(tmp_path):
    path = tmp_path / "b.json"
    Budgets("me", {3: np.array([5, 0], np.int32)}).save(path)
    assert Budgets.load(path, "me").layers[3].tolist() == [5, 0]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="budgets of model you; got those of me"):
        Budgets.load(path, "you")
    data = json.loads(path.read_text())
    for change in ({"format": "x"}, {"layers": {"3": [-1]}}, {"layers": {"3": [1.5]}}, {"layers": [1]}):
        held = {name: value for name, value in (data | change).items() if name != "sha256"}
        digest = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(held | {"sha256": digest}))
        with pytest.raises(ValueError, match=r"\[budgets\] expected"):
            Budgets.load(path, "me")
    path.write_text(json.dumps(data).replace("[5, 0]", "[5, 1]"))
    with pytest.raises(ValueError, match=r"\[budgets\] expected checksum .* was changed"):
        Budgets.load(path, "me")
    for text in ("{", "[" * 100000, '"x"', "5"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"\[budgets\] expected"):
            Budgets.load(path, "me")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"\[budgets\] expected a file"):
        Budgets.load(path, "me")


@settings(max_examples=40, deadline=None)
@given(heads=st.integers(1, 6), total=st.integers(0, 400), seed=st.integers(0, 2**32 - 1))
def test_water_filling(heads, total, seed):
    """The total is spent, and no exchange of one token between two heads lowers the worse of the two."""
    rng = np.random.default_rng(seed)
    counts = np.arange(101)
    curves = np.cumsum(rng.exponential(size=(heads, 101)) ** 3, 1)[:, ::-1]
    curves /= curves.max()
    budgets = water_fill(curves, counts, total)
    assert budgets.sum() == min(total, 100 * heads)
    assert (budgets >= 0).all()
    now = curves[np.arange(heads), budgets]
    worst = int(now.argmax())
    if budgets[worst] < 100:
        for other in range(heads):
            if other != worst and budgets[other] > 0:
                assert curves[other, budgets[other] - 1] >= now[worst] - 1e-9


def test_budgets_reach_their_layers():
    """Other budgets, other outputs; the numbers kept are the budgets."""
    cache, q = make_cache(batch=1)
    spec = SparseSpec(budgets="given", min_context=0)
    cache = reading(cache, SparseLayer(spec, np.array([0, 1, 5, 100, 64, 2000], np.int32)))
    cache.attend(q, SCALE)
    assert cache.sparse_step.exact[1].kept[0, :, 0].tolist() == [0, 1, 5, 100, 64, 1344]


def test_page_scores():
    for centred in (False, True):
        case = make_case(CodecSpec(), 80, lengths=(150, 0, 320), exact=(9, 9, 9), n=2, centred=centred)
        args = case.q, case.codec, case.table, case.scale
        assert relative(ops.page_scores(*args), ops.page_scores(*args, backend="reference")) < tolerances.CPU_SCORES
