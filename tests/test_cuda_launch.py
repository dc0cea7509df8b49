"""Launchers of the CUDA kernels on a machine without a GPU: what they pass fits the kernels' tables.

Kernels, device and stream are stand-ins, and the tensors lie in the host's memory. Packing is the real one, which
refuses a member that is missing or unknown.
"""

from __future__ import annotations

import ctypes
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from forgeattention.backends.cuda import attention, launch, nvrtc, paged, pages, plans, prefill, scores, sparse  # noqa: E402
from forgeattention.backends.cuda.params import STRUCTS  # noqa: E402
from forgeattention.codec import PAGE, Codec, CodecSpec  # noqa: E402
from forgeattention.codec.presets import PRESETS  # noqa: E402
from forgeattention.ops import ExactTokens, PageTable, Scores, Threshold  # noqa: E402
from forgeattention.ops.page_tables import Geometry  # noqa: E402

LAUNCHES = dict[str, list[dict[str, Any]]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> LAUNCHES:
    """By kernel, the values that its launches were told, by their paths."""
    seen: LAUNCHES = {}

    class Kernel:
        def __init__(self, stem: str) -> None:
            self.stem = stem

        def launch(self, grid: tuple[int, int, int], threads: int, stream: int, packed: int) -> None:
            assert len(grid) == 3
            assert min(grid) > 0
            assert 0 < threads <= 1024
            params = STRUCTS[self.stem]
            data = ctypes.string_at(ctypes.c_void_p.from_address(packed).value, params.size)
            told = {leaf.path: struct.unpack_from("=" + leaf.code, data, leaf.offset)[0] for leaf in params.leaves}
            seen.setdefault(self.stem, []).append(told)

    modules = (attention, launch, pages, prefill, scores, sparse, paged)
    stand_ins = {
        "limits": lambda device: plans.Limits(),
        "on_device": lambda device: nullcontext(),
        "current_device": lambda: None,
        "current_stream": lambda device: 0,
        "counters": lambda device, stream, count: 0x1000,
        "partials": lambda device, stream, count: 0x2000,
    }
    for module in modules:
        for name, value in stand_ins.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(nvrtc, "kernel", lambda stem, macros, device, shared: Kernel(stem))
    monkeypatch.setattr(launch, "_constants", {})
    monkeypatch.setattr(attention, "_merge_kernel", lambda dim, dtype, device: Kernel("merge"))
    return seen


def test_every_member_is_told(launches: LAUNCHES) -> None:
    codec = Codec(CodecSpec(), 64, 2)
    base = torch.zeros(8 * codec.page_bytes, dtype=torch.uint8)
    offsets = torch.arange(8).reshape(2, 4) * codec.page_bytes
    table = PageTable(base, offsets, torch.tensor([200, 64], dtype=torch.int32), 200)
    k, v = torch.randn(2, 2, 2, 20, 64)
    exact = ExactTokens(k, v, torch.tensor([9, 20], dtype=torch.int32), 20)
    q = torch.randn(2, 6, 1, 64)
    sinks = torch.zeros(6)
    out, lse = attention.decode_attention(q, codec, table, exact, 0.125, True, sinks)
    attention.decode_attention(q, codec, None, exact, 0.125, True, None)
    attention.decode_attention(q, codec, table, None, 0.125, False, None)
    first, packed_only = launches["decode_attention"][0], launches["decode_attention"][2]
    assert first["q"] == q.data_ptr()
    assert first["page_table"] == offsets.data_ptr()
    assert first["exact_v"] == v.data_ptr()
    assert first["sink_logits"] == sinks.data_ptr()
    assert first["out"] == out.data_ptr()
    assert first["lse"] == lse.data_ptr()
    assert (first["max_pages"], first["max_length"], first["kv_heads"], first["group"]) == (4, 200, 2, 3)
    assert [first[f"k_stride[{i}]"] for i in range(3)] == list(k.stride()[:3])
    assert packed_only["exact_k"] == packed_only["sink_logits"] == 0

    attention.merge(q, q[..., 0], q + 1, q[..., 0])
    scores.qk_scores(q, codec, table, 0.125)
    scores.value_sum(torch.rand(2, 6, 1, 200), codec, table)
    pages.decode_pages(codec, table, "float16", True)
    pages.compact(base, offsets[0].contiguous(), codec.page_bytes)
    pages.append_tokens(k, v, exact.lengths, k[:, :, :1], v[:, :, :1])
    found = sparse.sparse_scores(q, codec, table, 0.125)
    threshold = sparse.sparse_threshold(found, table, 5, None, None)
    sparse.sparse_attention(Scores(found.scores, found.pages), Threshold(*vars(threshold).values()), codec, table, None)
    means = sparse.page_scores(q, codec, table, 0.125)
    sparse.page_select(means, codec, table, 2, None, None)
    wanted = {
        *("decode_attention", "merge", "qk_scores", "value_sum", "decode_pages", "compact", "append_tokens"),
        *("sparse_scores", "sparse_threshold", "sparse_attention", "page_scores", "page_select"),
    }
    assert set(launches) == wanted
    assert all(x["page_table"] == offsets.data_ptr() for name in ("qk_scores", "value_sum") for x in launches[name])
    assert launches["sparse_scores"][0]["pages"] == -(-200 // PAGE)


def test_steps_tell_what_a_first_launch_tells(launches: LAUNCHES) -> None:
    """From the third call on arguments lie ready; whatever changes between calls must reach the kernel all the same."""
    codec, other = (Codec(CodecSpec(seed=seed), 64, 2) for seed in (1, 2))
    base = torch.zeros(8 * codec.page_bytes, dtype=torch.uint8)
    page_table = torch.arange(8).reshape(2, 4) * codec.page_bytes
    tables = [PageTable(base, page_table, torch.tensor([200, 64], dtype=torch.int32), most) for most in (200, 256)]
    k, v = torch.randn(2, 2, 2, 64, 64)
    lengths = torch.tensor([9, 20], dtype=torch.int32)
    exact = ExactTokens(k, v, lengths, 20)
    many = ExactTokens(*torch.randn(2, 2, 2, 64, 64), lengths, 20)
    sinks = torch.zeros(6)
    q, wide = torch.randn(2, 6, 1, 64), torch.randn(2, 6, 1, 128)[..., :64]
    usual = (q, codec, tables[0], exact, 0.125, True, None)
    changes: list[dict[int, Any]] = [
        *({}, {}, {}, {0: torch.randn(2, 6, 1, 64)}, {0: wide}, {0: torch.randn(1, 6, 1, 64)}, {1: other}),
        *({2: tables[1]}, {2: None}, {3: many}, {3: None}, {4: 0.25}, {5: False}, {6: sinks}, {}),
        *({3: exact.grown(most)} for most in (21, 32, 33, 60)),
        *({0: q.half()}, {}, {0: torch.randn(2, 6, 1, 64)}),
    ]
    ready = 0
    for change in changes:
        for _ in range(3):
            q, codec, table, tokens, *rest = (change.get(i, x) for i, x in enumerate(usual))
            out, lse = attention.decode_attention(q, codec, table, tokens, *rest)
            told = launches["decode_attention"][-1]
            assert (told["q"], told["out"], told["lse"]) == (q.data_ptr(), out.data_ptr(), lse.data_ptr())
            assert (out.shape, out.dtype, lse.shape) == (q.shape, q.dtype, q.shape[:3])
            # The same arrays in tables that no launch has seen.
            fresh = None if table is None else PageTable(base, table.page_table, table.lengths, table.max_length)
            held = None if tokens is None else ExactTokens(tokens.k, tokens.v, tokens.lengths, tokens.max_length)
            attention.decode_attention(q, codec, fresh, held, *rest)
            first = launches["decode_attention"][-1]
            assert {**told, "out": 0, "lse": 0} == {**first, "out": 0, "lse": 0}
            views = (tokens or table).views
            ready += "cuda step" in views
    assert ready > len(changes)


def test_steps_follow_scratch_and_threads(launches: LAUNCHES, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Codec(CodecSpec(), 64, 2)
    exact = ExactTokens(*torch.randn(2, 1, 2, 64, 64), torch.tensor([9], dtype=torch.int32), 20)
    q = torch.randn(1, 6, 1, 64)
    attend = partial(attention.decode_attention, q, codec, None, exact, 0.125, True, None)
    for _ in range(3):
        attend()
    step = exact.views["cuda step"]
    attend()
    assert exact.views["cuda step"] is step
    monkeypatch.setattr(attention, "partials", lambda device, stream, count: 0x3000)
    attend()
    assert launches["decode_attention"][-1]["part"] == 0x2000  # nothing said that it moved
    monkeypatch.setattr(attention, "scratch_age", lambda: 1)
    attend()
    assert launches["decode_attention"][-1]["part"] == 0x3000
    step = exact.views["cuda step"]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(attend).result()
    assert exact.views["cuda step"] is not step


def test_a_paged_step_tells_every_member(launches: LAUNCHES) -> None:
    codec = Codec(CodecSpec(), 64, 2)
    geometry = Geometry(128, codec.page_bytes, 1, codec.page_bytes, 8, 1)
    tables = paged.Tables(geometry, 3, 3, 1024, 1, torch.device("cpu"))
    starts = torch.arange(4, dtype=torch.int32)
    lengths = torch.tensor([200, 300, 400], dtype=torch.int32)
    packed_table, exact_table = torch.ones(3, 16, dtype=torch.int32), torch.ones(3, 128, dtype=torch.int32)
    tables.make(starts, lengths, packed_table, exact_table, 3)
    blocks = paged.Blocks(codec, torch.zeros(99 * codec.page_bytes, dtype=torch.uint8), torch.zeros(99, 8, 2, 128))
    key, value = torch.randn(2, 3, 2, 64)
    paged.append(blocks, tables, key, value, torch.arange(3) + 8, 3, None)
    q = torch.randn(3, 6, 1, 64)
    sizes = paged.scratch_sizes(codec, 6, 3, 1, 400, geometry.most_exact(1), torch.device("cpu"))
    parts, counts, lse = (torch.zeros(n, dtype=d) for n, d in zip(sizes, (torch.float32, torch.int32, torch.float32)))
    paged.decode_attention(q, blocks, tables, 0.125, None, 400, q.clone(), paged.Scratch(parts, counts, lse))
    assert set(launches) == {"page_tables", "paged_append", "decode_attention"}
    told = launches["decode_attention"][0]
    assert told["page_table"] == tables.page_table.data_ptr()
    assert told["exact_blocks"] == tables.blocks.data_ptr()
    assert told["lengths"] == tables.packed.data_ptr()
    assert told["part_ml"] > told["part"] == parts.data_ptr()


def test_what_is_prepared_is_what_is_compiled_ahead(launches: LAUNCHES, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` asks for the kernels that `kernels` lists, steps ask for no others, and fitted codecs share them."""
    from types import SimpleNamespace

    from forgeattention.models.weights.fit import KeyWeights
    from forgeattention.tools.compile import vllm_kernels

    asked, begun = set(), []
    known = nvrtc.kernel

    def kernel(stem: str, macros: nvrtc.Macros, device: int, shared: int) -> Any:
        asked.add((stem, macros, shared))
        return known(stem, macros, device, shared)

    monkeypatch.setattr(nvrtc, "kernel", kernel)
    monkeypatch.setattr(nvrtc, "start", lambda kernels, arch: begun.extend(kernels))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    codec = KeyWeights(np.ones((2, 64)), np.linspace(1, 2, 128).reshape(2, 64)).codec(PRESETS["balanced"])
    tokens = torch.zeros(99, 8, 2, 128, dtype=torch.bfloat16)
    blocks = paged.Blocks(codec, torch.zeros(99 * codec.page_bytes, dtype=torch.uint8), tokens)
    paged.prepare(blocks, 6, {1, 4})
    listed = paged.kernels(codec, 6, {1, 4}, "bfloat16", 8, plans.Limits())
    assert asked == set(listed)
    assert begun == [each[:2] for each in listed]
    layer = SimpleNamespace(packable=True, kv_heads=4, k_dim=64)
    monkeypatch.setattr("forgeattention.tools.compile.inspect", lambda config: SimpleNamespace(layers=[layer] * 3))
    text = SimpleNamespace(num_attention_heads=12, model_type="llama")
    config = SimpleNamespace(get_text_config=lambda decoder: text)
    assert vllm_kernels(config, PRESETS["balanced"], plans.Limits(), ranks=2, drafts=3) == listed
    with pytest.raises(ValueError, match="a multiple of 64; got 96"):
        vllm_kernels(config, PRESETS["balanced"], plans.Limits(), block=96)
    layer.packable = False
    with pytest.raises(ValueError, match="full attention; got none in llama"):
        vllm_kernels(config, PRESETS["balanced"], plans.Limits())
