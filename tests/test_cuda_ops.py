"""CUDA kernels against the float64 oracle, on a GPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tolerances
from cuda_cases import CASES, Case

from forgeattention import ops, reference
from forgeattention.backends.cuda import nvrtc
from forgeattention.codec import Codec, packing
from forgeattention.ops.table import ExactTokens, PageTable

available, reason = nvrtc.available()
pytestmark = pytest.mark.skipif(not available, reason=reason)
torch = pytest.importorskip("torch")
KV = 2


def make_codec(case: Case, mu: bool = False) -> Codec:
    rng = np.random.default_rng(7)
    extra = {}
    if case.rotation == "custom":
        for side in "kv":
            extra[f"{side}_matrix"] = np.eye(case.head_dim) + 0.3 / math.sqrt(case.head_dim) * rng.standard_normal(
                (KV, case.head_dim, case.head_dim)
            )
    if case.diagonal:
        extra["k_diagonal"] = np.exp(0.5 * rng.standard_normal((KV, case.head_dim)))
    if mu:
        extra |= {f"{side}_mu": rng.standard_normal((KV, case.head_dim)) for side in "kv"}
    return case.codec(KV, **extra)


class Setup:
    """Rows of packed pages, scattered in one buffer, and exact tokens, on the GPU and decoded in float64."""

    def __init__(self, case: Case, lengths: list[int], exact: list[int], mu: bool = False, seed: int = 0) -> None:
        self.case, self.codec = case, make_codec(case, mu)
        self.lengths, self.exact_lengths = lengths, exact
        g = torch.Generator("cuda").manual_seed(seed)
        d, pages = case.head_dim, [-(-n // 64) for n in lengths]
        total, most = sum(pages), max(*pages, 1)
        self.buffer = torch.zeros(total * self.codec.page_bytes + 64, dtype=torch.uint8, device="cuda")
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        offsets = torch.full((len(lengths), most), -1, dtype=torch.int64)
        at = 0
        for row, count in enumerate(pages):
            offsets[row, :count] = order[at : at + count] * self.codec.page_bytes + 16
            at += count
        self.page_table = offsets.cuda()
        k, v = (torch.randn(KV, 64 * total, d, generator=g, device="cuda") for _ in range(2))
        k = k * torch.exp(0.3 * torch.randn(KV, 64 * total, 1, generator=g, device="cuda")) + 2 * torch.randn(
            KV, 1, d, generator=g, device="cuda"
        )
        used = [int(offsets[r, i]) for r, c in enumerate(pages) for i in range(c)]
        if total:
            ops.encode(k, v, self.codec, self.buffer, torch.tensor(used).cuda())
        top = max(lengths)
        self.table = PageTable(self.buffer, self.page_table, torch.tensor(lengths, dtype=torch.int32).cuda(), top)
        dtype = getattr(torch, case.exact_dtype)
        cap = max(*exact, 1) + 3
        self.ek, self.ev = (torch.randn(len(exact), KV, cap, d, generator=g, device="cuda").to(dtype) for _ in range(2))
        self.exact = ExactTokens(self.ek, self.ev, torch.tensor(exact, dtype=torch.int32).cuda(), max(exact))
        q = torch.randn(len(lengths), KV * case.group, case.n, d, generator=g, device="cuda")
        self.q = (q * 1.5).to(getattr(torch, case.dtype))

    def expected(self, causal: bool = True, sink: object = None) -> tuple[object, object]:
        k, v = (x.double() for x in ops.decode_pages(self.codec, self.table, backend="cuda"))
        q = self.q.double()
        n, scale = self.case.n, 1 / math.sqrt(self.case.head_dim)
        out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=torch.float64, device="cuda")
        for row, (length, recent) in enumerate(zip(self.lengths, self.exact_lengths, strict=True)):
            keys = torch.cat([k[row, :, :length], self.ek[row, :, :recent].double()], 1).repeat_interleave(
                self.case.group, 0
            )
            values = torch.cat([v[row, :, :length], self.ev[row, :, :recent].double()], 1).repeat_interleave(
                self.case.group, 0
            )
            s = scale * q[row] @ keys.transpose(1, 2)
            if causal:
                hidden = torch.arange(s.shape[2], device="cuda") >= s.shape[2] - (
                    n - 1 - torch.arange(n, device="cuda")[:, None]
                )
                s = s.masked_fill(hidden, -math.inf)
            if sink is not None:
                s = torch.cat([s, sink.double()[:, None, None].expand(-1, n, 1)], 2)
                values = torch.cat([values, torch.zeros_like(values[:, :1])], 1)
            if s.shape[2]:
                lse[row] = torch.logsumexp(s, 2)
                out[row] = torch.nan_to_num(torch.softmax(s, 2)) @ values
        return out, lse

    def run(self, causal: bool = True, sink: object = None, q: object = None) -> tuple[object, object]:
        scale = 1 / math.sqrt(self.case.head_dim)
        return ops.decode_attention(
            self.q if q is None else q, self.codec, self.table, self.exact, scale, causal=causal, sink_logits=sink
        )

    def check(self, causal: bool = True, sink: object = None, limit: float = 0.0, lse_limit: float = 0.0) -> None:
        (out, lse), (want, want_lse) = self.run(causal, sink), self.expected(causal, sink)
        assert out.dtype == self.q.dtype
        assert torch.isfinite(out).all()
        norm = want.flatten(0, 2).norm(dim=1)
        error = (out.double() - want).flatten(0, 2).norm(dim=1)
        lse_limit = lse_limit or tolerances.CUDA_LSE
        limit = limit or tolerances.CUDA_ATTENTION[self.case.dtype]
        worst = float((error / norm.clamp_min(1e-3)).max())
        assert float(error.norm() / norm.norm()) < limit, (float(error.norm() / norm.norm()), worst)
        assert worst < 4 * limit
        finite = torch.isfinite(want_lse)
        assert torch.equal(torch.isfinite(lse), finite)
        assert float((lse.double() - want_lse)[finite].abs().max()) < lse_limit


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_pages_and_encode(case: Case) -> None:
    """Pages that the GPU wrote are read alike by the oracle, and lose no more than the oracle's own pages."""
    codec = make_codec(case, mu=True)
    rng = np.random.default_rng(3)
    k, v = rng.standard_normal((2, KV, 64, case.head_dim)) * np.exp(0.4 * rng.standard_normal((2, KV, 64, 1)))
    k += 3 * rng.standard_normal((KV, 1, case.head_dim))
    v[:, 5] = 0
    kt, vt = (torch.from_numpy(x).cuda().to(getattr(torch, case.dtype)) for x in (k, v))
    k, v = (x.double().cpu().numpy() for x in (kt, vt))
    buffer = torch.zeros(codec.page_bytes, dtype=torch.uint8, device="cuda")
    ops.encode(kt, vt, codec, buffer, torch.zeros(1, dtype=torch.int64, device="cuda"))
    mine = buffer.cpu().numpy().reshape(1, KV, -1)
    oracle = reference.encode(k, v, codec)
    fmt = codec.format
    for h in range(KV):
        a, b = packing.split_record(mine[0, h], fmt), packing.split_record(oracle[0, h], fmt)
        for side, bits, code in (("k", fmt.k_bits, fmt.k_code), ("v", fmt.v_bits, fmt.v_code)):
            if code != "scalar":
                continue
            x, y = (packing.unpack_codes(p[side], fmt.padded_dim, bits, side) for p in (a, b))
            assert (x != y).mean() < tolerances.CUDA_CODES_DIFFER
    mine_kv, oracle_kv = reference.decode_pages(mine, codec), reference.decode_pages(oracle, codec)
    # Errors count as the codec weighs channels.
    weights = 1.0 if codec.k_transform.diagonal is None else codec.k_transform.diagonal[:, None, : case.head_dim]
    for got, best, x, weight in zip(mine_kv, oracle_kv, (k, v), (weights, 1.0), strict=True):
        loss, least = ((weight * (got - x)) ** 2).sum(), ((weight * (best - x)) ** 2).sum()
        assert loss < least * (1 + tolerances.CUDA_ENCODE_LOSS)
    table = PageTable(
        buffer, torch.zeros(1, 1, dtype=torch.int64).cuda(), torch.tensor([61], dtype=torch.int32).cuda(), 61
    )
    for dtype in ("float32",):
        for got, want in zip(ops.decode_pages(codec, table, dtype=dtype), mine_kv, strict=True):
            scale = np.abs(want).max()
            assert np.abs(got[0].double().cpu().numpy() - want[:, :61]).max() / scale < tolerances.CUDA_DECODE[dtype]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_attention(case: Case) -> None:
    Setup(case, [64 * 37 + 11, 1, 640, 0, 129], [196, 140, 8, 33, 9]).check()


@pytest.mark.parametrize(
    "case", [CASES[0], CASES[1], Case(group=7, k_code="trellis8"), Case(head_dim=64, group=16)], ids=str
)
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 511, 8192 + 17, 64 * 2000])
def test_lengths(case: Case, length: int) -> None:
    Setup(case, [length], [133]).check()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_sums_and_prefill(case: Case) -> None:
    setup = Setup(case, [64 * 9 + 5, 1, 0, 128], [9, 9, 9, 9], mu=True)
    k, v = (x.double().repeat_interleave(case.group, 1) for x in ops.decode_pages(setup.codec, setup.table))
    q, scale = setup.q.double(), 1 / math.sqrt(case.head_dim)
    want = scale * q @ k.transpose(2, 3)
    beyond = torch.arange(want.shape[3], device="cuda") >= setup.table.lengths[:, None, None, None]
    got = ops.qk_scores(setup.q, setup.codec, setup.table, scale)
    assert torch.equal(torch.isinf(got), beyond.expand_as(got))
    known = ~beyond.expand_as(got)
    assert float((got.double() - want)[known].abs().max() / want[known].abs().max()) < tolerances.CUDA_SCORES

    weights = torch.randn(want.shape, device="cuda")
    got = ops.value_sum(weights, setup.codec, setup.table)
    sums = weights.double().masked_fill(beyond, 0) @ v
    assert float((got.double() - sums).norm() / sums.norm()) < tolerances.CUDA_SCORES

    out, lse = ops.prefill_attention(setup.q, setup.codec, setup.table, scale)
    masked = want.masked_fill(beyond, -math.inf)
    expected = torch.nan_to_num(torch.softmax(masked, 3)) @ v
    assert float((out.double() - expected).norm() / expected.norm()) < tolerances.CUDA_PREFILL
    assert torch.equal(torch.isinf(lse), torch.isinf(torch.logsumexp(masked, 3)))
    assert float((lse.double() - torch.logsumexp(masked, 3)).nan_to_num().abs().max()) < tolerances.CUDA_PREFILL_LSE


@pytest.mark.parametrize("lengths", [[64 * 330 + 5], [5000, 1100, 70, 0]], ids=str)
@pytest.mark.parametrize(
    "case",
    [Case(n=512, k_code="trellis8"), Case(head_dim=64, group=3, n=512, diagonal=True, dtype="bfloat16")],
    ids=str,
)
def test_prefill_of_whole_chunks(case: Case, lengths: list[int]) -> None:
    """Chunks that cuDNN may take, over parts of every size and more parts than one launch joins."""
    setup = Setup(case, lengths, [1] * len(lengths), mu=True)
    scale = 1 / math.sqrt(case.head_dim)
    out, lse = ops.prefill_attention(setup.q, setup.codec, setup.table, scale)
    k, v = ops.decode_pages(setup.codec, setup.table)
    for row, length in enumerate(lengths):
        keys, values = (x[row, :, :length].double().repeat_interleave(case.group, 0) for x in (k, v))
        s = scale * setup.q[row].double() @ keys.transpose(1, 2)
        want = torch.nan_to_num(torch.softmax(s, 2)) @ values
        assert float((out[row].double() - want).norm()) <= tolerances.CUDA_PREFILL * float(want.norm())
        want_lse = torch.logsumexp(s, 2)
        assert torch.equal(torch.isinf(lse[row]), torch.isinf(want_lse))
        assert float((lse[row].double() - want_lse).nan_to_num().abs().max()) < tolerances.CUDA_PREFILL_LSE


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dim", [64, 80, 512])
def test_merge(dtype: str, dim: int) -> None:
    o1 = torch.randn(2, 5, 3, dim, device="cuda").to(getattr(torch, dtype)).transpose(1, 2)
    o2 = torch.randn(2, 3, 5, dim, device="cuda")
    lse1, lse2 = 4 * torch.randn(2, 2, 3, 5, device="cuda")
    lse1[0, 0] = lse2[0, 1] = lse1[1, 2, 3] = lse2[1, 2, 3] = -math.inf
    got, lse = ops.merge(o1, lse1, o2, lse2)
    want, want_lse = ops.merge(o1.double(), lse1.double(), o2.double(), lse2.double())
    assert got.dtype == o1.dtype
    assert torch.equal(torch.isinf(lse), torch.isinf(want_lse))
    assert float((lse - want_lse).nan_to_num().abs().max()) < tolerances.CUDA_MERGE_LSE
    assert float((got.double() - want).abs().max() / want.abs().max()) < tolerances.CUDA_MERGE[dtype]


def test_no_exact_tokens_and_nothing_at_all() -> None:
    setup = Setup(Case(k_code="trellis8"), [300, 0, 70], [0, 0, 0])
    setup.check(causal=False)
    out, lse = setup.run(causal=False)
    assert (out[1] == 0).all()
    assert (lse[1] == -math.inf).all()
    out, lse = ops.decode_attention(setup.q, setup.codec, None, None, 0.1, causal=False)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("n", [1, 3])
def test_sink_logits_mu_and_full_mask(n: int) -> None:
    setup = Setup(Case(n=n, k_code="trellis4", dtype="float32"), [1000, 64], [150, 20], mu=True)
    sink = torch.linspace(-2, 9, KV * 4, device="cuda")
    setup.check(sink=sink)
    setup.check(causal=False)


@pytest.mark.parametrize("case", [CASES[1], Case(head_dim=64, group=7)], ids=str)
def test_a_row_does_not_depend_on_its_batch(case: Case) -> None:
    setup = Setup(case, [5000, 64, 0, 1300, 9000], [130, 170, 12, 140, 131])
    out, lse = setup.run()
    for row in range(5):
        table = PageTable(
            setup.buffer, setup.page_table[row : row + 1], setup.table.lengths[row : row + 1], setup.lengths[row]
        )
        exact = ExactTokens(
            setup.ek[row : row + 1],
            setup.ev[row : row + 1],
            setup.exact.lengths[row : row + 1],
            setup.exact_lengths[row],
        )
        alone, alone_lse = ops.decode_attention(setup.q[row : row + 1], setup.codec, table, exact, case.head_dim**-0.5)
        assert torch.equal(alone[0], out[row])
        assert torch.equal(alone_lse[0], lse[row])


def test_repeated_runs_and_graph_replay_are_identical() -> None:
    """Lengths are read on the device: a captured launch follows them."""
    setup = Setup(CASES[1], [4000, 700], [150, 160])
    first = setup.run()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        setup.run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        out, lse = setup.run()
    for _ in range(3):
        graph.replay()
        assert torch.equal(out, first[0])
        assert torch.equal(lse, first[1])
    setup.table.lengths.copy_(torch.tensor([130, 65]))
    setup.exact.lengths.copy_(torch.tensor([9, 150]))
    setup.lengths, setup.exact_lengths = [130, 65], [9, 150]
    graph.replay()
    assert (
        float((out.double() - setup.expected()[0]).norm() / setup.expected()[0].norm())
        < tolerances.CUDA_ATTENTION["float16"]
    )


def test_strides_and_absolute_addresses() -> None:
    setup = Setup(CASES[1], [777, 64], [150, 20])
    want = setup.run()
    q = torch.zeros(2, 1, KV * 4, 128 + 8, dtype=setup.q.dtype, device="cuda")[..., :128]
    q.copy_(setup.q.transpose(1, 2))
    absolute = PageTable(None, setup.page_table + setup.buffer.data_ptr(), setup.table.lengths, setup.table.max_length)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (setup.ek, setup.ev))
    exact = ExactTokens(k, v, setup.exact.lengths, setup.exact.max_length)
    got = ops.decode_attention(q.transpose(1, 2), setup.codec, absolute, exact, 128**-0.5)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_peaked_scores() -> None:
    """One key takes nearly all mass, and a token of large mass has a small value."""
    setup = Setup(Case(dtype="float32", exact_dtype="float32"), [64 * 50], [130])
    setup.q *= 12
    setup.check(limit=tolerances.CUDA_PEAKED, lse_limit=tolerances.CUDA_PEAKED)


def test_encode_reports_values_lazily() -> None:
    from forgeattention.backends.cuda.pages import encode_failed

    codec = CASES[0].codec(KV)
    buffer = torch.zeros(codec.page_bytes, dtype=torch.uint8, device="cuda")
    k = torch.randn(KV, 64, 128, device="cuda", dtype=torch.float16)
    at = torch.zeros(1, dtype=torch.int64, device="cuda")
    ops.encode(k, k, codec, buffer, at)
    assert not encode_failed(None)
    k[1, 3, 7] = math.nan
    ops.encode(k, k, codec, buffer, at)
    assert encode_failed(None)
    assert not encode_failed(None)
