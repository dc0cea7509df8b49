"""append_step and encode_rows: what a decode step in a graph does on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from forgeattention import CodecSpec, ops
from forgeattention.backends import cuda
from forgeattention.codec import PAGE, Codec

SINKS, CAPACITY, PAGES = 3, 3 + 20 + PAGE, 4
HELD = [0, 5, CAPACITY - 1, CAPACITY - 2, 70, CAPACITY - 1]
PACKED = [0, 0, 128, 64, 192, 256]
available, reason = cuda.available()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not available, reason=reason))]


def state(device: str, dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    rows = len(HELD)
    made = {
        "to_k": torch.randn(rows, 2, CAPACITY, 64, generator=g).to(dtype),
        "to_v": torch.randn(rows, 2, CAPACITY, 64, generator=g).to(dtype),
        "exact": torch.tensor(HELD, dtype=torch.int32),
        "packed": torch.tensor(PACKED, dtype=torch.int32),
        "page_table": torch.arange(1, 1 + rows * PAGES).reshape(rows, PAGES) * 1000,
        "encode_offsets": torch.full((rows,), 77, dtype=torch.int64),
        "tickets": torch.zeros(rows, dtype=torch.int32),
        "k": torch.randn(rows, 1, 2, 64, generator=g).to(dtype).transpose(1, 2),
        "v": torch.randn(rows, 1, 2, 64, generator=g).to(dtype).transpose(1, 2),
    }
    return {name: x.to(device) for name, x in made.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("encode_at", [SINKS + PAGE, 71, CAPACITY - 1])
def test_a_step_appends_and_full_rows_give_up_a_page(device: str, dtype: torch.dtype, encode_at: int) -> None:
    made = state(device, dtype)
    before = {name: x.clone().cpu() for name, x in made.items()}
    ops.append_step(*made.values(), sinks=SINKS, encode_at=encode_at)
    after = {name: x.cpu() for name, x in made.items()}
    for row, (held, packed) in enumerate(zip(HELD, PACKED)):
        for to, new in (("to_k", "k"), ("to_v", "v")):
            old = before[to][row]
            left = (
                torch.cat([old[:, :SINKS], old[:, SINKS + PAGE : held]], 1) if held == CAPACITY - 1 else old[:, :held]
            )
            want = torch.cat([left, before[new][row]], 1)
            assert torch.equal(after[to][row, :, : want.shape[1]], want)
        full = held == CAPACITY - 1
        now, pages = held + 1 - PAGE * full, packed // PAGE + full
        assert (int(after["exact"][row]), int(after["packed"][row])) == (now, PAGE * pages)
        due = now == encode_at and pages < PAGES
        assert int(after["encode_offsets"][row]) == (int(before["page_table"][row, pages]) if due else -1)
    assert not after["tickets"].any()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_are_coded_where_their_offsets_say(device: str) -> None:
    codec = Codec(CodecSpec(), 64, 2)
    k, v = torch.randn(2, 4, 2, 100, 64, generator=torch.Generator().manual_seed(1)).to(device)
    part = slice(7, 7 + PAGE)
    pages = torch.zeros(4, codec.page_bytes, dtype=torch.uint8, device=device)
    addresses = [pages[row].data_ptr() for row in range(4)]
    offsets = torch.tensor([addresses[2], -1, addresses[0], -1], device=device)
    ops.encode_rows(k[:, :, part], v[:, :, part], codec, None, offsets)
    want = torch.zeros_like(pages)
    for row, to in ((0, 2), (2, 0)):
        at = torch.tensor([to * codec.page_bytes], device=device)
        ops.encode(k[row, :, part].contiguous(), v[row, :, part].contiguous(), codec, want.view(-1), at)
    assert torch.equal(pages, want)


def test_bad_steps_change_nothing() -> None:
    made = state("cpu", torch.float32)
    before = {name: x.clone() for name, x in made.items()}
    for wrong, options in (
        ({"k": made["k"][:, :1]}, {}),
        ({"v": made["v"].half()}, {}),
        ({"exact": made["exact"].long()}, {}),
        ({"page_table": made["page_table"].int()}, {}),
        ({}, {"encode_at": CAPACITY}),
        ({}, {"encode_at": SINKS + PAGE - 1}),
        ({}, {"sinks": -1}),
    ):
        with pytest.raises(ValueError, match=r"\[append_step\] expected"):
            ops.append_step(*(made | wrong).values(), **({"sinks": SINKS, "encode_at": SINKS + PAGE} | options))
    assert all(np.array_equal(made[name], x) for name, x in before.items())
