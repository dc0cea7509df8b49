"""A paged engine's step on a GPU: tables equal those of the reference, and what is attended is what was appended."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tolerances
from cuda_cases import Case
from paged_engine import Batch, Engine

from forgeattention import ops
from forgeattention.backends.cuda import nvrtc
from forgeattention.codec import PAGE
from forgeattention.ops.page_tables import Blocks, Geometry, fills, page_tables
from forgeattention.ops.table import PageTable

available, reason = nvrtc.available()
pytestmark = pytest.mark.skipif(not available, reason=reason)
torch = pytest.importorskip("torch")
KV = 2
DECODE = [
    Case(dtype="bfloat16", exact_dtype="bfloat16", k_code="trellis8"),
    Case(group=6, dtype="bfloat16", exact_dtype="bfloat16"),
    Case(head_dim=64, group=7, n=3),
    Case(head_dim=96, group=1, rotation="none", dtype="float32", exact_dtype="float32"),
    Case(head_dim=256, group=4, n=2, dtype="bfloat16", exact_dtype="bfloat16"),
]


def error(got: Any, want: Any) -> float:
    return float((got.double() - want).norm() / want.norm())


def on_gpu(x: Any, dtype: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(x)).to("cuda", dtype)


def filled(batch: Batch, geometry: Geometry, tables: Any) -> None:
    from forgeattention.backends.cuda import paged

    assert isinstance(tables, paged.Tables)
    starts, lengths, packed, exact = (
        on_gpu(x, torch.int32) for x in (batch.starts, batch.lengths, batch.packed_table, batch.exact_table)
    )
    tables.make(starts, lengths, packed, exact, batch.decode_rows)


@pytest.mark.parametrize("seed", range(12))
def test_tables_are_those_of_the_reference(seed: int) -> None:
    from forgeattention.backends.cuda import paged

    rng = np.random.default_rng(seed)
    b = int(rng.choice([4, 8, 32, 64]))
    per_block, decode_tokens = int(rng.choice([1, 2, 5])), int(rng.choice([1, 3]))
    geometry = Geometry(
        int(rng.choice([0, 64, 128])), 1008, per_block, per_block * 1008 + 16, b, int(rng.integers(0, 64 // b + 1))
    )
    engine = Engine(geometry, rng, 20000, decode_tokens)
    tables = paged.Tables(geometry, 16, 4096, 8192, decode_tokens, torch.device("cuda", 0))
    alive = [engine.add() for _ in range(5)]
    for i in range(12):
        news = {row: int(rng.choice([decode_tokens, decode_tokens, 2, 63, 64, 65, 330])) for row in alive}
        batch = engine.step(news, decode_tokens)
        filled(batch, geometry, tables)
        want = page_tables(
            geometry, batch.starts, batch.lengths, batch.packed_table, batch.exact_table, batch.decode_rows
        )
        rows = len(batch.rows)
        assert np.array_equal(tables.packed[:rows].cpu(), want.packed)
        assert np.array_equal(tables.exact[:rows].cpu(), want.exact)
        offsets, blocks = tables.page_table.cpu().numpy(), tables.blocks.cpu().numpy()
        for r in range(rows):
            pages, held = -(-want.packed[r] // PAGE), -(-want.exact[r] // b)
            assert np.array_equal(offsets[r, :pages], want.page_table[r, :pages])
            assert np.array_equal(blocks[r, :held], want.blocks[r, :held])
        count = fills(rows, int(batch.starts[-1]))
        assert np.array_equal(tables.fill_offsets[:count].cpu(), want.fill_offsets)
        used = want.fill_offsets >= 0
        assert np.array_equal(tables.fill_tokens[:count].cpu().numpy()[used], want.fill_tokens[used])
        if i % 3 == 2:
            parent = alive[int(rng.integers(len(alive)))]
            length = len(engine.rows[parent].names) // (PAGE * per_block) * PAGE * per_block
            if length:
                alive.append(engine.hit(parent, length))
                engine.end(alive.pop(0))


class Run:
    """One layer of an engine on the GPU."""

    def __init__(self, case: Case, geometry: Geometry, engine: Engine, rows: int) -> None:
        from forgeattention.backends.cuda import paged

        self.paged, self.case, self.engine, self.codec = paged, case, engine, case.codec(KV)
        device, dtype, d = torch.device("cuda", 0), getattr(torch, case.exact_dtype), case.head_dim
        count = len(engine.free) + 1
        self.pages = torch.zeros(count * geometry.block_bytes, dtype=torch.uint8, device=device)
        self.tokens = torch.full((count, geometry.exact_block, KV, 2 * d), math.nan, dtype=dtype, device=device)
        self.blocks = Blocks(self.codec, self.pages, self.tokens)
        self.tables = paged.Tables(geometry, rows, 4096, 8192, case.n, device)
        self.staging = torch.full((2, KV, PAGE * fills(rows, 4096), d), math.nan, dtype=dtype, device=device)
        sizes = paged.scratch_sizes(
            self.codec, KV * case.group, rows, case.n, 8192, geometry.most_exact(case.n), device
        )
        kinds = torch.float32, torch.int32, torch.float32
        self.scratch = paged.Scratch(*(torch.zeros(n, dtype=kind, device=device) for n, kind in zip(sizes, kinds)))
        self.generator = torch.Generator("cuda").manual_seed(1)
        self.given: dict[tuple[int, int], Any] = {}  # keys and values of every token

    def random(self, *shape: int) -> Any:
        return torch.randn(*shape, generator=self.generator, device="cuda").to(self.tokens.dtype)

    def append(self, batch: Batch) -> tuple[Any, Any]:
        """Appends random tokens: keys and values as slices of one tensor, as an engine has them."""
        g, tokens = self.engine.geometry, int(batch.starts[-1])
        both = self.random(tokens, 2 * KV + 1, self.case.head_dim)
        key, value = both[:, 1 : 1 + KV], both[:, 1 + KV :]
        filled(batch, g, self.tables)
        slots = on_gpu(batch.slots, torch.int64)
        count = fills(len(batch.rows), tokens)
        self.paged.append(self.blocks, self.tables, key, value, slots, count, self.staging)
        names = [name for i, row in enumerate(batch.rows) for name in self.newest(row, np.diff(batch.starts)[i])]
        self.given |= {name: (key[i], value[i]) for i, name in enumerate(names)}
        return key, value

    def newest(self, row: int, count: int) -> list[tuple[int, int]]:
        names = self.engine.rows[row].names
        return names[len(names) - int(count) :]

    def attend(self, rows: int) -> tuple[Any, Any]:
        """q [tokens, q_heads, head_dim] as an engine has it, and the output in the same order."""
        n, heads = self.case.n, KV * self.case.group
        q = self.random(rows * n, heads, self.case.head_dim).to(getattr(torch, self.case.dtype))
        out = torch.empty_like(q)
        shape = rows, n, heads, self.case.head_dim
        four = [x.view(shape).transpose(1, 2) for x in (q, out)]
        scale = self.case.head_dim**-0.5
        self.paged.decode_attention(four[0], self.blocks, self.tables, scale, None, 8192, four[1], self.scratch)
        return q, out

    def expected(self, q: Any, rows: int) -> Any:
        """Float64 attention over what the tables name."""
        n, heads, d, group = self.case.n, KV * self.case.group, self.case.head_dim, self.case.group
        lengths = self.tables.packed[:rows]
        table = PageTable(self.pages, self.tables.page_table[:rows], lengths, int(lengths.max()))
        k, v = (x.double() for x in ops.decode_pages(self.codec, table, backend="cuda"))
        out = torch.zeros(rows, n, heads, d, dtype=torch.float64, device="cuda")
        for r in range(rows):
            held = self.tokens[self.tables.blocks[r].long()].reshape(-1, KV, 2 * d)[: int(self.tables.exact[r])]
            keys = torch.cat([k[r, :, : lengths[r]], held[..., :d].transpose(0, 1).double()], 1)
            values = torch.cat([v[r, :, : lengths[r]], held[..., d:].transpose(0, 1).double()], 1)
            keys, values = (x.repeat_interleave(group, 0) for x in (keys, values))
            for i in range(n):
                seen = keys.shape[1] - (n - 1 - i)
                s = torch.einsum("hd,htd->ht", q.view(rows, n, heads, d)[r, i].double(), keys[:, :seen]) * d**-0.5
                out[r, i] = torch.einsum("ht,htd->hd", s.softmax(-1), values[:, :seen])
        return out.view(q.shape)


@pytest.mark.parametrize("case", DECODE, ids=str)
@pytest.mark.parametrize("window", [0, 64])
def test_attention_is_over_what_was_appended(case: Case, window: int) -> None:
    rng = np.random.default_rng(3)
    record = case.codec(KV).page_bytes
    geometry = Geometry(window, record, 1, record, 8, 1)
    engine = Engine(geometry, rng, 1000, case.n)
    run = Run(case, geometry, engine, 8)
    alive = [engine.add() for _ in range(5)]
    sizes = [1500, 40, 63, 700, 320]
    run.append(engine.step(dict(zip(alive, sizes)), case.n))
    for _ in range(70 // case.n):
        batch = engine.step(dict.fromkeys(alive, case.n), case.n)
        key, value = run.append(batch)
        q, out = run.attend(len(alive))
        # The last new token of every row is in the exact blocks.
        slots = on_gpu(batch.slots, torch.int64)
        flat = run.tokens.view(-1, KV, 2 * case.head_dim)
        assert torch.equal(flat[slots], torch.cat([key, value], -1))
    want = run.expected(q, len(alive))
    assert error(out, want) < tolerances.CUDA_ATTENTION[case.dtype]
    # Pages hold what `ops.encode` makes of their tokens: of whole chunks, of a chunk and decoded ones, of decoded ones.
    for number, page in ((0, 3), (0, 22), (2, 0), (2, 1), (3, 10)):
        row = engine.rows[alive[number]]
        names = row.names[page * PAGE : (page + 1) * PAGE]
        if page == 0:
            names = [*names[8:], *names[-8:]]
        k, v = (torch.stack([run.given[name][side] for name in names], 1) for side in range(2))
        page_bytes = torch.zeros(record, dtype=torch.uint8, device="cuda")
        ops.encode(k, v, run.codec, page_bytes, torch.zeros(1, dtype=torch.int64, device="cuda"))
        at = row.packed[page] * record
        assert torch.equal(run.pages[at : at + record], page_bytes)


def test_a_captured_step_follows_the_tables() -> None:
    """A graph replayed with other tables, lengths and tokens gives what the same step gives outside of a graph."""
    case = DECODE[0]
    rng = np.random.default_rng(5)
    record = case.codec(KV).page_bytes
    geometry = Geometry(64, record, 1, record, 8, 1)
    engine = Engine(geometry, rng, 1000, 1)
    run = Run(case, geometry, engine, 8)
    alive = [engine.add() for _ in range(4)]
    run.append(engine.step(dict(zip(alive, [600, 62, 1, 190]))))
    d, heads = case.head_dim, KV * case.group
    starts, lengths = (torch.zeros(n, dtype=torch.int32, device="cuda") for n in (5, 4))
    packed, exact = (torch.zeros(4, 2000, dtype=torch.int32, device="cuda") for _ in range(2))
    slots = torch.zeros(4, dtype=torch.int64, device="cuda")
    key, value = run.random(4, KV, d), run.random(4, KV, d)
    q, out = run.random(4, heads, d), torch.zeros(4, heads, d, dtype=torch.bfloat16, device="cuda")

    other = torch.zeros_like(run.pages)  # as if of another layer with the same tokens
    encoder = run.paged.LayerEncoder([run.blocks, Blocks(run.codec, other, run.tokens)], run.tables)

    def step(together: bool) -> None:
        run.tables.make(starts, lengths, packed, exact, 4, fill_exact=together)
        staging = None if together else run.staging
        run.paged.append(run.blocks, run.tables, key, value, slots, fills(4, 4), staging)
        if together:
            encoder.encode()
        four = [x.unsqueeze(2) for x in (q, out)]
        run.paged.decode_attention(four[0], run.blocks, run.tables, d**-0.5, None, 8192, four[1], run.scratch)

    def load(batch: Batch) -> None:
        starts.copy_(on_gpu(batch.starts, torch.int32))
        lengths.copy_(on_gpu(batch.lengths, torch.int32))
        for to, table in ((packed, batch.packed_table), (exact, batch.exact_table)):
            to[:, : table.shape[1]] = on_gpu(table, torch.int32)
        slots.copy_(on_gpu(batch.slots, torch.int64))

    step(True)  # with nothing in the tables: every row is empty
    other.copy_(run.pages)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(True)
    for _ in range(70):
        batch = engine.step(dict.fromkeys(alive, 1))
        load(batch)
        for x in (key, value, q):
            x.copy_(run.random(*x.shape))
        graph.replay()
        replayed, pages = out.clone(), run.pages.clone()
        assert torch.equal(other, run.pages)
        step(False)
        assert torch.equal(replayed, out)
        assert torch.equal(pages, run.pages)
    want = run.expected(q, 4)
    assert error(out, want) < tolerances.CUDA_ATTENTION[case.dtype]
