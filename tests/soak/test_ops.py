"""Random calls of every op on the native CPU kernels, with NumPy, torch and MLX arrays, against the float64 oracle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import DTYPES, Case
from random_cases import (
    FRAMEWORKS,
    QUIET,
    WORST,
    cases,
    close,
    in_framework,
    lines,
    made_codec,
    seeds,
    specs,
    specs_with,
    tables,
    tokens,
    turned,
)

from forgeattention import ops, reference
from forgeattention.codec import PAGE, Codec
from forgeattention.ops import PageTable, Scores
from forgeattention.ops.arrays import to_numpy
from forgeattention.reference import sparse


def dtype_of(case: Case, framework: str) -> str:
    name = str(case.q.dtype).removeprefix("torch.")
    return "float32" if framework == "numpy" and name == "bfloat16" else name


def decode_attention(data: Any) -> None:
    case, framework = data.draw(cases())
    causal = data.draw(st.booleans()) or case.q.shape[2] == 0
    parts = data.draw(st.sampled_from(["both", "packed", "exact"]))
    if parts == "packed" and case.q.shape[2] > 1:
        causal = False
    sinks = torch.randn(case.q.shape[1]) if data.draw(st.booleans()) else None

    def attend(q: torch.Tensor, framework: str, backend: str) -> Any:
        table, exact = tables(case, framework)
        return ops.decode_attention(
            turned(q, framework),
            case.codec,
            None if parts == "exact" else table,
            None if parts == "packed" else exact,
            case.scale,
            causal=causal,
            sink_logits=turned(sinks, framework),
            backend=backend,
        )

    (out, lse), (want, want_lse) = attend(case.q, framework, "auto"), attend(case.q.float(), "torch", "reference")
    assert tuple(out.shape) == tuple(case.q.shape)
    close(out, want, tolerances.CPU_ATTENTION[dtype_of(case, framework)])
    close(lse, want_lse, tolerances.CPU_LSE)


def prefill_attention(data: Any) -> None:
    case, framework = data.draw(cases())
    table, _ = tables(case, framework)
    out, lse = ops.prefill_attention(turned(case.q, framework), case.codec, table, case.scale)
    want, want_lse = ops.prefill_attention(case.q, case.codec, case.table, case.scale, backend="reference")
    close(out, want, tolerances.CPU_ATTENTION["float32"])
    close(lse, want_lse, tolerances.CPU_LSE)


def merge(data: Any) -> None:
    rng = np.random.default_rng(data.draw(seeds))
    shape = tuple(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4)))
    framework, dim = data.draw(st.sampled_from(FRAMEWORKS)), data.draw(st.integers(1, 40))
    o = [torch.from_numpy(rng.standard_normal((*shape, dim)).astype(np.float32)) for _ in range(2)]
    lse = [torch.from_numpy((rng.standard_normal(shape) * 30).astype(np.float32)) for _ in range(2)]
    for x in lse:
        x[torch.from_numpy(rng.random(shape) < 0.2)] = -torch.inf
    got = ops.merge(*(turned(x, framework) for x in (o[0], lse[0], o[1], lse[1])))
    want = ops.merge(o[0], lse[0], o[1], lse[1], backend="reference")
    for a, b in zip(got, want, strict=True):
        close(a, b, tolerances.MERGE)


def qk_scores(data: Any) -> None:
    case, framework = data.draw(cases())
    got = ops.qk_scores(turned(case.q, framework), case.codec, tables(case, framework)[0], case.scale)
    close(got, ops.qk_scores(case.q, case.codec, case.table, case.scale, backend="reference"), tolerances.CPU_SCORES)


def value_sum(data: Any) -> None:
    case, framework = data.draw(cases())
    rng = np.random.default_rng(data.draw(seeds))
    shape = (*case.q.shape[:3], case.table.max_length)
    p = rng.standard_normal(shape) * rng.choice([0, 1, 1e-4, 1e4], shape[:3])[..., None]
    weights = torch.from_numpy(p.astype(np.float32))
    got = ops.value_sum(turned(weights, framework), case.codec, tables(case, framework)[0])
    want = ops.value_sum(weights, case.codec, case.table, backend="reference")
    for row in range(shape[0]):
        for head in range(shape[1]):
            close(got[row, head], want[row, head], 4 * tolerances.CPU_SUMS)


def decode_pages(data: Any) -> None:
    case, framework = data.draw(cases())
    dtype = data.draw(st.sampled_from(DTYPES if framework != "numpy" else DTYPES[:2]))
    rotated = data.draw(st.booleans())
    got = ops.decode_pages(case.codec, tables(case, framework)[0], dtype=dtype, rotated=rotated)
    want = ops.decode_pages(case.codec, case.table, rotated=rotated, backend="reference")
    for a, b in zip(got, want, strict=True):
        close(a, b, tolerances.CPU_DECODE[dtype] * (2 if case.codec.spec.rotation == "custom" else 1))


def compact(data: Any) -> None:
    rng = np.random.default_rng(data.draw(seeds))
    size, count = 16 * data.draw(st.integers(1, 300)), data.draw(st.integers(0, 9))
    base = torch.from_numpy(rng.integers(0, 256, 10 * size, np.uint8))
    at = torch.from_numpy(rng.integers(0, 9 * size + 1, count))
    framework = data.draw(st.sampled_from(FRAMEWORKS))
    got = ops.compact(turned(base, framework), turned(at, framework), size)
    np.testing.assert_array_equal(to_numpy(got), reference.compact(base.numpy(), at.numpy(), size))


def check_records(records: Any, k: Any, v: Any, codec: Codec) -> None:
    """Records lose as little as the oracle's: with another rounding another code may be taken, which is as good."""
    wanted = reference.encode(to_numpy(k), to_numpy(v), codec)
    found = to_numpy(records).reshape(wanted.shape)
    more = tolerances.ENCODE_LIKE_REFERENCE if codec.spec.refine else tolerances.CPU_ENCODE_PAGE_LOSS
    for x, a, b in zip((k, v), reference.decode_pages(found, codec), reference.decode_pages(wanted, codec)):
        x64 = to_numpy(x).astype(np.float64)
        loss, best = ((a - x64) ** 2).sum(), ((b - x64) ** 2).sum()
        assert loss <= (1 + WORST * more) * best + 1e-12 * (x64**2).sum()


def encode(data: Any) -> None:
    dim, heads = data.draw(st.sampled_from([64, 80])), data.draw(st.integers(1, 2))
    codec = made_codec(data.draw(specs_with(st.booleans())), dim, heads, data.draw(st.booleans()))
    pages = data.draw(st.sampled_from([0, 1, 1, 1, 2]))
    framework = data.draw(st.sampled_from(FRAMEWORKS))
    k, v = tokens(data, heads, pages * PAGE, dim)
    out = turned(torch.full((pages * codec.page_bytes + 32,), 7, dtype=torch.uint8), framework)
    at = turned(16 + torch.arange(pages) * codec.page_bytes, framework)
    ops.encode(turned(k, framework), turned(v, framework), codec, out, at)
    written = to_numpy(out)
    assert (written[:16] == 7).all()
    assert (written[-16:] == 7).all()
    if pages:
        check_records(written[16:-16], k, v, codec)


def encode_rows(data: Any) -> None:
    codec, rows = made_codec(data.draw(specs), 64, 1, False), data.draw(st.integers(0, 3))
    k, v = (x[:, None] for x in tokens(data, rows, PAGE, 64))
    wanted = [data.draw(st.booleans()) for _ in range(rows)]
    offsets = torch.tensor([16 + i * codec.page_bytes if w else -1 for i, w in enumerate(wanted)], dtype=torch.int64)
    framework = data.draw(st.sampled_from(["numpy", "torch"]))
    out = turned(torch.full((rows * codec.page_bytes + 32,), 7, dtype=torch.uint8), framework)
    ops.encode_rows(turned(k, framework), turned(v, framework), codec, out, turned(offsets, framework))
    written = to_numpy(out)
    for i, w in enumerate(wanted):
        record = written[16 + i * codec.page_bytes :][: codec.page_bytes]
        if w:
            check_records(record, k[i], v[i], codec)
        else:
            assert (record == 7).all()


def append_tokens(data: Any) -> None:
    rng = np.random.default_rng(data.draw(seeds))
    rows, heads, capacity, n = (data.draw(st.integers(0, most)) for most in (3, 3, 20, 5))
    dtype = getattr(torch, data.draw(st.sampled_from(DTYPES)))
    buffers = [torch.full((rows, heads, capacity, 8), 7.0).to(dtype) for _ in range(2)]
    new = [torch.from_numpy(rng.standard_normal((rows, n, heads, 8))).to(dtype).transpose(1, 2) for _ in range(2)]
    held = rng.integers(0, capacity + 1, rows).astype(np.int32)
    for backend in ("auto", "reference"):
        to, lengths = [b.clone() for b in buffers], torch.from_numpy(held.copy())
        ops.append_tokens(*to, lengths, *new, backend=backend)
        for row, length in enumerate(held.tolist()):
            fits = length + n <= capacity
            assert int(lengths[row]) == length + n * fits
            for b, x in zip(to, new, strict=True):
                want = torch.full((heads, capacity, 8), 7.0).to(dtype)
                if fits:
                    want[:, length : length + n] = x[row]
                assert torch.equal(b[row], want)


def append_step(data: Any) -> None:
    rng = np.random.default_rng(data.draw(seeds))
    rows, heads, sinks, window = (data.draw(st.integers(0, most)) for most in (3, 2, 5, 40))
    capacity, pages = sinks + window + 2 * PAGE, 4
    encode_at = data.draw(st.integers(sinks + PAGE, capacity - 1))
    to = [torch.from_numpy(rng.standard_normal((rows, heads, capacity, 8)).astype(np.float32)) for _ in range(2)]
    new = [torch.from_numpy(rng.standard_normal((rows, heads, 1, 8)).astype(np.float32)) for _ in range(2)]
    held = rng.integers(0, capacity, rows).astype(np.int32)
    packed = (PAGE * rng.integers(0, pages, rows)).astype(np.int32)
    table = torch.from_numpy(rng.integers(0, 2**40, (rows, pages)))
    exact, coded = torch.from_numpy(held.copy()), torch.from_numpy(packed.copy())
    offsets, tickets = torch.full((rows,), 77, dtype=torch.int64), torch.zeros(rows, dtype=torch.int32)
    before = [x.clone() for x in to]
    ops.append_step(*to, exact, coded, table, offsets, tickets, *new, sinks=sinks, encode_at=encode_at)
    for row in range(rows):
        full = held[row] == capacity - 1
        for old, now, x in zip(before, to, new, strict=True):
            kept = torch.cat([old[row, :, :sinks], old[row, :, sinks + PAGE : held[row]]], 1)
            want = torch.cat([kept if full else old[row, :, : held[row]], x[row]], 1)
            assert torch.equal(now[row, :, : want.shape[1]], want)
        at, page = int(held[row]) + 1 - PAGE * full, int(packed[row]) // PAGE + full
        assert (int(exact[row]), int(coded[row])) == (at, PAGE * page)
        assert int(offsets[row]) == (int(table[row, page]) if at == encode_at and page < pages else -1)


def sparse_scores(data: Any) -> None:
    case, framework = data.draw(cases())
    got = ops.sparse_scores(turned(case.q, framework), case.codec, tables(case, framework)[0], case.scale)
    want = ops.sparse_scores(case.q, case.codec, case.table, case.scale, backend="reference")
    close(got.scores, want.scores, tolerances.CPU_SCORES)
    close(got.pages, sparse.page_statistics(to_numpy(got.scores)), tolerances.SPARSE_MASS)


def page_scores(data: Any) -> None:
    case, framework = data.draw(cases())
    got = ops.page_scores(turned(case.q, framework), case.codec, tables(case, framework)[0], case.scale)
    want = ops.page_scores(case.q, case.codec, case.table, case.scale, backend="reference")
    close(got, want, tolerances.CPU_SCORES)


def scored(data: Any, case: Case) -> Scores:
    rng = np.random.default_rng(data.draw(seeds))
    line = lines(rng, (*case.q.shape[:3], case.table.max_length)).astype(np.float32)
    for row, length in enumerate(case.table.lengths.tolist()):
        line[row, ..., length:] = -np.inf
    pages = sparse.page_statistics(line).astype(np.float32)
    return Scores(torch.from_numpy(line), torch.from_numpy(pages))


def sparse_threshold(data: Any) -> None:
    case, framework = data.draw(cases())
    scores, p, k = scored(data, case), None, None
    if data.draw(st.booleans()):
        p = data.draw(st.sampled_from([0.1, 0.5, 0.9, 0.99, 0.995, 0.9999]))
    else:
        k = data.draw(st.integers(0, 300))
    lse = None
    if data.draw(st.booleans()):
        lse = torch.from_numpy(
            np.random.default_rng(data.draw(seeds)).normal(0, 5, case.q.shape[:3]).astype(np.float32)
        )
    given = {"top_k": k, "top_p": p}
    made = in_framework(scores, framework), tables(case, framework)[0]
    got = ops.sparse_threshold(*made, exact_lse=turned(lse, framework), **given)
    want = ops.sparse_threshold(scores, case.table, exact_lse=lse, backend="reference", **given)
    line = scores.scores.double().numpy()
    keep = sparse.survivors(line, to_numpy(got.score), to_numpy(got.last))
    np.testing.assert_array_equal(keep.sum(-1), to_numpy(got.kept))
    whole = np.exp(line).sum(-1) + (0 if lse is None else np.exp(lse.double().numpy()))
    dropped = np.where(keep, 0, np.exp(line)).sum(-1) / np.where(whole > 0, whole, 1)
    assert np.abs(dropped - to_numpy(got.dropped)).max(initial=0) <= tolerances.SPARSE_MASS
    if k is not None:
        np.testing.assert_array_equal(to_numpy(got.score), to_numpy(want.score))
        np.testing.assert_array_equal(to_numpy(got.last), to_numpy(want.last))
    else:
        assert (dropped <= 1 - p + tolerances.SPARSE_MASS).all()
        assert (np.abs(to_numpy(got.kept) - to_numpy(want.kept)) <= 1).all()


def sparse_attention(data: Any) -> None:
    case, framework = data.draw(cases())
    scores = scored(data, case)
    limits = ops.sparse_threshold(scores, case.table, top_k=data.draw(st.integers(0, 200)), backend="reference")
    other = None
    if data.draw(st.booleans()):
        rng = np.random.default_rng(data.draw(seeds))
        o, lse = rng.standard_normal(case.q.shape), rng.normal(0, 3, case.q.shape[:3])
        other = tuple(torch.from_numpy(x.astype(np.float32)) for x in (o, lse))
    got = ops.sparse_attention(
        in_framework(scores, framework),
        in_framework(limits, framework),
        case.codec,
        tables(case, framework)[0],
        other=None if other is None else tuple(turned(x, framework) for x in other),
    )
    want = ops.sparse_attention(scores, limits, case.codec, case.table, other=other, backend="reference")
    close(got[0], want[0], tolerances.CPU_ATTENTION["float32"])
    close(got[1], want[1], tolerances.CPU_LSE)


def page_select(data: Any) -> None:
    case, framework = data.draw(cases())
    whole = (case.table.lengths + PAGE - 1) // PAGE * PAGE
    most = -(-case.table.max_length // PAGE) * PAGE
    table = PageTable(case.table.base, case.table.page_table, whole.to(torch.int32), most)
    rng = np.random.default_rng(data.draw(seeds))
    means = torch.from_numpy(lines(rng, (*case.q.shape[:3], most // PAGE)).astype(np.float32))
    for row, length in enumerate(whole.tolist()):
        means[row, ..., length // PAGE :] = -torch.inf
    given = {"top_k": data.draw(st.integers(0, 5))} if data.draw(st.booleans()) else {"top_p": 0.7}
    made = PageTable(*(turned(x, framework) for x in (table.base, table.page_table, table.lengths)), most)
    got = ops.page_select(turned(means, framework), case.codec, made, **given)
    want = ops.page_select(means, case.codec, table, backend="reference", **given)
    assert [tuple(a.shape) for a in got] == [tuple(b.shape) for b in want]
    counts, read = to_numpy(got[1]) // PAGE, to_numpy(got[2])
    np.testing.assert_array_equal(read.sum(-1), counts)
    most_apart = 0 if "top_k" in given else 1  # by mass, the last page may be decided by rounding
    assert (np.abs(counts - to_numpy(want[1]) // PAGE) <= most_apart).all()
    # Pages of shares that are equal but for rounding may stand for each other.
    mass = np.exp(means.double().numpy()).reshape(
        len(whole), case.codec.kv_heads, -1 if means.numel() else 0, most // PAGE
    )
    total = mass.sum(-1, keepdims=True)
    share = (mass / np.where(total > 0, total, 1)).max(2, initial=0)
    worst = np.where(read, share, np.inf).min(-1, initial=np.inf)
    best = np.where(read, 0, share).max(-1, initial=0)
    assert (best <= worst + tolerances.SPARSE_MASS).all()


OPS: dict[str, Callable[[Any], None]] = {
    f.__name__: f
    for f in (
        append_step, append_tokens, compact, decode_attention, decode_pages, encode, encode_rows, merge, page_scores,
        page_select, prefill_attention, qk_scores, sparse_attention, sparse_scores, sparse_threshold, value_sum,
    )
}  # fmt: skip


def test_every_op_is_here() -> None:
    assert set(OPS) == set(ops.registry.OPS)


@pytest.mark.parametrize("op", OPS)
def test_op(op: str, number: Callable[[str], int], counts: Counter[str]) -> None:
    @settings(QUIET, max_examples=number("cases"))
    @given(data=st.data())
    def run(data: Any) -> None:
        OPS[op](data)
        counts["cases"] += 1

    run()
