"""Plants every fault that the emulator claims to see, and checks what it computes."""

import re
import subprocess
import sys

import numpy as np
import pytest

from .emulator import BFloat16, EmulatorError, mlx_source, run_kernel

LANES = np.arange(32)


def launch(source, *, inputs=None, shape=(32,), dtype="float32", grid=None, threadgroup=None, **kwargs):
    """Runs a kernel with one output `out`; by default one thread per element, in one threadgroup."""
    threads = (int(np.prod(shape)), 1, 1)
    outputs = {"out": (shape, dtype)}
    (out,) = run_kernel("test", source, inputs or {}, outputs, grid or threads, threadgroup or threads, **kwargs)
    return out


def fault(kind, match, source, **kwargs):
    with pytest.raises(EmulatorError, match=match) as caught:
        launch(source, **kwargs)
    assert caught.value.kind == kind


I = "uint i = thread_position_in_grid.x; "


class TestFaults:
    def test_device_read_out_of_bounds(self):
        x = np.ones(40, np.float32)
        fault("out_of_bounds", "x: access of 4 bytes at byte 160 of 160", I + "out[i] = x[i + 9];", inputs={"x": x})
        fault("out_of_bounds", "byte -4 of 160", I + "out[i] = x[int(i) - 1];", inputs={"x": x})

    def test_vector_read_past_the_end(self):
        x = np.ones(34, np.float32)
        cast = I + "const device float4* v = (const device float4*)(x); out[i] = v[i / 4 + 1].y;"
        fault("out_of_bounds", "access of 16 bytes at byte 128 of 136", cast, inputs={"x": x})

    def test_device_write_out_of_bounds(self):
        fault("out_of_bounds", "out: access", I + "out[i + 1] = 1.0f;")

    def test_constant_read_out_of_bounds(self):
        fault("out_of_bounds", "x: access", I + "out[i] = x[i];", inputs={"x": np.ones(7, np.float32)})

    def test_out_of_bounds_through_a_helper(self):
        header = "template <class T> void put(device T* to, uint i) { device T* row = to + 4; row[i] = T(1); }\n"
        fault("out_of_bounds", "out: access", I + "put(out, i);", header=header)

    def test_threadgroup_out_of_bounds(self):
        fault("out_of_bounds", "s: access", I + "threadgroup float s[31]; s[i] = 1.0f; out[i] = 1.0f;")

    def test_misaligned_vector(self):
        cast = I + "out[i] = ((const device float4*)(x + 1))[0].x;"
        fault("misaligned", "no multiple of 16", cast, inputs={"x": np.ones(40, np.float32)})

    def test_threadgroup_array_read_as_a_wider_type(self):
        read = "threadgroup float s[32]; s[i] = 1.0f; simdgroup_barrier(mem_flags::mem_threadgroup); "
        read += "out[i] = (*(threadgroup const float4*)s).x;"
        fault("misaligned", "no multiple of 16", I + read)
        assert (launch(I + "alignas(16) " + read) == 1).all()

    def test_private_array_index(self):
        fault("undefined", "thread-private", I + "float a[4] = {0}; a[i] = 1.0f; out[i] = a[i / 8];")

    def test_shift_by_word_width(self):
        fault("undefined", "shift", I + "out[i] = float(1u << (i + 1));")

    def test_barrier_not_reached_by_all(self):
        barrier = "if (i != 5) threadgroup_barrier(mem_flags::mem_threadgroup); out[i] = 1.0f;"
        fault("barrier_divergence", "thread 0 waits there, thread 5 has returned", I + barrier)

    def test_two_different_barriers(self):
        source = I + (
            "\nif (i < 32) { threadgroup_barrier(mem_flags::mem_threadgroup); }"
            "\nelse { threadgroup_barrier(mem_flags::mem_threadgroup); }\nout[i] = 1.0f;"
        )
        fault("barrier_divergence", "thread 32 is at threadgroup_barrier", source, shape=(64,))

    def test_barriers_in_a_loop_of_uneven_length(self):
        loop = "for (uint k = 0; k < 2 + i / 32; k++) threadgroup_barrier(mem_flags::mem_none); out[i] = 1.0f;"
        fault("barrier_divergence", "has returned", I + loop, shape=(64,))

    @pytest.mark.parametrize(
        "op",
        ["simd_sum(1.0f)", "simd_max(1.0f)", "simd_shuffle_xor(1.0f, 1)", "simd_broadcast(1.0f, 0)", "simd_any(true)"],
    )
    def test_simd_op_not_reached_by_the_simdgroup(self, op):
        fault("simd_divergence", "whole simdgroup", I + f"out[i] = i < 7 ? float({op}) : 0.0f;")

    def test_simd_op_against_barrier(self):
        source = I + "if (i < 7) simd_sum(1); else threadgroup_barrier(mem_flags::mem_none); out[i] = 1.0f;"
        fault("simd_divergence", "is at threadgroup_barrier", source)

    def test_uninitialised_threadgroup_memory(self):
        source = I + "threadgroup float s[32]; if (i != 3) s[i] = 1.0f; out[i] = s[i];"
        fault("uninitialised", "s: element 3", source)

    def test_threadgroup_memory_does_not_survive_its_threadgroup(self):
        source = I + "threadgroup float s[32]; if (i < 32) s[i] = 1.0f; out[i] = s[thread_position_in_threadgroup.x];"
        fault("uninitialised", r"threadgroup \[1, 0, 0\]", source, shape=(64,), threadgroup=(32, 1, 1))

    def test_reading_an_output_before_writing_it(self):
        fault("uninitialised", "out: element 0", I + "out[i] += 1.0f;")

    def test_race_read_after_write(self):
        source = I + "threadgroup float s[64]; s[i] = 1.0f; out[i] = s[(i + 1) % 64];"
        with pytest.raises(EmulatorError) as caught:
            launch(source, shape=(64,))
        assert caught.value.kind in ("race", "uninitialised")  # the reader may come before the writer
        source = I + "threadgroup float s[64]; s[i] = 1.0f; out[i] = s[i / 2];"
        fault("race", "read here and written by thread 0 with no barrier between", source, shape=(64,))

    def test_race_within_a_simdgroup_needs_a_simdgroup_barrier(self):
        body = "threadgroup float s[32]; s[i] = float(i); {} out[i] = s[i ^ 1];"
        fault("race", "s: element", I + "threadgroup float s[32]; s[i] = float(i); out[i] = s[i & 30];")
        fault("race", "s: element", I + body.format("simd_sum(1.0f);"))
        fault("race", "s: element", I + body.format("simdgroup_barrier(mem_flags::mem_none);"))
        fault("race", "s: element", I + body.format("simdgroup_barrier(mem_flags::mem_device);"))
        for barrier in ("simdgroup_barrier", "threadgroup_barrier"):
            out = launch(I + body.format(f"{barrier}(mem_flags::mem_threadgroup);"))
            assert (out == (LANES ^ 1)).all()

    def test_simdgroup_barrier_does_not_order_simdgroups(self):
        source = (
            "threadgroup float s[64]; s[i] = 1.0f; simdgroup_barrier(mem_flags::mem_threadgroup); out[i] = s[i / 2];"
        )
        fault("race", "s: element 16", I + source, shape=(64,))

    def test_race_write_after_read(self):
        source = I + (
            "threadgroup float s[64]; s[i] = 1.0f; threadgroup_barrier(mem_flags::mem_threadgroup);"
            "out[i] = s[i / 2]; {} if (i == 63) s[0] = 2.0f;"
        )
        right = "threadgroup_barrier(mem_flags::mem_threadgroup);"
        for wrong in (
            "",
            right.replace("threadgroup_b", "simdgroup_b"),
            right.replace("mem_threadgroup", "mem_device"),
        ):
            fault("race", "s: element 0 is written here and read", source.replace("{}", wrong), shape=(64,))
        assert (launch(source.replace("{}", right), shape=(64,)) == 1).all()

    def test_race_write_after_read_by_several_lanes(self):
        source = I + (
            "threadgroup float s[1]; if (i == 0) s[0] = 1.0f; simdgroup_barrier(mem_flags::mem_threadgroup);"
            "out[i] = s[0]; {} if (i == 31) s[0] = 2.0f;"
        )
        fault("race", "s: element 0 is written here and read", source.replace("{}", ""))
        assert (launch(source.replace("{}", "simdgroup_barrier(mem_flags::mem_threadgroup);")) == 1).all()

    def test_race_two_writers(self):
        fault("race", "out: element 0", "out[0] = 1.0f;", shape=(1,), grid=(32, 1, 1), threadgroup=(32, 1, 1))

    def test_race_between_threadgroups(self):
        source = "threadgroup_barrier(mem_flags::mem_device); out[thread_position_in_threadgroup.x] = 1.0f;"
        fault("race", "out: element 0", source, grid=(64, 1, 1), threadgroup=(32, 1, 1))

    def test_grid_counts_threads(self):
        # one thread per threadgroup instead of 32: the mistake of counting threadgroups
        source = "out[threadgroup_position_in_grid.x * 32 + thread_index_in_threadgroup] = 1.0f;"
        kwargs = {"shape": (128,), "threadgroup": (32, 1, 1)}
        fault("unwritten_output", "124 of 128 left, first 4", source, grid=(4, 1, 1), **kwargs)
        assert (launch(source, grid=(128, 1, 1), **kwargs) == 1).all()

    def test_init_value_stands_for_unwritten_elements(self):
        out = launch(I + "if (i == 3) out[i] += 1.0f;", init_value=2.0)
        assert (out == np.where(LANES == 3, 3, 2)).all()

    def test_impossible_launch(self):
        fault("launch", "1 to 1024 threads", "out[0] = 1.0f;", threadgroup=(1025, 1, 1))
        fault("launch", "non-empty grid", "out[0] = 1.0f;", grid=(0, 1, 1), threadgroup=(32, 1, 1))

    def test_too_much_threadgroup_memory(self):
        fault("threadgroup_memory", "32772 bytes", I + "threadgroup float s[8193]; s[i] = 1.0f; out[i] = s[i];")

    def test_threadgroup_variable_outside_the_kernel(self):
        header = "void helper() { threadgroup float s[4]; }\n"
        fault("translation", "in the kernel's body", I + "out[i] = 1.0f;", header=header)

    def test_address_spaces_do_not_mix(self):
        # an input of fewer than 8 elements is `constant`, so a helper for device pointers does not take it
        header = "float get(const device float* p, uint i) { return p[i]; }\n"
        source, x = I + "out[i] = get(x, 0);", np.ones(8, np.float32)
        fault("compile", "could not convert", source, header=header, inputs={"x": x[:7]})
        assert (launch(source, header=header, inputs={"x": x}) == 1).all()

    def test_writing_an_input(self):
        x = np.ones(32, np.float32)
        fault("compile", "assignment|lvalue|read-only", I + "x[i] = 1.0f; out[i] = 1.0f;", inputs={"x": x})

    def test_double_does_not_exist(self):
        fault("compile", "msl_has_no_double", I + "double d = 1; out[i] = d;")

    def test_a_fault_leaves_the_library_usable(self):
        source, x = I + "out[i] = simd_sum(x[i + n]);", np.arange(40, dtype=np.float32)
        for n, fine in ((0, True), (9, False), (8, True)):
            inputs = {"x": x, "n": np.array(n, np.int32)}
            if fine:
                assert (launch(source, inputs=inputs) == x[n : n + 32].sum()).all()
            else:
                fault("out_of_bounds", "x: access", source, inputs=inputs)


class TestSemantics:
    @pytest.mark.parametrize(
        ("op", "expected"),
        [
            ("simd_sum(x)", lambda x: np.full(32, x.sum())),
            ("simd_max(x)", lambda x: np.full(32, x.max())),
            ("simd_min(x)", lambda x: np.full(32, x.min())),
            ("simd_shuffle(x, ushort(31 - lane))", lambda x: x[::-1]),
            ("simd_shuffle(x, lane / 4)", lambda x: x[LANES // 4]),
            ("simd_shuffle_xor(x, 5)", lambda x: x[LANES ^ 5]),
            ("simd_shuffle_down(x, 2)", lambda x: np.append(x[2:], [np.nan, np.nan])),
            ("simd_shuffle_up(x, 1)", lambda x: np.append(np.nan, x[:-1])),
            ("simd_broadcast(x, 17)", lambda x: np.full(32, x[17])),
            ("simd_broadcast_first(x)", lambda x: np.full(32, x[0])),
            ("simd_prefix_inclusive_sum(x)", np.cumsum),
            ("simd_prefix_exclusive_sum(x)", lambda x: np.cumsum(x) - x),
            ("float(simd_any(lane == 9))", lambda x: np.ones(32)),
            ("float(simd_all(lane == 9))", lambda x: np.zeros(32)),
        ],
    )
    def test_simd_ops(self, op, expected):
        x = np.random.default_rng(0).integers(-50, 50, 32).astype(np.float32)
        source = f"uint lane = thread_index_in_simdgroup; float x = a[lane]; out[lane] = {op};"
        np.testing.assert_array_equal(launch(source, inputs={"a": x}), expected(x))

    def test_simd_ops_on_vectors_and_integers(self):
        source = (
            "uint lane = thread_index_in_simdgroup; float4 v = simd_sum(float4(lane, 1, 2, 3));"
            "uint w = simd_shuffle_xor(lane * 3u, 1u); uint o = simd_or(1u << lane); half h = simd_max(half(lane));"
            "out[lane] = v.x + v.w + float(w) + (o == 0xffffffffu ? 0.5f : 0.0f) + float(h);"
        )
        assert (launch(source) == 496 + 96 + 3 * (LANES ^ 1) + 0.5 + 31).all()

    def test_partial_simdgroup(self):
        out = launch(I + "out[i] = simd_sum(1.0f);", shape=(40,))
        assert (out == np.where(np.arange(40) < 32, 32, 8)).all()

    def test_barrier_makes_a_reduction(self):
        source = (
            "threadgroup float s[32]; uint i = thread_index_in_threadgroup; float x = simd_sum(a[i]);"
            "if (thread_index_in_simdgroup == 0) s[simdgroup_index_in_threadgroup] = x;"
            "threadgroup_barrier(mem_flags::mem_threadgroup);"
            "uint lane = thread_index_in_simdgroup;"
            "out[i] = simd_sum(lane < simdgroups_per_threadgroup ? s[lane] : 0.0f);"
        )
        a = np.arange(256, dtype=np.float32)
        assert (launch(source, inputs={"a": a}, shape=(256,)) == a.sum()).all()

    def test_non_uniform_grid(self):
        source = (
            "uint3 p = thread_position_in_grid, t = threadgroup_position_in_grid, n = threads_per_threadgroup;"
            "out[(p.z * 5 + p.y) * 7 + p.x] = 10000 * n.x + 1000 * n.y + 100 * t.x + 10 * t.y + t.z;"
        )
        out = launch(source, shape=(2, 5, 7), dtype="int32", grid=(7, 5, 2), threadgroup=(4, 3, 1))
        z, y, x = np.meshgrid(np.arange(2), np.arange(5), np.arange(7), indexing="ij")
        n = np.where(x < 4, 4, 3) * 10000 + np.where(y < 3, 3, 2) * 1000
        assert (out == n + 100 * (x // 4) + 10 * (y // 3) + z).all()

    def test_threadgroup_larger_than_the_grid(self):
        out = launch(I + "out[i] = float(threads_per_threadgroup.x);", grid=(32, 1, 1), threadgroup=(256, 1, 1))
        assert (out == 32).all()

    @pytest.mark.parametrize(("dtype", "bits"), [("float32", 24), ("float16", 11)])
    @pytest.mark.parametrize("transpose", [False, True])
    def test_simdgroup_matrix(self, dtype, bits, transpose):
        rng = np.random.default_rng(1)
        a, b = rng.standard_normal((2, 8, 16)).astype(dtype)
        source = (
            "simdgroup_matrix<T, 8, 8> x, y; simdgroup_matrix<float, 8, 8> c(0.0f);"
            "for (int k = 0; k < 16; k += 8) { simdgroup_load(x, a + k, 16);"
            f" simdgroup_load(y, b + k, 16, ulong2(0, 0), {'false' if transpose else 'true'});"
            " simdgroup_multiply_accumulate(c, x, y, c); }"
            f"simdgroup_store(c, out, 8, ulong2(0, 0), {str(transpose).lower()});"
        )
        inputs = {"a": a, "b": b}
        one = (32, 1, 1)
        out = launch(source, inputs=inputs, shape=(8, 8), grid=one, threadgroup=one, template=[("T", dtype)])
        a64, b64 = a.astype(np.float64), b.astype(np.float64)
        expected = a64 @ b64.T if not transpose else (a64[:, :8] @ b64[:, :8] + a64[:, 8:] @ b64[:, 8:]).T
        np.testing.assert_allclose(out, expected, rtol=0, atol=16 * 2.0**-22)

    def test_types_and_math(self):
        source = I + (
            "uchar4 b = as_type<uchar4>(0x04030201u + i); uint4 u = uint4(b.x, b.y, b.z, b.w);"
            "float4 f = float4(u) * 0.5f + float4(float2(1.0f), 2, 3); f.xy = f.yx;"
            "half2 h = half2(0.1h, 1.0h) * half(2); packed_float3 p = float3(1, 2, 3);"
            "float r = dot(f, float4(1)) + p[2] + float(h.y) + float(popcount(i)) + fma(2.0f, 3.0f, 1.0f);"
            "r += max(f.x, 0.0f) + exp2(-INFINITY) + clamp(float(i), 3.0f, 4.0f);"
            "out[i] = r + float(extract_bits(0xabcdu, 4u, 8u) == 0xbcu);"
        )
        u = np.array([[1 + i, 2, 3, 4] for i in LANES])
        f = u * 0.5 + [1, 1, 2, 3]
        expected = f.sum(1) + 3 + 2 + [int(i).bit_count() for i in LANES] + 7 + f[:, 1] + np.clip(LANES, 3, 4) + 1
        assert (launch(source) == expected).all()

    def test_literals_are_single_precision(self):
        assert (launch(I + "out[i] = 0.1 * 3.0 - 0.3;") == np.float32(0.1) * np.float32(3) - np.float32(0.3)).all()

    def test_bfloat16(self):
        x = np.linspace(-3, 3, 32).astype(np.float32)
        out = launch(I + "out[i] = bfloat(float(x[i]) * 1.5f);", inputs={"x": BFloat16.rounded(x)}, dtype="bfloat16")
        assert (out.bits == BFloat16.rounded(BFloat16.rounded(x).float32() * np.float32(1.5)).bits).all()

    def test_strides_and_shapes(self):
        source = (
            "uint2 p = thread_position_in_grid.xy;"
            "out[p.y * x_shape[1] + p.x] = x[p.y * x_strides[0] + p.x * x_strides[1]] + x_ndim;"
        )
        x = np.arange(32, dtype=np.float32).reshape(4, 8)
        out = launch(source, inputs={"x": x}, shape=(4, 8), grid=(8, 4, 1), threadgroup=(8, 4, 1))
        assert (out == x + 2).all()


def test_source_is_what_mlx_generates(tmp_path):
    pytest.importorskip("mlx.core", reason="MLX is not installed; its own generated text is the comparison")
    # MLX prints the text even where there is no GPU, while a function is exported.
    source = "y[thread_position_in_grid.x] = x[0] + x_shape[0] + big_strides[1] + x_ndim + s; // threads_per_simdgroup"
    script = f"""
import mlx.core as mx
k = mx.fast.metal_kernel(name="op", input_names=["x", "s", "big"], output_names=["y", "z"], header="// header\\n",
                         source="{source}")
def f(x, s, big):
    return k(inputs=[x, s, big], output_shapes=[(3,), (1,)], output_dtypes=[mx.float32, mx.bfloat16], grid=(3, 1, 1),
             threadgroup=(3, 1, 1), template=[("T", mx.float16), ("N", 3), ("B", True)], verbose=True)
mx.export_function({str(tmp_path / "f.mlxfn")!r}, f, mx.zeros(3), mx.array(3), mx.zeros((8, 2), mx.uint8))
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    theirs = re.search(r"```\n(.*)\n```", printed, re.S)[1]
    inputs = {"x": np.zeros(3, np.float32), "s": np.array(3, np.int32), "big": np.zeros((8, 2), np.uint8)}
    template = [("T", "float16"), ("N", 3), ("B", True)]
    _, ours = mlx_source("op", "// header\n", source, inputs, {"y": "float32", "z": "bfloat16"}, template)
    assert ours == theirs
