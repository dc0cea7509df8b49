"""The host code with MLX's own arrays, and the kernels' text as MLX generates it. MLX runs on the CPU here."""

from dataclasses import replace

import numpy as np
import pytest
from tolerances import METAL

from forgeattention.backends.metal import attention as metal_attention
from forgeattention.backends.metal import pages as metal_pages
from forgeattention.backends.metal import scores as metal_scores
from forgeattention.backends.metal import sparse as metal_sparse
from forgeattention.backends.metal.launch import MLX, kernel_text
from forgeattention.ops import Scores, Threshold
from forgeattention.ops.table import ExactTokens, PageTable

from .cases import Emulator, make_codec, make_exact, make_table, queries, relative_error
from .emulator import BFloat16, mlx_source

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")


def to_numpy(x):
    if x.dtype == mx.bfloat16:
        return BFloat16(np.array(x.view(mx.uint16)))
    return np.array(x)


class EmulatedMLX:
    """MLX's arrays and operations, with the kernels under the emulator."""

    xp = mx

    def __init__(self):
        self.launches = []

    def run(self, launch):
        self.launches.append(launch)
        arrays = {k: to_numpy(v if isinstance(v, mx.array) else mx.array(v)) for k, v in launch.inputs.items()}
        return [mx.array(x) for x in Emulator().run(replace(launch, inputs=arrays))]


def as_mlx(x, dtype=None):
    if isinstance(x, PageTable):
        return PageTable(mx.array(x.base), mx.array(x.page_table), mx.array(x.lengths), x.max_length)
    if isinstance(x, ExactTokens):
        return ExactTokens(mx.array(x.k).astype(dtype), mx.array(x.v).astype(dtype), mx.array(x.lengths), x.max_length)
    if isinstance(x, (Scores, Threshold)):
        return type(x)(*map(mx.array, vars(x).values()))
    if isinstance(x, tuple):
        return tuple(mx.array(y) for y in x)
    return mx.array(x) if isinstance(x, np.ndarray) else x


def arrays(result):
    if isinstance(result, (Scores, Threshold)):
        return list(vars(result).values())
    return result if isinstance(result, tuple) else (result,)


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    mu = rng.standard_normal((2, 64))
    codec = make_codec(k_mu=mu, v_mu=mu)
    table = make_table(rng, codec, [100, 300])
    p = rng.standard_normal((2, 4, 1, 300)).astype(np.float32)
    return codec, table, queries(rng, codec, 2, 2, 1), p, make_exact(rng, codec, [40, 3], 50)[0]


def launches_of(case):
    """Every kernel's launch, with MLX arrays; results are compared with those from NumPy arrays on the way."""
    codec, table, q, p, exact = case
    device = EmulatedMLX()
    sinks = np.ones(4, np.float32)
    scores = metal_sparse.sparse_scores(q, codec, table, 0.1, Emulator())
    threshold = metal_sparse.sparse_threshold(scores, table, 9, None, None, Emulator())
    budgets, lse = np.arange(4, dtype=np.int32), np.ones((2, 4, 1), np.float32)
    for op, args in (
        (metal_attention.decode_attention, (q, codec, table, exact, 0.1, True, None)),
        (metal_attention.decode_attention, (q, codec, table, None, 0.1, True, sinks)),
        (metal_attention.prefill_attention, (q, codec, table, 0.1)),
        (metal_scores.qk_scores, (q, codec, table, 0.1)),
        (metal_scores.value_sum, (p, codec, table, True)),
        (metal_pages.decode_pages, (codec, table, "float16", False)),
        (metal_pages.decode_pages, (codec, table, "float32", True)),
        (metal_sparse.sparse_scores, (q, codec, table, 0.1)),
        (metal_sparse.page_scores, (q, codec, table, 0.1)),
        (metal_sparse.sparse_threshold, (scores, table, budgets, None, lse)),
        (metal_sparse.sparse_threshold, (scores, table, None, 0.9, None)),
        (metal_sparse.sparse_attention, (scores, threshold, codec, table, None)),
        (metal_sparse.sparse_attention, (scores, threshold, codec, table, (q, lse))),
    ):
        with_numpy = op(*args, device=Emulator())
        with_mlx = op(*(as_mlx(a, mx.float32) for a in args), device=device)
        for want, got in zip(*map(arrays, (with_numpy, with_mlx)), strict=True):
            assert str(got.dtype).endswith(want.dtype.name)
            if want.dtype == np.int32:
                assert np.array_equal(np.array(got), want)
            else:
                assert relative_error(np.array(got), want) < METAL[want.dtype.name]
    return device.launches


def test_ops_on_mlx_arrays(case):
    assert {x.kernel for x in launches_of(case)} == {
        "decode_attention",
        "merge_attention",
        "prefill_attention",
        "qk_scores",
        "value_sum",
        "decode_pages",
        "sparse_scores",
        "sparse_threshold",
        "sparse_attention",
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_decode_attention_in_half_precision(case, dtype):
    codec, table, q, _, exact = case
    half = getattr(mx, dtype)
    q16, exact16 = mx.array(q).astype(half), as_mlx(exact, half)
    out, _ = metal_attention.decode_attention(q16, codec, as_mlx(table), exact16, 0.1, True, None, EmulatedMLX())
    assert out.dtype == half
    same = ExactTokens(
        *(np.array(x.astype(mx.float32)) for x in (exact16.k, exact16.v)), exact.lengths, exact.max_length
    )
    q32 = np.array(q16.astype(mx.float32))
    want, _ = metal_attention.decode_attention(q32, codec, table, same, 0.1, True, None, Emulator())
    assert relative_error(np.array(out.astype(mx.float32)), want) < METAL[dtype]


def test_encode_writes_mlx_arrays(case):
    codec = case[0]
    k, v = np.random.default_rng(1).standard_normal((2, 2, 128, 64)).astype(np.float32)
    want = np.zeros(3 * codec.page_bytes, np.uint8)
    offsets = np.array([codec.page_bytes, 0])
    metal_pages.encode(k, v, codec, want, offsets, Emulator())
    for shape in ((-1,), (3, codec.page_bytes)):
        out = mx.zeros((3 * codec.page_bytes,), dtype=mx.uint8).reshape(shape)
        metal_pages.encode(mx.array(k), mx.array(v), codec, out, mx.array(offsets), EmulatedMLX())
        # MLX's matrix product rounds otherwise than NumPy's, so that a code in a thousand may differ
        assert (np.array(out).reshape(-1) != want).mean() < 1e-3


def test_mlx_accepts_every_launch_and_generates_the_text_that_was_tested(case, tmp_path, capfd, monkeypatch):
    device, make = MLX(), mx.fast.metal_kernel
    monkeypatch.setattr(mx.fast, "metal_kernel", lambda **kwargs: lambda **call: make(**kwargs)(**call, verbose=True))
    for launch in launches_of(case):
        inputs = list(launch.inputs.values())

        def run(*arrays, launch=launch):
            return device.run(replace(launch, inputs=dict(zip(launch.inputs, arrays))))

        capfd.readouterr()
        mx.export_function(str(tmp_path / "kernel.mlxfn"), run, *inputs)
        theirs = capfd.readouterr().out.split("```\n")[1]
        header, body = kernel_text(launch.kernel)
        arrays = {k: to_numpy(v) for k, v in launch.inputs.items()}
        dtypes = {k: dtype for k, (_, dtype) in launch.outputs.items()}
        name = f"forgeattention_{launch.kernel}"
        assert theirs.rstrip() == mlx_source(name, header, body, arrays, dtypes, launch.template)[1].rstrip()
