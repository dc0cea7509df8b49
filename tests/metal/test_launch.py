"""The shapes of launches: blocks of rows by plan, and inputs that do not change their address space as they grow."""

import json

import numpy as np
import pytest

from forgeattention.backends.metal import attention, plan
from forgeattention.backends.metal.launch import FEWEST, rows_per_block

from .launches import PADDED, SIDES, Recorder, codec, exact, table


def test_blocks_are_of_equal_size_and_fit_in_registers():
    assert [rows_per_block(n, 128) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9)] == [1, 2, 3, 4, 3, 3, 4, 4, 3]
    assert [rows_per_block(n, 512) for n in (1, 2, 3, 8)] == [1, 2, 2, 2]
    with plan.override(8):
        assert rows_per_block(8, 128) == rows_per_block(8, 512) == 8


def test_a_measured_plan_is_kept_by_gpu_and_head_dim(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGEATTENTION_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(plan, "gpu_name", lambda: "Apple M4")
    plan.measured.cache_clear()
    try:
        assert plan.most_rows(128) == 4
        path = plan.keep("Apple M4", {128: 8})
        plan.keep("Apple M4", {512: 1})
        plan.keep("Apple M1", {128: 1})
        assert (plan.most_rows(128), plan.most_rows(512), plan.most_rows(64)) == (8, 1, 4)
        for damage in ("{", "[1]", json.dumps({"Apple M4": {"128": 77}})):
            path.write_text(damage)
            plan.measured.cache_clear()
            assert plan.most_rows(128) == 4
    finally:
        plan.measured.cache_clear()


@pytest.mark.parametrize(("batch", "heads", "rows"), [(1, 1, 1), (2, 1, 3), (9, 2, 4)])
def test_no_input_grows_out_of_constant_memory(batch, heads, rows):
    """Whatever the length, the batch and the number of pages, MLX compiles one kernel."""
    c, forms = codec(SIDES[1], SIDES[1], "fp16", 64, heads), set()
    q = np.zeros((batch, heads * rows, 1, 64), np.float32)
    for pages in (1, 2, 7, 8, 40):
        device, t, recent = Recorder(), table(c, batch, pages), exact(c, batch, 40, "float16")
        attention.decode_attention(q, c, t, recent, 0.1, False, None, device)
        attention.prefill_attention(q, c, t, 0.1, device)
        for launch in device.taken():
            forms.add((launch.kernel, tuple(x.size < FEWEST for x in launch.inputs.values())))
            assert all(launch.inputs[name].size >= FEWEST for name in PADDED if name in launch.inputs)
    assert len(forms) == 3
