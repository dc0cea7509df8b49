"""Ops on MLX arrays on NVIDIA GPUs: without one, launches fit their kernels' entries; on one, results are right."""

from __future__ import annotations

import ctypes
import math
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

import tolerances  # noqa: E402
from cuda_cases import CASES, Case  # noqa: E402

from forgeattention import ops  # noqa: E402
from forgeattention.backends.cuda import mlx as mlx_cuda  # noqa: E402
from forgeattention.backends.cuda import nvrtc, plans  # noqa: E402
from forgeattention.backends.cuda.params import STRUCTS  # noqa: E402
from forgeattention.backends.cuda.structs import Struct  # noqa: E402
from forgeattention.codec import Codec  # noqa: E402
from forgeattention.ops import ExactTokens, PageTable  # noqa: E402

KV = 2
NUMPY = {"u8": "uint8", "i64": "int64", "int": "int32", "u32": "int32", "float": "float32", "float2": "float32"}
"""Dtypes of arrays by C types; void stands for the floats."""
OPTIONAL = {"sink_logits", "exact_blocks", "slots", "feedback"} | {
    f"{side}transform.{name}" for side in ("", "k_", "v_") for name in ("signs", "in_matrix", "out_matrix", "mu")
}
KERNELS = {"decode_attention", "decode_pages", "compact", "encode", "qk_scores", "value_sum"}
available, reason = nvrtc.available_to_mlx()
on_gpu = pytest.mark.skipif(not available, reason=reason)


def make_codec(case: Case, mu: bool = True) -> Codec:
    rng = np.random.default_rng(7)
    extra = {}
    if case.rotation == "custom":
        shape = (KV, case.head_dim, case.head_dim)
        for side in "kv":
            noise = 0.3 / math.sqrt(case.head_dim) * rng.standard_normal(shape)
            extra[f"{side}_matrix"] = np.eye(case.head_dim) + noise
    if case.diagonal:
        extra["k_diagonal"] = np.exp(0.5 * rng.standard_normal((KV, case.head_dim)))
    if mu:
        extra |= {f"{side}_mu": rng.standard_normal((KV, case.head_dim)) for side in "kv"}
    return case.codec(KV, **extra)


class Tokens:
    """Rows of 130, 64 and 0 packed tokens, pages scattered in one array, and some exact ones."""

    def __init__(self, case: Case, mu: bool = True) -> None:
        self.case, self.codec = case, make_codec(case, mu)
        rng, d = np.random.default_rng(0), case.head_dim
        k, v = rng.standard_normal((2, KV, 320, d)).astype(np.float32)
        self.k, self.v = k + 2 * rng.standard_normal((KV, 1, d)).astype(np.float32), v
        size = self.codec.page_bytes
        self.places = np.array([3, 0, 4, 1, 2], np.int64) * size
        self.base = np.zeros(5 * size, np.uint8)
        offsets = np.array([self.places[:3], [self.places[3], -1, -1], [-1, -1, -1]])
        self.lengths = np.array([130, 64, 0], np.int32)
        self.page_table = offsets
        self.exact = rng.standard_normal((2, 3, KV, 9, d)).astype(np.float32)
        self.exact_lengths = np.array([9, 8, 8], np.int32)  # causal queries are among them
        self.q = rng.standard_normal((3, KV * case.group, case.n, d)).astype(np.float32)
        self.sinks = rng.standard_normal(KV * case.group).astype(np.float32)

    def mlx(self, base: Any) -> tuple[Any, Any, Any]:
        """q, table and exact tokens as MLX arrays."""
        case = self.case
        q = mx.array(self.q).astype(getattr(mx, case.dtype))
        exact = (mx.array(x).astype(getattr(mx, case.exact_dtype)) for x in self.exact)
        table = PageTable(base, mx.array(self.page_table), mx.array(self.lengths), 130)
        return q, table, ExactTokens(*exact, mx.array(self.exact_lengths), 9)


@pytest.fixture
def launches(monkeypatch: Any) -> list[mlx_cuda.Launch]:
    """Launches that were asked for; each gives zeros."""
    seen: list[mlx_cuda.Launch] = []

    def run(launch: mlx_cuda.Launch) -> list[Any]:
        seen.append(launch)
        return [mx.zeros(shape, dtype=getattr(mx, dtype)) for shape, dtype in launch.outputs.values()]

    monkeypatch.setattr(mlx_cuda.Launch, "run", run)
    monkeypatch.setattr(mlx_cuda, "limits", plans.Limits)
    return seen


def all_ops(made: Tokens) -> None:
    base = mx.zeros((len(made.base),), dtype=mx.uint8)
    k, v = (mx.array(x).astype(getattr(mx, made.case.dtype)) for x in (made.k, made.v))
    mlx_cuda.encode(k, v, made.codec, base, mx.array(made.places))
    q, table, exact = made.mlx(base)
    for sinks in (None, mx.array(made.sinks)):
        mlx_cuda.decode_attention(q, made.codec, table, exact, 0.1, made.case.n > 1, sinks)
    mlx_cuda.decode_attention(q, made.codec, None, exact, 0.1, False, None)
    mlx_cuda.decode_attention(q, made.codec, table, None, 0.1, False, None)
    mlx_cuda.decode_pages(made.codec, table, "float16", True)
    mlx_cuda.decode_pages(made.codec, table, "float32", False)
    scores = mlx_cuda.qk_scores(q, made.codec, table, 0.1)
    mlx_cuda.value_sum(scores, made.codec, table)
    mlx_cuda.prefill_attention(q, made.codec, table, 0.1)
    mlx_cuda.compact(base, mx.array(made.places), made.codec.page_bytes)


@pytest.mark.parametrize("case", [Case(head_dim=64, group=3, k_code="trellis8"), CASES[-1]], ids=str)
def test_launches_fit_the_entries_which_compile(launches: list[Any], case: Case) -> None:
    all_ops(Tokens(case))
    assert {launch.kernel for launch in launches} == KERNELS
    for launch in launches:
        params, outputs = STRUCTS[launch.kernel], tuple(launch.outputs)
        inputs, scalars = params.mlx_arguments(launch.members, outputs)
        pointers = [leaf for leaf in params.leaves if "*" in leaf.type and leaf.path not in outputs]
        numbers = [leaf for leaf in params.leaves if "*" not in leaf.type]
        assert len(inputs) == len(pointers)
        assert [type(x) for x in scalars] == [int, *(float if leaf.type == "float" else int for leaf in numbers)]
        dtypes = {leaf.path: str(x.dtype).rsplit(".", 1)[-1] for leaf, x in zip(pointers, inputs, strict=True)}
        dtypes |= {name: dtype for name, (_, dtype) in launch.outputs.items()}
        present = [leaf.path for i, leaf in enumerate(pointers) if scalars[0] >> i & 1]
        assert set(present) >= {leaf.path for leaf in pointers} - OPTIONAL
        for leaf in params.leaves:
            kind = leaf.type.replace("const ", "").rstrip("*")
            if leaf.path in {*present, *outputs}:
                wanted = ("float32", "float16", "bfloat16") if kind == "void" else (NUMPY[kind],)
                assert dtypes[leaf.path] in wanted, leaf
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    for kernel, macros, outputs in {(launch.kernel, launch.macros, tuple(launch.outputs)) for launch in launches}:
        assert nvrtc.cubin(kernel, macros, "sm_90a", outputs).startswith(b"\x7fELF")


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize("kernel", sorted(set(STRUCTS) - {"encode_layers"}))
def test_entries_fill_the_whole_structure(kernel: str, tmp_path: Path) -> None:
    """A host's compiler makes the entry of a kernel that only tells what it was given."""
    params = STRUCTS[kernel]
    pointers = [leaf for leaf in params.leaves if "*" in leaf.type]
    outputs = tuple(leaf.path for leaf in pointers[-2:])
    defined = "#define __device__\n#define __global__\n#define __forceinline__\n#define __launch_bounds__(...)\n"
    types = "typedef unsigned char u8; typedef unsigned u32; typedef long long i64; struct float2 { float x, y; };\n"
    body = f'extern "C" unsigned char got[{params.size}];\nunsigned char got[{params.size}];\n'
    body += f"FORGE_KERNEL(32) {kernel}(FORGE_PARAMS p) {{ __builtin_memcpy(got, &p, sizeof p); }}\n"
    text = defined + types + params.mlx_entry(kernel, outputs) + params.text + body
    (tmp_path / "entry.cpp").write_text(text)
    flags = ["-std=c++17", "-w", "-shared", "-fPIC", "-o", tmp_path / "entry.so", tmp_path / "entry.cpp"]
    subprocess.run(["g++", *flags], check=True)
    library = ctypes.CDLL(str(tmp_path / "entry.so"))
    given: dict[str, Any] = {}
    for number, leaf in enumerate(params.leaves, 1):
        value: Any = number / 4 if leaf.type == "float" else number
        if "*" in leaf.type:
            value = None if number % 3 == 0 and leaf.path not in outputs else 4096 * number
        given[leaf.path] = value
    members: dict[str, Any] = {}
    for path, value in given.items():
        if path in outputs:
            continue
        name, _, rest = path.partition(".")
        if rest:
            members.setdefault(name, {})[rest] = value
        elif "[" in name:
            members.setdefault(name.partition("[")[0], []).append(value)
        else:
            members[name] = value
    inputs, scalars = params.mlx_arguments(members, outputs)
    arguments = [ctypes.c_void_p(x) for x in (*inputs, *(given[name] for name in outputs))]
    arguments += [(ctypes.c_float if isinstance(x, float) else ctypes.c_int)(x) for x in scalars]
    getattr(library, f"mlx_{kernel}")(*arguments)
    packed = bytes((ctypes.c_ubyte * params.size).in_dll(library, "got"))
    for leaf in params.leaves:
        assert struct.unpack_from("=" + leaf.code, packed, leaf.offset)[0] == (given[leaf.path] or 0), leaf


def test_entries_refuse_too_many_pointers() -> None:
    with pytest.raises(ValueError, match=r"\[mlx_many\] expected at most 31 inputs; got 32"):
        Struct("Params", ("k", "const float*[33]", "")).mlx_entry("many", ("k[0]",))


def test_pages_are_stored_in_runs_at_their_places() -> None:
    from forgeattention.backends.mlx.arrays import page_places, store_pages

    codec = make_codec(Case(head_dim=64))
    size = codec.page_bytes
    records = np.random.default_rng(0).integers(0, 255, (5, size), np.uint8)
    want = np.zeros((7, size), np.uint8)
    want[[4, 5, 0, 1, 3]] = records
    for shape in ((7 * size,), (7, size)):
        out = mx.zeros(shape, dtype=mx.uint8)
        where = page_places(out, mx.array(np.array([4, 5, 0, 1, 3]) * size), codec)
        store_pages(out, mx.array(records), where)
        assert (np.array(out).reshape(7, size) == want).all()
    for offsets in ([-1], [6 * size + 1]):
        with pytest.raises(ValueError, match=r"\[encode\] expected offsets within"):
            page_places(out, np.array(offsets), codec)
    with pytest.raises(ValueError, match=r"\[encode\] expected an array"):
        page_places(None, np.array([0]), codec)


def close(found: Any, want: Any, limit: float) -> bool:
    mine = np.array(found.astype(mx.float32)).astype(np.float64)
    finite = np.isfinite(want)
    assert (np.isfinite(mine) == finite).all()
    return bool(np.linalg.norm(mine[finite] - want[finite]) <= limit * np.linalg.norm(want[finite]))


@on_gpu
@pytest.mark.parametrize("mu", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ops_give_what_the_oracle_does(case: Case, mu: bool) -> None:
    made = Tokens(case, mu)
    codec, limit = made.codec, tolerances.CUDA_ATTENTION[case.dtype]
    base = mx.zeros((len(made.base),), dtype=mx.uint8)
    k, v = (mx.array(x).astype(getattr(mx, case.dtype)) for x in (made.k, made.v))
    ops.encode(k, v, codec, base, mx.array(made.places), backend="cuda")
    q, table, exact = made.mlx(base)
    # From here on the oracle reads the GPU's pages.
    host = PageTable(np.array(base), made.page_table, made.lengths, 130)
    rows = PageTable(host.base, made.places[None], np.array([320], np.int32), 320)
    ops.encode(*(np.array(x.astype(mx.float32)) for x in (k, v)), codec, made.base, made.places, backend="reference")
    best = PageTable(made.base, *(getattr(rows, name) for name in ("page_table", "lengths", "max_length")))
    for x, y, z in zip(*(ops.decode_pages(codec, t, backend="reference") for t in (rows, best)), (k, v)):
        mine, plain = (np.linalg.norm(decoded[0] - np.array(z.astype(mx.float32))) for decoded in (x, y))
        assert mine < (1 + tolerances.CUDA_ENCODE_LOSS) * plain
    q64 = np.array(q.astype(mx.float32))
    tokens = ExactTokens(*(np.array(x.astype(mx.float32)) for x in (exact.k, exact.v)), made.exact_lengths, 9)
    for packed, recent, sinks in ((table, exact, True), (table, None, False), (None, exact, False)):
        causal = recent is not None and case.n > 1
        logits = mx.array(made.sinks) if sinks else None
        found = ops.decode_attention(q, codec, packed, recent, 0.1, causal=causal, sink_logits=logits)
        want = ops.decode_attention(
            q64, codec, host if packed else None, tokens if recent else None, 0.1, causal=causal,
            sink_logits=made.sinks if sinks else None, backend="reference",
        )  # fmt: skip
        assert found[0].dtype == q.dtype
        assert close(found[0], want[0], limit)
        assert close(found[1], want[1], limit)
    found = ops.decode_pages(codec, table, dtype="float32")
    want = ops.decode_pages(codec, host, backend="reference")
    assert all(close(x, y, tolerances.CUDA_DECODE["float32"]) for x, y in zip(found, want))
    scores = ops.qk_scores(q, codec, table, 0.1)
    want = ops.qk_scores(q64, codec, host, 0.1, backend="reference")
    assert close(scores, want, limit)
    p = np.random.default_rng(5).standard_normal(want.shape).astype(np.float32)
    assert close(ops.value_sum(mx.array(p), codec, table), ops.value_sum(p, codec, host, backend="reference"), limit)
    found = ops.prefill_attention(q, codec, table, 0.1)
    want = ops.prefill_attention(q64, codec, host, 0.1, backend="reference")
    assert all(close(x, y, tolerances.MLX_CUDA_PREFILL) for x, y in zip(found, want))


@on_gpu
def test_encode_refuses_what_it_cannot_code_and_writes_nothing() -> None:
    codec = make_codec(Case(head_dim=64))
    base = mx.ones((2 * codec.page_bytes,), dtype=mx.uint8)
    k = mx.random.normal((KV, 128, 64))
    for bad in (float("nan"), float("inf")):
        v = mx.where(mx.arange(64) == 3, bad, k)
        with pytest.raises(ValueError, match=r"\[encode\] expected finite"):
            ops.encode(k, v, codec, base, mx.array(np.array([0, codec.page_bytes])))
    assert (np.array(base) == 1).all()
