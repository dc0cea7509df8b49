"""Numbers at the edges: very large, very small, equal and missing ones, on every backend that runs here."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from ops_cases import ENCODER, relative, tensor

from forgeattention import ops, reference
from forgeattention.codec import PAGE, Codec, CodecSpec
from forgeattention.ops import ExactTokens, PageTable, Scores
from forgeattention.ops.arrays import to_numpy
from forgeattention.reference import sparse

HEADS, GROUP, DIM = 2, 3, 64
SPECS = {
    "balanced": CodecSpec(),
    "small": CodecSpec(2, 2, v_code="trellis8"),
    "scalar, fp16 scales": CodecSpec(4, 4, scales="fp16", refine=False),
    "no mean": CodecSpec(3, 3, key_mean=False, rotation="none", refine=False),
}
BACKENDS = [
    "cpu",
    "reference",
    pytest.param("mlx", marks=pytest.mark.skipif(not importlib.util.find_spec("mlx"), reason="MLX is not installed")),
]


def made(x: np.ndarray, backend: str, dtype: str = "float32") -> Any:
    """A float array for a backend: of MLX, or of torch."""
    if backend != "mlx":
        return tensor(x, dtype)
    import mlx.core as mx

    return mx.array(np.ascontiguousarray(x, np.float32)).astype(getattr(mx, dtype))


def index(x: Any, backend: str) -> Any:
    if backend != "mlx":
        return torch.from_numpy(np.ascontiguousarray(x))
    import mlx.core as mx

    return mx.array(x)


def named(backend: str) -> str:
    return "auto" if backend == "mlx" else backend


def tokens(kind: str, n: int = 2 * PAGE) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [kv_heads, n, head_dim]."""
    rng = np.random.default_rng(3)
    k, v = rng.standard_normal((2, HEADS, n, DIM))
    if kind == "denormal":
        k, v = 1e-40 * k, 1e-40 * v
    elif kind == "a denormal among others":
        k[:, ::7], v[:, ::5] = 1e-41 * k[:, ::7], 1e-41 * v[:, ::5]
    elif kind == "norm 1e4":
        k, v = (1e4 * x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (k, v))
    elif kind == "norm 1e-8":
        k, v = (1e-8 * x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (k, v))
    elif kind == "both norms":
        k[:, ::2], v[:, ::2] = 1e4 * k[:, ::2], 1e4 * v[:, ::2]
        k[:, 1::2], v[:, 1::2] = 1e-8 * k[:, 1::2], 1e-8 * v[:, 1::2]
    elif kind == "identical":
        k[:], v[:] = k[:, :1], v[:, :1]
    elif kind == "one channel":
        k[..., 1:], v[..., 1:] = 0, 0
    elif kind == "zeros":
        k[:], v[:] = 0, 0
    return k.astype(np.float32), v.astype(np.float32)


KINDS = (
    "denormal", "a denormal among others", "norm 1e4", "norm 1e-8", "both norms", "identical", "one channel", "zeros",
)  # fmt: skip


def packed(k: np.ndarray, v: np.ndarray, codec: Codec, backend: str, dtype: str = "float32") -> PageTable:
    pages = k.shape[1] // PAGE
    out = index(np.zeros(pages * codec.page_bytes, np.uint8), backend)
    at = np.arange(pages) * codec.page_bytes
    given = made(k, backend, dtype), made(v, backend, dtype)
    ops.encode(*given, codec, out, index(at, backend), backend=ENCODER if backend == "reference" else named(backend))
    lengths = np.array([pages * PAGE], np.int32)
    return PageTable(out, index(at[None], backend), index(lengths, backend), pages * PAGE)


def on_host(table: PageTable) -> PageTable:
    return PageTable(
        *(torch.from_numpy(to_numpy(x)) for x in (table.base, table.page_table, table.lengths)), table.max_length
    )


def close(got: Any, want: Any, bound: float, floor: float = 0.0) -> None:
    """Equal to `bound` of the largest magnitude; `floor` is what the dtype itself cannot tell from zero."""
    a, b = (to_numpy(x).astype(np.float64) for x in (got, want))
    assert a.shape == b.shape
    assert np.array_equal(np.isfinite(a), np.isfinite(b))
    assert np.array_equal(a[~np.isfinite(a)], b[~np.isfinite(b)])
    fine = np.isfinite(b)
    assert (np.abs(a[fine] - b[fine]) <= bound * np.abs(b[fine]).max(initial=0) + floor).all()


@functools.cache
def coded_by_the_oracle(spec: str, kind: str) -> Any:
    codec = Codec(SPECS[spec], DIM, HEADS)
    return reference.decode_pages(reference.encode(*tokens(kind, PAGE), codec), codec)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_coded_comes_back_as_the_oracle_codes_it(backend: str, spec: str, kind: str) -> None:
    """Each page's error is the oracle's, whatever the magnitude; what comes back is finite."""
    codec = Codec(SPECS[spec], DIM, HEADS)
    k, v = tokens(kind, PAGE)
    got = ops.decode_pages(codec, packed(k, v, codec, backend), backend=named(backend))
    for x, a, b in zip((k, v), got, coded_by_the_oracle(spec, kind), strict=True):
        a64 = to_numpy(a)[0].astype(np.float64)
        assert np.isfinite(a64).all()
        loss, best = ((a64 - x) ** 2).sum(), ((b - x) ** 2).sum()
        assert loss <= (1 + tolerances.ENCODE_LIKE_REFERENCE) * best + 1e-12 * (x.astype(np.float64) ** 2).sum() + 1e-76


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 20])
def test_attention_is_the_oracles(backend: str, kind: str, n: int) -> None:
    codec = Codec(SPECS["balanced"], DIM, HEADS)
    k, v = tokens(kind)
    table = packed(k, v, codec, backend)
    norm = max(np.linalg.norm(k, axis=-1).max(), 1e-6)
    q = np.random.default_rng(4).standard_normal((1, HEADS * GROUP, n, DIM)) * min(1.0, 30 / norm)
    exact_k, exact_v = (x[None, :, : n + 5] for x in (k, v))
    lengths = np.array([n + 5], np.int32)
    exact = ExactTokens(made(exact_k, backend), made(exact_v, backend), index(lengths, backend), n + 5)
    out, lse = ops.decode_attention(made(q, backend), codec, table, exact, 0.125, backend=named(backend))
    plain = ExactTokens(tensor(exact_k), tensor(exact_v), torch.from_numpy(lengths), n + 5)
    want = ops.decode_attention(tensor(q), codec, on_host(table), plain, 0.125, backend="reference")
    close(out, want[0], tolerances.CPU_ATTENTION["float32"], 1e-43)
    close(lse, want[1], tolerances.CPU_LSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["a page", "the exact tokens"])
def test_one_dominating_key(backend: str, where: str) -> None:
    """A score of 600 above all others: its value is the answer, and nothing overflows."""
    codec = Codec(CodecSpec(4, 4, key_mean=False, refine=False), DIM, HEADS)
    k, v = tokens("plain")
    k[:, 70] = 40 * k[:, 70] / np.linalg.norm(k[:, 70], axis=-1, keepdims=True)
    table = packed(k, v, codec, backend)
    decoded = to_numpy(ops.decode_pages(codec, table, backend=named(backend))[1])[0]
    exact_k, exact_v = k[None, :, 64:73].copy(), v[None, :, 64:73].copy()
    if where == "a page":
        exact_k[:, :, 6] = 0
    else:
        exact_k[:, :, 6] *= 2
    q = np.repeat(k[:, 70:71], GROUP, 0)[None] * 3
    lengths = index(np.array([9], np.int32), backend)
    exact = ExactTokens(made(exact_k, backend), made(exact_v, backend), lengths, 9)
    out, lse = ops.decode_attention(made(q, backend), codec, table, exact, 0.125, causal=False, backend=named(backend))
    value = decoded[:, 70] if where == "a page" else v[:, 70]
    assert relative(to_numpy(out)[0, :, 0], np.repeat(value, GROUP, 0)) < tolerances.CPU_ATTENTION["float32"]
    assert (to_numpy(lse) > 500).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("held", [0, 1, 64])
def test_contexts_around_the_size_of_a_page(backend: str, length: int, held: int) -> None:
    """With tokens behind the row's end that are not numbers."""
    codec = Codec(SPECS["balanced"], DIM, HEADS)
    k, v = tokens("plain", 3 * PAGE)
    table = packed(k, v, codec, backend)
    lengths = index(np.array([length], np.int32), backend)
    table = PageTable(table.base, table.page_table, lengths, 3 * PAGE)
    exact_k, exact_v = k[None, :, :70].copy(), v[None, :, :70].copy()
    exact_k[:, :, held:] = exact_v[:, :, held:] = np.nan
    exact = ExactTokens(
        *(made(x, backend) for x in (exact_k, exact_v)), index(np.array([held], np.int32), backend), held
    )
    q = np.random.default_rng(4).standard_normal((1, HEADS * GROUP, 1, DIM))
    out, lse = ops.decode_attention(made(q, backend), codec, table, exact, 0.125, causal=False, backend=named(backend))
    pk, pv = (to_numpy(x)[0] for x in ops.decode_pages(codec, table, backend=named(backend)))
    every_k, every_v = (np.concatenate([a[:, :length], b[0, :, :held]], 1) for a, b in ((pk, exact_k), (pv, exact_v)))
    from forgeattention.reference.attention import attention

    want, want_lse = attention(q[0], every_k, every_v, 0.125)
    close(to_numpy(out)[0], want, tolerances.CPU_ATTENTION["float32"])
    close(to_numpy(lse)[0], want_lse, tolerances.CPU_LSE)
    if not length + held:
        assert not to_numpy(out).any()
        assert np.isneginf(to_numpy(lse)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masses_of_nothing(backend: str) -> None:
    """-inf wherever a log-sum-exp or a sink's logit may be, alone and together."""
    none = np.full((2, 3), -np.inf, np.float32)
    o, lse = np.ones((2, 3, 8), np.float32), np.zeros((2, 3), np.float32)
    for (a, b), want in (((none, none), -np.inf), ((none, lse), 0.0), ((lse, none), 0.0)):
        parts = (
            made(o * np.isfinite(a)[..., None], backend),
            made(a, backend),
            made(o * np.isfinite(b)[..., None], backend),
            made(b, backend),
        )
        out, joint = (to_numpy(x) for x in ops.merge(*parts, backend=named(backend)))
        assert (joint == want).all()
        assert (out == float(np.isfinite(want))).all()
    codec = Codec(SPECS["balanced"], DIM, HEADS)
    k, v = tokens("plain")
    table = packed(k, v, codec, backend)
    q = made(np.random.default_rng(4).standard_normal((1, HEADS * GROUP, 1, DIM)), backend)
    sinks = made(np.full(HEADS * GROUP, -np.inf), backend)
    plain = ops.decode_attention(q, codec, table, None, 0.125, causal=False, backend=named(backend))
    with_sinks = ops.decode_attention(
        q, codec, table, None, 0.125, causal=False, sink_logits=sinks, backend=named(backend)
    )
    for a, b in zip(plain, with_sinks, strict=True):
        close(a, b, tolerances.MERGE)
    empty = PageTable(table.base, table.page_table, index(np.zeros(1, np.int32), backend), PAGE)
    out, lse = ops.decode_attention(
        q, codec, empty, None, 0.125, causal=False, sink_logits=sinks, backend=named(backend)
    )
    assert not to_numpy(out).any()
    assert np.isneginf(to_numpy(lse)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_edges_of_half_precision(backend: str, dtype: str) -> None:
    """Numbers at both ends of a dtype as exact values, whose sum float32 has to hold, and as packed ones."""
    info = torch.finfo(getattr(torch, dtype))
    codec = Codec(SPECS["balanced"], DIM, HEADS)
    k, v = tokens("plain")
    table = packed(k, v, codec, backend, dtype)
    edges = np.array([info.max / 16, -info.max / 16, info.tiny, -info.tiny, info.smallest_normal / 2, 0.0, 1.0, -1.0])
    exact_v = np.broadcast_to(np.tile(edges, DIM // 8), (1, HEADS, 8, DIM))
    exact_k = np.broadcast_to(k[None, :, :1], (1, HEADS, 8, DIM))
    lengths = np.array([8], np.int32)
    exact = ExactTokens(made(exact_k, backend, dtype), made(exact_v, backend, dtype), index(lengths, backend), 8)
    q = made(np.ones((1, HEADS * GROUP, 1, DIM)), backend, dtype)
    out, _ = ops.decode_attention(q, codec, None, exact, 0.125, causal=False, backend=named(backend))
    want = to_numpy(exact.v)[:, :, :1].astype(np.float64).repeat(GROUP, 1)
    got = to_numpy(out).astype(np.float64)
    assert (np.abs(got - want) <= tolerances.CPU_ATTENTION[dtype] * np.abs(want) + 2 * info.smallest_normal).all()
    scaled = v * float(info.max) / 2**20 if dtype == "float16" else v * 2.0**55
    table = packed(k, scaled, codec, backend, dtype)
    back = to_numpy(ops.decode_pages(codec, table, backend=named(backend))[1])[0]
    assert ((back - scaled) ** 2).sum() < tolerances.PRESET_ERROR["balanced"][1] * (scaled**2).sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", ["rows", "queries", "tokens"])
def test_arrays_without_elements(backend: str, empty: str) -> None:
    """A batch of no rows, rows without queries, tables without tokens: the result is empty, or of nothing."""
    codec = Codec(SPECS["balanced"], DIM, HEADS)
    rows, n, most = int(empty != "rows"), int(empty != "queries"), PAGE * int(empty != "tokens")
    k, v = tokens("plain", PAGE)
    base = packed(k, v, codec, backend).base
    table = PageTable(
        base,
        index(np.zeros((rows, most // PAGE), np.int64), backend),
        index(np.full(rows, most, np.int32), backend),
        most,
    )
    q = made(np.ones((rows, HEADS * GROUP, n, DIM)), backend)
    how = {"backend": named(backend)}
    shape = (rows, HEADS * GROUP, n)
    held = made(np.ones((rows, HEADS, 3, DIM)), backend)
    exact = ExactTokens(held, held, index(np.full(rows, 3, np.int32), backend), 3)
    for out, lse in (
        ops.decode_attention(q, codec, table, exact, 0.125, **how),
        ops.decode_attention(q, codec, table, None, 0.125, causal=False, **how),
        ops.decode_attention(q, codec, None, exact, 0.125, **how),
        ops.prefill_attention(q, codec, table, 0.125, **how),
    ):
        assert (tuple(out.shape), tuple(lse.shape)) == ((*shape, DIM), shape)
    scores = ops.qk_scores(q, codec, table, 0.125, **how)
    assert tuple(scores.shape) == (*shape, most)
    assert tuple(ops.value_sum(scores, codec, table, **how).shape) == (*shape, DIM)
    assert not to_numpy(ops.value_sum(scores * 0, codec, table, **how)).any()
    found = ops.sparse_scores(q, codec, table, 0.125, **how)
    assert isinstance(found, Scores)
    assert tuple(found.pages.shape) == (*shape, most // PAGE, 2)
    limits = ops.sparse_threshold(found, table, top_k=3, **how)
    assert int(to_numpy(limits.kept).sum()) == 3 * rows * n * HEADS * GROUP * (most > 0)
    out, lse = ops.sparse_attention(found, limits, codec, table, **how)
    assert (tuple(out.shape), tuple(lse.shape)) == ((*shape, DIM), shape)
    means = ops.page_scores(q, codec, table, 0.125, **how)
    assert tuple(means.shape) == (*shape, most // PAGE)
    offsets, counts, read = ops.page_select(means, codec, table, top_k=2, **how)
    assert tuple(offsets.shape) == (rows, HEADS, min(2, most // PAGE))
    assert not to_numpy(counts).any()
    assert tuple(read.shape) == (rows, HEADS, most // PAGE)
    for x in ops.decode_pages(codec, table, **how):
        assert tuple(x.shape) == (rows, HEADS, most, DIM)
    if empty == "tokens":
        none = made(k[:, :0], backend), made(v[:, :0], backend)
        ops.encode(*none, codec, base, index(np.zeros(0, np.int64), backend), **how)
        assert tuple(ops.compact(base, index(np.zeros(0, np.int64), backend), 16, **how).shape) == (0, 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 0.995])
def test_the_dropped_mass_is_what_is_dropped(backend: str, p: float) -> None:
    """Of scores at 4 bits, where page sums and single tokens round otherwise: kept, dropped and bound fit together."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        codec = Codec(CodecSpec(4, 4, rotation="planar", refine=False, scales="fp16"), DIM, HEADS)
        k, v = (rng.standard_normal((HEADS, 5 * PAGE, DIM)).astype(np.float32) for _ in range(2))
        table = packed(k, v, codec, backend)
        q = made(rng.standard_normal((1, HEADS * GROUP, 2, DIM)) * rng.choice([0.01, 1, 4]), backend)
        scores = ops.sparse_scores(q, codec, table, 0.125, backend=named(backend))
        limits = ops.sparse_threshold(scores, table, top_p=p, backend=named(backend))
        line = to_numpy(scores.scores).astype(np.float64)
        keep = sparse.survivors(line, to_numpy(limits.score), to_numpy(limits.last))
        np.testing.assert_array_equal(keep.sum(-1), to_numpy(limits.kept))
        mass = np.exp(line - line.max(-1, keepdims=True))
        dropped = np.where(keep, 0, mass).sum(-1) / mass.sum(-1)
        assert np.abs(dropped - to_numpy(limits.dropped)).max() <= tolerances.SPARSE_MASS
        assert (dropped <= 1 - p + tolerances.SPARSE_MASS).all()
