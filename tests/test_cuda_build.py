"""What can be said of the CUDA kernels without a GPU: they compile, their stack is small, launches are shaped right."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import tolerances
from cuda_cases import CASES, Case, kernels, unique_kernels

from forgeattention.backends.cuda import nvrtc, plans
from forgeattention.backends.cuda.params import STRUCTS
from forgeattention.backends.cuda.structs import Struct
from forgeattention.codec import CodecSpec


def local_bytes(cubin: bytes) -> int:
    """Stack frame of the kernel in a cubin (an ELF file): EIATTR_FRAME_SIZE of its .nv.info section."""
    sections, names = _sections(cubin)
    info = next(data for name, data in zip(names, sections, strict=True) if name == ".nv.info")
    at, found = 0, []
    while at + 4 <= len(info):
        form, attribute, size = info[at], info[at + 1], struct.unpack_from("<H", info, at + 2)[0]
        body = info[at + 4 : at + 4 + size] if form == 4 else b""
        if attribute == 0x11 and form == 4:
            found.append(struct.unpack_from("<II", body)[1])
        at += 4 + len(body)
    assert found
    return max(found)


def _sections(elf: bytes) -> tuple[list[bytes], list[str]]:
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, strings = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    data = [elf[h[4] : h[4] + h[5]] if h[1] != 8 else b"" for h in headers]
    name_of = [data[strings][h[0] :].split(b"\0", 1)[0].decode() for h in headers]
    return data, name_of


def stack_bytes(kernel: tuple[str, nvrtc.Macros, str]) -> int:
    return local_bytes(nvrtc.cubin(*kernel))


def test_threads_compile_in_a_process_that_has_not_loaded_the_compiler(tmp_path: Path) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    code = """
from forgeattention.backends.cuda import nvrtc
started = nvrtc.start([(stem, ()) for stem in ("page_tables", "paged_append", "compact", "append_tokens")], "sm_90a")
print(all(code.result().startswith(b"\\x7fELF") for code in started))
"""
    env = os.environ | {"FORGEATTENTION_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout == "True\n", done.stderr
    assert len(list((tmp_path / "cuda").iterdir())) == 4


@pytest.mark.timeout(1800)
def test_every_kernel_compiles_with_a_small_stack() -> None:
    """All of them for both architectures: a few minutes the first time, then from the cache on disk."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    wanted = [(*kernel, arch) for kernel in unique_kernels() for arch in ("sm_80", "sm_90a")]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        sizes = list(pool.map(stack_bytes, wanted))
    assert not [(size, kernel) for size, kernel in zip(sizes, wanted) if size > tolerances.CUDA_STACK_BYTES]


TYPES = "typedef unsigned char u8; typedef unsigned u32; typedef long long i64; struct float2 { float x, y; };"


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_members_lie_where_c_puts_them(tmp_path: Path) -> None:
    lines = ["#include <cstddef>", "#include <cstdio>", TYPES]
    prints = []
    for stem, params in STRUCTS.items():
        lines += [f"namespace in_{stem} {{", params.text, "}"]
        prints += [f'printf("%zu\\n", offsetof(in_{stem}::{params.name}, {leaf.path}));' for leaf in params.leaves]
        prints.append(f'printf("%zu\\n", sizeof(in_{stem}::{params.name}));')
    (tmp_path / "members.cpp").write_text("\n".join([*lines, "int main() {", *prints, "}"]))
    program = str(tmp_path / "members")
    subprocess.run(["g++", "-std=c++17", "-w", "-o", program, str(tmp_path / "members.cpp")], check=True)
    found = map(int, subprocess.run([program], check=True, capture_output=True, text=True).stdout.split())
    wanted = [x for params in STRUCTS.values() for x in (*(leaf.offset for leaf in params.leaves), params.size)]
    assert list(found) == wanted


def values_of(params: Struct, numbers: Iterator[int]) -> dict[str, Any]:
    """A value for each member, made of rising numbers; structures as bytes."""
    out: dict[str, Any] = {}
    for field in params.fields:
        if isinstance(field.type, Struct):
            out[field.name] = field.type.pack(**values_of(field.type, numbers))
        else:
            parts = [next(numbers) for _ in field.leaves()]
            out[field.name] = parts if field.counts else parts[0]
    return out


@pytest.mark.parametrize("stem", STRUCTS)
def test_packers_fill_every_member(stem: str) -> None:
    """With any members fixed, and called twice."""
    params = STRUCTS[stem]
    names = [field.name for field in params.fields]
    for fixed in ([], names[::2], names[1::2], names[2:5], names):
        old = values_of(params, itertools.count(5000))
        pack = params.packer(**{name: old[name] for name in fixed})
        for begin in (1, 1000):
            given = values_of(params, itertools.count(begin))
            address = pack(**{name: x for name, x in given.items() if name not in fixed})
            packed = ctypes.string_at(ctypes.c_void_p.from_address(address).value, params.size)
            assert packed == params.pack(**{**given, **{name: old[name] for name in fixed}})
            leaves = [struct.unpack_from("=" + leaf.code, packed, leaf.offset)[0] for leaf in params.leaves]
            if not fixed:
                assert leaves == list(range(begin, begin + len(leaves)))


def test_packers_of_threads_do_not_meet() -> None:
    pack = STRUCTS["compact"].packer(words=7)
    with ThreadPoolExecutor(2) as pool:
        addresses = {pool.submit(pack, base=i, offsets=0, out=0).result() for i in range(2)} | {
            pack(base=3, offsets=0, out=0)
        }
    assert len(addresses) > 1


def test_tables_refuse_what_they_do_not_have() -> None:
    with pytest.raises(TypeError, match="words"):
        STRUCTS["compact"].packer()(base=0, offsets=0, out=0)
    with pytest.raises(ValueError, match=r"expected \['words'\] too; got \['bytes'\]"):
        STRUCTS["compact"].mlx_arguments({"base": 1, "offsets": 2, "bytes": 3}, ("out",))
    with pytest.raises(ValueError, match=r"\[Params\] expected words of 32 bits; got 2147483648"):
        STRUCTS["compact"].mlx_arguments({"base": 1, "offsets": 2, "words": 2**31}, ("out",))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plan_fits_the_device(case: Case) -> None:
    fmt = case.spec().page_format(case.head_dim)
    for shared, per_processor in ((232448, 233472), (166912, 167936), (101376, 102400)):
        for kv_heads in (1, 2, 3, 8, 32):
            limits = plans.Limits(108, shared, per_processor)
            plan = plans.decode_plan(fmt, kv_heads, case.group * case.n, limits)
            assert plan.query_tile * plan.query_tiles >= case.group * case.n
            assert plan.shared_bytes <= shared
            assert plan.ctas * (plan.shared_bytes + 1024) <= per_processor
            assert plan.stages * plan.stage_pages * fmt.record_bytes >= plan.query_tile * (4 * fmt.padded_dim + 40)


@pytest.mark.parametrize(
    ("head_dim", "queries", "bits", "shape"),
    [
        (64, 3, 3, (4, 8, 2, 2)),
        (128, 4, 3, (4, 8, 2, 2)),
        (128, 7, 3, (8, 12, 1, 1)),
        (128, 16, 3, (16, 8, 1, 1)),
        (256, 1, 3, (4, 16, 1, 1)),
        (256, 4, 2, (4, 16, 1, 1)),
        (256, 4, 4, (4, 8, 1, 1)),  # 16 pages of 4 bits do not fit
        (256, 8, 3, (8, 8, 1, 1)),
        (512, 4, 3, (4, 8, 1, 1)),
    ],
)
def test_shapes_are_those_that_were_measured(
    head_dim: int, queries: int, bits: int, shape: tuple[int, int, int, int]
) -> None:
    """Query tile, warps, CTAs of a multiprocessor and pages of a stage; never by the batch or the context."""
    fmt = CodecSpec(k_bits=bits, v_bits=bits).page_format(head_dim)
    plan = plans.decode_plan(fmt, 2, queries, plans.Limits())
    assert (plan.query_tile, plan.warps, plan.ctas, plan.stage_pages) == shape


def cut(plan: plans.DecodePlan, length: int) -> list[tuple[int, int]]:
    """Pages of each split, as kernels/cuda/decode_args.cuh cuts a row."""
    pages = -(-length // 64)
    stages, splits = -(-pages // plan.stage_pages), max(1, min(plan.num_splits, pages // plan.min_pages))
    begins = [min(pages, stages * i // splits * plan.stage_pages) for i in range(splits + 1)]
    return list(zip(begins, begins[1:]))


@pytest.mark.parametrize(("kv_heads", "queries"), [(1, 4), (3, 3), (8, 8), (32, 16)])
def test_splits_cover_every_page_within_the_partials(kv_heads: int, queries: int) -> None:
    plan = plans.decode_plan(CodecSpec().page_format(128), kv_heads, queries, plans.Limits())
    for length in [*range(0, 5000, 37), 32768, 131072, 524288, 1 << 20]:
        splits = cut(plan, length)
        assert [p for a, b in splits for p in range(a, b)] == list(range(-(-length // 64)))
        assert len({b - a for a, b in splits[:-1]}) <= 2
        assert plan.grid(5, kv_heads, length) == (len(splits), kv_heads * plan.query_tiles, 5)
        for exact in (0, 1, 132, 195, 512, 513, 4000):
            tasks = -(-exact // 16)
            for bound in (exact, 4096):
                assert len(splits) + tasks <= plan.partials(length, bound)


@pytest.mark.parametrize("cudnn", [False, True])
@pytest.mark.parametrize("scratch", [64, 512, 1024, 1472, 16384])
@pytest.mark.parametrize("tokens", [1, 64, 1023, 1024, 5000, 16384, 70001])
def test_prefill_takes_pieces_that_the_scratch_holds(tokens: int, scratch: int, cudnn: bool) -> None:
    """Also for so many rows that no size of cuDNN's fits."""
    from forgeattention.backends.cuda.prefill import CUDNN_TOKENS, pieces

    sizes = pieces(tokens, scratch, cudnn)
    assert sum(sizes) == tokens
    assert 0 < min(sizes) <= max(sizes) <= scratch
    assert all(size % 64 == 0 for size in sizes[:-1])
    if cudnn and scratch >= min(CUDNN_TOKENS):
        assert all(size in CUDNN_TOKENS for size in sizes[:-1])


def test_sources_name_no_toolkit_header() -> None:
    for path in (nvrtc.KERNELS / "cuda").iterdir():
        includes = [line.split()[1] for line in path.read_text().splitlines() if line.startswith("#include")]
        assert all(name.startswith('"') for name in includes), path


def test_missing_cuda_is_a_reason() -> None:
    available, reason = nvrtc.available()
    assert isinstance(available, bool)
    assert reason
    assert kernels(CASES[0])
