"""What the ops refuse, in which words; and which backend they choose."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from ops_cases import make_case

from forgeattention import ops
from forgeattention.backends.cpu import native
from forgeattention.codec import CodecSpec
from forgeattention.ops import registry


@pytest.fixture
def case():
    return make_case(CodecSpec())


def across(x):
    """The same values with a last axis that is not contiguous."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


BAD_CALLS = [
    ("q", lambda c: c.q[0], r"expected q \[batch, heads, n, 64\]; got \[6, 1, 64\]"),
    ("q", lambda c: c.q[..., :60], r"expected q \[batch, heads, n, 64\]"),
    ("q", lambda c: c.q.double(), "expected q of float32, float16, bfloat16; got float64"),
    ("q", lambda c: c.q[:, :5], "expected q_heads a multiple of 2 kv_heads; got 5"),
    ("q", lambda c: c.q[:2], r"expected table.lengths int32 \[2\]"),
    ("q", lambda c: across(c.q.expand(-1, -1, 2, -1)), "expected q with a contiguous last axis; got strides"),
    ("q", lambda c: c.q.tolist(), "expected q as a NumPy, torch or MLX array; got list"),
    ("table", lambda c: replace(c.table, lengths=c.exact.lengths.long()), "expected table.lengths int32 .*; got int64"),
    ("table", lambda c: replace(c.table, page_table=c.table.page_table.int()), r"expected table.page_table int64"),
    ("table", lambda c: replace(c.table, page_table=c.table.page_table[:2]), r"expected table.page_table int64 \[3,"),
    ("table", lambda c: replace(c.table, max_length=10000), "expected table.max_length within"),
    ("table", lambda c: replace(c.table, max_length=100), "expected packed lengths within max_length 100; got 150"),
    ("table", lambda c: replace(c.table, base=c.table.base.int()), "expected table.base uint8"),
    ("table", lambda c: replace(c.table, base=c.table.base[:1000]), "expected page offsets within 1000 bytes; got"),
    ("table", lambda c: replace(c.table, base=c.table.base[::2]), "expected table.base contiguous"),
    ("table", lambda c: replace(c.table, page_table=c.table.page_table - 2**40), "expected page offsets within"),
    ("table", lambda c: c, "expected a PageTable; got Case"),
    ("exact", lambda c: replace(c.exact, k=c.exact.k[:, :1]), r"expected exact.k \[batch, 2, n, 64\]"),
    ("exact", lambda c: replace(c.exact, v=c.exact.v.half()), "expected exact.v .* like exact.k"),
    ("exact", lambda c: replace(c.exact, lengths=c.exact.lengths + 40), "expected exact lengths within .* 40; got 80"),
    ("exact", lambda c: replace(c.exact, max_length=99), "expected exact.max_length within the capacity 42; got 99"),
    ("exact", lambda c: replace(c.exact, k=across(c.exact.k)), "expected exact.k with a contiguous last axis"),
    ("sink_logits", lambda c: torch.zeros(5), r"expected sink_logits float32 \[6\]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "message"), BAD_CALLS)
def test_decode_attention_refuses(case, name, make, message):
    with pytest.raises(ValueError, match=rf"\[decode_attention\] {message}"):
        case.attend(**{name: make(case)})


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf")])
def test_bad_scales(case, scale):
    with pytest.raises(ValueError, match=r"\[decode_attention\] expected a positive finite softmax scale"):
        replace(case, scale=scale).attend()


def test_causal_queries_need_their_own_tokens(case):
    q = case.q.expand(-1, -1, 50, -1)
    with pytest.raises(ValueError, match="expected at least 50 exact tokens, the causal queries' own; got 40"):
        case.attend(q=q)
    with pytest.raises(ValueError, match="expected exact tokens for more than one causal query; got None"):
        case.attend(q=q, exact=None)


def test_a_codec_is_a_codec(case):
    with pytest.raises(ValueError, match=r"\[decode_attention\] expected a Codec; got CodecSpec"):
        ops.decode_attention(case.q, case.codec.spec, case.table, case.exact, 1.0)


@pytest.mark.parametrize(
    ("k", "v", "message"),
    [
        ((2, 64, 32), (2, 64, 32), r"expected k \[2, n, 64\]; got \[2, 64, 32\]"),
        ((1, 64, 64), (1, 64, 64), r"expected k \[2, n, 64\]; got \[1, 64, 64\]"),
        ((2, 65, 64), (2, 65, 64), "expected k and v alike with a multiple of 64 tokens"),
        ((2, 128, 64), (2, 64, 64), "expected k and v alike"),
        ((2, 128, 64), (2, 128, 64), r"expected offsets int64 \[2\]; got int64 \[1\]"),
    ],
)
def test_encode_refuses_shapes(case, k, v, message):
    out = np.zeros(case.codec.page_bytes, np.uint8)
    with pytest.raises(ValueError, match=rf"\[encode\] {message}"):
        ops.encode(np.zeros(k, np.float32), np.zeros(v, np.float32), case.codec, out, np.zeros(1, np.int64))


@pytest.mark.parametrize("offset", [-1, 1])
def test_encode_refuses_places_outside(case, offset):
    x, out = np.ones((2, 64, 64), np.float32), np.zeros(case.codec.page_bytes, np.uint8)
    with pytest.raises(ValueError, match=rf"\[encode\] expected offsets within {out.size} bytes; got {offset}"):
        ops.encode(x, x, case.codec, out, np.array([offset]))
    assert not out.any()


def test_other_ops_refuse(case):
    p = torch.ones(3, 6, 1, case.table.max_length)
    with pytest.raises(ValueError, match=r"\[value_sum\] expected p float32"):
        ops.value_sum(p.half(), case.codec, case.table)
    with pytest.raises(ValueError, match=r"\[value_sum\] expected p with \d+ weights per query"):
        ops.value_sum(p[..., :10], case.codec, case.table)
    with pytest.raises(ValueError, match=r"\[qk_scores\] expected q_heads a multiple"):
        ops.qk_scores(case.q[:, :1], case.codec, case.table, 1.0)
    with pytest.raises(ValueError, match=r"\[decode_pages\] expected dtype of float32, float16, bfloat16; got int8"):
        ops.decode_pages(case.codec, case.table, dtype="int8")
    with pytest.raises(ValueError, match=r"\[prefill_attention\] expected a PageTable; got NoneType"):
        ops.prefill_attention(case.q, case.codec, None, 1.0)
    with pytest.raises(ValueError, match=r"\[set_num_threads\] expected n >= 1"):
        ops.set_num_threads(0)


def test_report_names_every_backend():
    rows = {row["backend"]: row for row in ops.report()}
    on_mlx = ["cpu, MLX", "cuda, MLX"] if importlib.util.find_spec("mlx") else []
    assert list(rows) == ["cpu", "cuda", "metal", "reference", *on_mlx]
    assert all(row["reason"] for row in rows.values())
    assert rows["cpu"]["available"]
    assert rows["reference"]["available"]


def test_selection(case):
    assert registry.launch("encode", case.q).__module__ == "forgeattention.backends.cpu.pages"
    assert registry.launch("encode", case.q, "reference").__module__ == "forgeattention.backends.reference.pages"
    with pytest.raises(ValueError, match=r"\[encode\] expected backend 'auto' or one of .*; got 'gpu'"):
        registry.launch("encode", case.q, "gpu")
    with pytest.raises(
        ValueError, match=r"\[encode\] expected arrays that backend 'cuda' reads; got torch.Tensor on cpu"
    ):
        registry.launch("encode", case.q, "cuda")
    with pytest.raises(
        ValueError, match=r"\[compose\] expected backend 'cpu' to be available; got: backend 'cpu' has no compose"
    ):
        registry.launch("compose", case.q)
    with pytest.raises(ValueError, match=r"\[encode\] expected an array of NumPy, torch or MLX; got builtins.list"):
        registry.launch("encode", [1.0])


def test_threads_follow_torch():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    assert ops.get_num_threads() == before + 1
    ops.set_num_threads(3)
    assert ops.get_num_threads() == 3
    ops.set_num_threads(None)
    torch.set_num_threads(before)
    assert ops.get_num_threads() == before


@pytest.mark.parametrize("isa", native.isas())
def test_the_environment_forces_an_instruction_set(isa):
    code = "from forgeattention import _native; print(_native.isa())"
    env = {**os.environ, "FORGEATTENTION_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == isa


def test_an_unknown_instruction_set():
    with pytest.raises(
        ValueError, match=r"\[cpu\] expected an instruction set of this processor and build \(.*portable\); got 'sse2'"
    ):
        native.use_isa("sse2")


def test_a_forked_child_computes(case):
    """A child has none of the parent's threads."""
    expected, _ = case.attend()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        ops.set_num_threads(2)
        same = torch.equal(case.attend()[0], expected)
        os.write(write, b"y" if same else b"n")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 1) == b"y"
