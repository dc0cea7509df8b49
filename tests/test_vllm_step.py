"""The tables of a paged engine's step without vLLM: every token is attended exactly once, as packed or as exact."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_engine import Batch, Engine

from forgeattention.codec import PAGE, CodecSpec
from forgeattention.codec.presets import PRESETS
from forgeattention.integrations.vllm.past import Past
from forgeattention.integrations.vllm.settings import Settings
from forgeattention.ops.page_tables import Geometry, PageTables, page_tables

BYTES = 1000
"""Of a page in these tests; only an offset's unit."""
Token = tuple[int, int]


class Memory:
    """What lies in the blocks: names of tokens."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.pages: dict[int, list[Token]] = {}
        self.exact: dict[int, Token] = {}

    def run(self, batch: Batch) -> None:
        g, rows = self.engine.geometry, self.engine.rows
        tables = page_tables(g, batch.starts, batch.lengths, batch.packed_table, batch.exact_table, batch.decode_rows)
        new = [
            name
            for i, number in enumerate(batch.rows)
            for name in rows[number].names[len(rows[number].names) - int(batch.starts[i + 1] - batch.starts[i]) :]
        ]
        before = dict(self.exact)
        for name, slot in zip(new, batch.slots.tolist(), strict=True):
            if slot >= g.exact_block:
                self.exact[slot] = name
        for offset, tokens in zip(tables.fill_offsets.tolist(), tables.fill_tokens.tolist(), strict=True):
            if offset >= 0:
                self.pages[offset] = [new[t] if t >= 0 else before[-1 - t] for t in tokens]
        for i, number in enumerate(batch.rows):
            self.check(tables, i, number, int(batch.starts[i + 1] - batch.starts[i]), i < batch.decode_rows)

    def check(self, tables: PageTables, i: int, number: int, new: int, decodes: bool) -> None:
        """A row's packed and exact tokens are all its tokens, each once, but for new ones that it attends directly."""
        g, row = self.engine.geometry, self.engine.rows[number]
        past = len(row.names) - new
        packed: list[Token] = []
        for page, offset in enumerate(tables.page_table[i].tolist()):
            left = int(tables.packed[i]) - page * PAGE
            packed += self.pages[offset][: min(left, PAGE)] if left > 0 else []
        slots = [int(block) * g.exact_block + at for block in tables.blocks[i] for at in range(g.exact_block)]
        plain = [self.exact[slot] for slot in slots[: int(tables.exact[i])]]
        assert len(plain) == tables.exact[i] <= g.most_exact(new)
        seen = past + (new if decodes else 0)
        assert Counter(packed) + Counter(plain) == Counter(row.names[:seen])
        whole = max(g.first_kept(past), min(row.shared, past // PAGE * PAGE))
        assert Counter(packed) == Counter(row.names[min(g.sinks, whole) : whole])


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_token_is_attended_once(data: st.DataObject) -> None:
    b = data.draw(st.sampled_from([4, 8, 32, 64]))
    per_block = data.draw(st.sampled_from([1, 2, 5]))
    window = data.draw(st.sampled_from([0, 64, 128]))
    sinks = data.draw(st.integers(0, 64 // b))
    decode_tokens = data.draw(st.sampled_from([1, 1, 3]))
    geometry = Geometry(window, BYTES, per_block, per_block * BYTES + 24, b, sinks)
    random = np.random.default_rng(data.draw(st.integers(0, 9)))
    engine = Engine(geometry, random, 6000, decode_tokens)
    memory = Memory(engine)
    alive = [engine.add() for _ in range(3)]
    for _ in range(data.draw(st.integers(1, 12))):
        chosen = [row for row in alive if data.draw(st.booleans())]
        sizes = st.sampled_from([decode_tokens] * 3 + [2, 63, 64, 65, 200, 330])
        news = {row: data.draw(sizes) for row in chosen}
        if news:
            memory.run(engine.step(news, decode_tokens))
        event = data.draw(st.integers(0, 5))
        if event == 0:
            # A sequence ends: its blocks are others' soon, with what they hold.
            engine.end(alive.pop(0))
            alive.append(engine.add())
        if event == 1:
            # Another begins with the same tokens as far as a whole block of pages reaches.
            parent = data.draw(st.sampled_from(alive))
            block = PAGE * per_block
            length = len(engine.rows[parent].names) // block * block
            if length:
                alive.append(engine.hit(parent, length))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_past_of_chunks_is_every_token_once(data: st.DataObject) -> None:
    """Pages of the past, a few at a time, hold a row's packed tokens, then its exact ones."""
    geometry = Geometry(data.draw(st.sampled_from([0, 64, 128])), BYTES, 1, BYTES, 8, data.draw(st.integers(0, 2)))
    engine = Engine(geometry, np.random.default_rng(data.draw(st.integers(0, 9))), 6000, 1)
    memory = Memory(engine)
    rows = [engine.add() for _ in range(4)]
    sizes = st.sampled_from([1, 2, 63, 64, 65, 200, 330])
    for _ in range(data.draw(st.integers(1, 5))):
        memory.run(engine.step({row: data.draw(sizes) for row in rows if data.draw(st.booleans())} or {rows[0]: 70}))
    parent = max(rows, key=lambda row: len(engine.rows[row].names))
    rows.append(engine.hit(parent, len(engine.rows[parent].names) // PAGE * PAGE))
    batch = engine.step({row: data.draw(sizes) for row in rows})
    if batch.decode_rows == len(rows):
        return
    made = page_tables(geometry, batch.starts, batch.lengths, batch.packed_table, batch.exact_table, batch.decode_rows)
    arrays = {name: torch.from_numpy(getattr(made, name)) for name in ("page_table", "packed", "blocks", "exact")}
    step = SimpleNamespace(
        decode_rows=batch.decode_rows,
        rows=len(rows),
        starts=torch.from_numpy(batch.starts).int(),
        starts_host=batch.starts,
        lengths_host=batch.lengths,
    )
    most = data.draw(st.sampled_from([1, 3, 100]))
    past = Past(step, SimpleNamespace(geometry=geometry, **arrays), most)
    seen: dict[int, list[Token]] = {row: [] for row in batch.rows[batch.decode_rows :]}
    for piece in past.pieces:
        assert piece.pages <= most
        pages: list[list[Token | None]] = [[None] * PAGE for _ in range(piece.pages + 1)]
        for i in range(piece.pages):
            for at in range(int(piece.lengths[i])):
                pages[i][at] = memory.pages[int(piece.page_table[i, 0])][at]
        to = zip(piece.blocks.tolist(), piece.places.tolist(), piece.to_pages.tolist(), piece.to_places.tolist())
        for block, place, page, at in to:
            if page < piece.pages:
                assert pages[page][at] is None
                pages[page][at] = memory.exact[block * geometry.exact_block + place]
        for i, row in enumerate(seen):
            used = int(piece.used[i])
            assert used <= piece.most_used
            held = [token for page in piece.table[i, : -(-used // PAGE)] for token in pages[int(page)]]
            assert None not in held[:used]
            seen[row] += held[:used]
    for i, row in enumerate(seen):
        new = int(np.diff(batch.starts)[batch.decode_rows + i])
        names = engine.rows[row].names
        assert Counter(seen[row]) == Counter(names[: len(names) - new])


def test_a_chunk_takes_exact_blocks_for_its_last_tokens_only() -> None:
    geometry = Geometry(64, BYTES, 1, BYTES, 8, 1)
    engine = Engine(geometry, np.random.default_rng(0), 2000, slack=1)
    row = engine.add()
    engine.step({row: 8000})
    # One block of sinks, and tokens 7,935 // 64 * 64 = 7,872 up to 8,000.
    assert sum(block > 0 for block in engine.rows[row].exact) == 1 + (8000 - 7872) // 8


def test_settings_are_read_and_checked() -> None:
    read = Settings.read({"forgeattention": {"preset": "small", "k_bits": 3, "sinks": 0, "window": 128}})
    assert read.spec == CodecSpec(k_bits=3, v_bits=2, v_code="trellis8", sinks=0, window=128)
    assert Settings.read({}) == Settings.read({"forgeattention": {}}) == Settings.read({"other": 1}) == Settings()
    assert (
        Settings.read({}, "small").preset == Settings.read({"forgeattention": {"sinks": 8}}, "small").preset == "small"
    )
    with pytest.raises(ValueError, match="expected preset 'small'"):
        Settings.read({"forgeattention": {"preset": "balanced"}}, "small")
    for given_, named in [
        ({"bits": 3}, "settings among"),
        ({"preset": "tiny"}, "preset in"),
        ({"k_bits": 5}, "k_bits in"),
        ({"window": 100}, "window a multiple of 64"),
        ({"window": -64}, "window >= 0"),
        ({"sinks": 65}, "sinks <= 64"),
        ({"sinks": True}, "sinks >= 0"),
        ({"fit": 1}, "fit true or false"),
        ([], "settings among"),
    ]:
        with pytest.raises(ValueError, match=named):
            Settings.read({"forgeattention": given_})


@pytest.mark.parametrize("name", list(PRESETS))
def test_settings_of_a_spec(name: str) -> None:
    assert Settings.of(PRESETS[name]).spec.k_bits == PRESETS[name].k_bits
    with pytest.raises(ValueError, match="a preset, perhaps with other bits"):
        Settings.of(CodecSpec(rotation="none"))
