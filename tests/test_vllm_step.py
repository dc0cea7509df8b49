"""The vLLM backend's tables without vLLM: every token is attended exactly once, as packed or as exact."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgeattention.codec import PAGE, CodecSpec
from forgeattention.codec.presets import PRESETS
from forgeattention.integrations.vllm.settings import Settings
from forgeattention.integrations.vllm.step import Exact, Layout, Pages, Step

BYTES = 1000
"""Of a page in these tests; only an offset's unit."""


@dataclass
class Engine:
    """Blocks as vLLM hands them out: a token is (row, position); packed and exact blocks come from one pool."""

    layout: Layout
    random: np.random.Generator
    free: list[int]
    exact: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    pages: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    packed_table: dict[int, list[int]] = field(default_factory=dict)
    exact_table: dict[int, list[int]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)

    def take(self) -> int:
        return self.free.pop(int(self.random.integers(len(self.free))))

    def step(self, news: dict[int, int]) -> None:
        """Rows' numbers of new tokens, those with one first."""
        layout, b = self.layout, self.layout.exact_block
        rows = sorted(news, key=lambda row: news[row] != 1)
        slots = []
        for row in rows:
            past, length = self.lengths.get(row, 0), self.lengths.get(row, 0) + news[row]
            held = self.exact_table.setdefault(row, [])
            # The window's blocks before the step; block 0 is vLLM's null block.
            for i in range(layout.sink_blocks, max(past - layout.window - PAGE + 1, 0) // b):
                if held[i]:
                    self.free.append(held[i])
                    held[i] = 0
            held += [self.take() for _ in range(-(-length // b) - len(held))]
            table = self.packed_table.setdefault(row, [])
            table += [self.take() for _ in range(-(-length // (PAGE * layout.pages_per_block)) - len(table))]
            slots += [held[i // b] * b + i % b for i in range(past, length)]
            self.lengths[row] = length
        tables = [
            np.zeros((len(rows), max(map(len, t.values()))), np.int64) for t in (self.packed_table, self.exact_table)
        ]
        for table, known in zip(tables, (self.packed_table, self.exact_table)):
            for i, row in enumerate(rows):
                table[i, : len(known[row])] = known[row]
        starts = np.cumsum([0, *(news[row] for row in rows)])
        lengths = np.array([self.lengths[row] for row in rows])
        step = Step.make(layout, starts, lengths, *tables, torch.tensor(slots))
        self.write(step, rows, news)
        self.check(step, rows, news)

    def write(self, step: Step, rows: list[int], news: dict[int, int]) -> None:
        tokens = [(row, i) for row in rows for i in range(self.lengths[row] - news[row], self.lengths[row])]
        assert step.tokens == len(tokens)
        for token, block, slot in zip(tokens, step.blocks.tolist(), step.slots.tolist(), strict=True):
            self.exact[block, slot] = token
        read = [
            self.exact[block, slot] for block in step.encode_ids.tolist() for slot in range(self.layout.exact_block)
        ]
        for i, offset in enumerate(step.encode_offsets.tolist()):
            self.pages[offset] = read[i * PAGE : (i + 1) * PAGE]

    def attended(self, pages: Pages | None, exact: Exact | None, row: int) -> tuple[list, list]:
        packed, plain = [], []
        if pages is not None:
            left = int(pages.lengths[row])
            for offset in pages.offsets[row].tolist():
                packed += self.pages[offset][: min(left, PAGE)] if left > 0 else []
                left -= PAGE
        if exact is not None:
            read = [(block, slot) for block in exact.ids[row].tolist() for slot in range(self.layout.exact_block)]
            plain = [self.exact[at] for at in read[: int(exact.lengths[row])]]
        return packed, plain

    def check(self, step: Step, rows: list[int], news: dict[int, int]) -> None:
        ones = [row for row in rows if news[row] == 1]
        assert step.rows == len(ones)
        cases = [(row, *self.attended(step.pages, step.exact, i), 1) for i, row in enumerate(ones)]
        for row, chunk in zip(rows[len(ones) :], step.chunks, strict=True):
            assert chunk.stop - chunk.start == news[row]
            cases.append((row, *self.attended(chunk.pages, chunk.exact, 0), 0))
        for row, packed, plain, own in cases:
            past = self.lengths[row] - news[row]
            want = Counter((row, i) for i in range(past + own))
            assert Counter(packed) + Counter(plain) == want
            whole = max(past - self.layout.window, 0) // PAGE * PAGE
            assert sorted(i for _, i in packed) == list(range(min(self.layout.sinks, whole), whole))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_token_is_attended_once(data: st.DataObject) -> None:
    b = data.draw(st.sampled_from([4, 8, 32, 64]))
    per_block = data.draw(st.sampled_from([1, 2, 5]))
    window = data.draw(st.sampled_from([0, 64, 128]))
    sinks = data.draw(st.integers(0, 64 // b)) if b < 64 else data.draw(st.integers(0, 1))
    layout = Layout(window, BYTES, per_block, per_block * BYTES + 24, b, sinks)
    engine = Engine(layout, np.random.default_rng(data.draw(st.integers(0, 9))), list(range(1, 4000)))
    alive, born = [0, 1, 2], 3
    for _ in range(data.draw(st.integers(1, 12))):
        chosen = [row for row in alive if data.draw(st.booleans())]
        news = {row: data.draw(st.sampled_from([1, 1, 1, 2, 63, 64, 65, 200, 330])) for row in chosen}
        if news:
            engine.step(news)
        if data.draw(st.integers(0, 4)) == 0:
            # A sequence ends: its blocks are others' soon, with what they hold.
            gone = alive.pop(0)
            for table in (engine.packed_table, engine.exact_table):
                engine.free += [block for block in table.pop(gone, []) if block]
            engine.lengths.pop(gone, None)
            alive.append(born)
            born += 1


def test_settings_are_read_and_checked() -> None:
    read = Settings.read({"forgeattention": {"preset": "small", "k_bits": 3, "sinks": 0, "window": 128}})
    assert read.spec == CodecSpec(k_bits=3, v_bits=2, v_code="trellis8", sinks=0, window=128)
    assert Settings.read({}) == Settings.read({"forgeattention": {}}) == Settings.read({"other": 1}) == Settings()
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
