import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import METAL

from forgeattention.backends import metal, reference

from .cases import FORMATS, HEAD_DIMS, Emulator, make_codec, make_table, queries, relative_error

SCALE = 0.3


def top_k(scores, k):
    """Threshold and last position of each query's k largest scores, the earlier of equal ones first; and a mask."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, order[..., :k], True, -1)
    if min(k, scores.shape[-1]) == 0:
        return np.full(scores.shape[:-1], np.inf, np.float32), np.full(scores.shape[:-1], -1, np.int32), chosen
    at = order[..., min(k, scores.shape[-1]) - 1]
    return np.take_along_axis(scores, at[..., None], -1)[..., 0], at.astype(np.int32), chosen


def check(rng, codec, lengths, k, group=2, n=1, q=None):
    table = make_table(rng, codec, lengths)
    q = queries(rng, codec, len(lengths), group, n) if q is None else q
    device = Emulator()
    scores, tile_max = metal.sparse_scores(q, codec, table, SCALE, device)
    want = reference.qk_scores(q, codec, table, SCALE)
    assert relative_error(scores, want) < METAL["float32"]
    for tile in range(tile_max.shape[-1]):
        assert (tile_max[..., tile] == scores[..., 256 * tile : 256 * (tile + 1)].max(-1)).all()

    threshold, last, chosen = top_k(scores, k)
    out, lse = metal.sparse_attention(scores, tile_max, threshold, last, codec, table, device)
    kept = np.where(chosen, scores.astype(np.float64), -np.inf)
    top = kept.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(kept - np.where(np.isfinite(top), top, 0))
    total = p.sum(-1, keepdims=True)
    weights = np.where(total > 0, p / np.where(total > 0, total, 1), 0)
    with np.errstate(divide="ignore"):
        want_lse = np.where(total > 0, np.log(total) + top, -np.inf)[..., 0]
    assert relative_error(out, reference.value_sum(weights, codec, table)) < METAL["float32"]
    assert relative_error(lse, want_lse) < METAL["float32"]
    return device


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


@pytest.mark.parametrize("position", [0, 300, 1030])
def test_tiles_without_survivors_are_not_read(position):
    """One survivor: only its page's values, and the headers and scales of its tile, are read."""
    rng = np.random.default_rng(8)
    codec, device = make_codec(kv_heads=1), Emulator()
    table = make_table(rng, codec, [1031])
    scores = np.zeros((1, 1, 1, 1031), np.float32)
    scores[..., position] = 1
    tile_max = np.array([scores[0, 0, 0, 256 * i : 256 * (i + 1)].max() for i in range(5)], np.float32)[
        None, None, None
    ]
    threshold, last, _ = top_k(scores, 1)
    out, _ = metal.sparse_attention(scores, tile_max, threshold, last, codec, table, device)
    _, v = reference.decode_pages(codec, table, "float64", False)
    assert relative_error(out[0, 0, 0], v[0, 0, position]) < METAL["float32"]
    tokens = min(256, 1031 - position // 256 * 256)
    pages = -(-tokens // 64)
    headers = 32 * (pages if pages == 4 else 1)
    if v[0, 0, position].any():  # a token of zero scale has no weight
        assert device.bytes_read["base"] == codec.format.v_code_bytes + headers + 2 * tokens
    assert device.bytes_read["scores"] == 4 * tokens


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 700), min_size=1, max_size=8), k=st.integers(0, 400), seed=st.integers(0, 2**32 - 1)
)
def test_any_lengths(lengths, k, seed):
    check(np.random.default_rng(seed), make_codec(kv_heads=1), lengths, k, group=1)
