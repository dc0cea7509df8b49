"""What can be said of the CUDA kernels without a GPU: they compile, their stack is small, launches are shaped right."""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import tolerances
from cuda_cases import CASES, Case, kernels, unique_kernels

from forgeattention.backends.cuda import nvrtc, plans
from forgeattention.backends.cuda import params as args
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


def stack_bytes(kernel: tuple[str, args.Macros, str]) -> int:
    return local_bytes(nvrtc.cubin(*kernel))


@pytest.mark.timeout(1800)
def test_every_kernel_compiles_with_a_small_stack() -> None:
    """All of them for both architectures: a few minutes the first time, then from the cache on disk."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    wanted = [(*kernel, arch) for kernel in unique_kernels() for arch in ("sm_80", "sm_90a")]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        sizes = list(pool.map(stack_bytes, wanted))
    assert not [(size, kernel) for size, kernel in zip(sizes, wanted) if size > tolerances.CUDA_STACK_BYTES]


def test_structures_have_no_gaps_that_differ() -> None:
    assert ctypes.sizeof(args.DecodeParams) % 8 == 0
    assert ctypes.sizeof(args.TransformArgs) == 48


def flat(kind: type, numbers: Iterator[int]) -> tuple[Any, list[Any]]:
    """A value of a ctypes type made of rising numbers, and what a packer is given for it."""
    if issubclass(kind, ctypes.Structure):
        value = kind(*(flat(field[1], numbers)[0] for field in kind._fields_))
        return value, [bytes(value)]
    if issubclass(kind, ctypes.Array):
        parts = [next(numbers) for _ in range(kind._length_)]
        return kind(*parts), parts
    number = next(numbers)
    return number, [number]


@pytest.mark.parametrize(
    "params",
    [
        args.DecodeParams,
        args.EncodeParams,
        args.DecodePagesParams,
        args.ScoresParams,
        args.AppendTokensParams,
        args.EncodeLayersParams,
        args.PageTablesParams,
        args.PagedAppendParams,
        args.MergeParams,
        args.TurnQueriesParams,
        args.MergePartsParams,
    ],
    ids=lambda params: params.__name__,
)
def test_packed_parameters_are_those_of_ctypes(params: type[ctypes.Structure]) -> None:
    pack = args.Packer(params)
    for begin in (1, 1000):
        numbers = itertools.count(begin)
        parts = [flat(field[1], numbers) for field in params._fields_]
        want = params(*(value for value, _ in parts))
        assert bytes(pack(*(x for _, given in parts for x in given))) == bytes(want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plan_fits_the_device(case: Case) -> None:
    fmt = case.spec().page_format(case.head_dim)
    for shared, per_processor in ((232448, 233472), (166912, 167936), (101376, 102400)):
        for kv_heads in (1, 2, 3, 8, 32):
            limits = plans.Limits(108, shared, per_processor)
            plan = plans.decode_plan(fmt, kv_heads, case.group * case.n, limits)
            assert plan.queries * plan.blocks >= case.group * case.n
            assert plan.shared_bytes <= shared
            assert plan.ctas * (plan.shared_bytes + 1024) <= per_processor
            assert plan.groups * plan.pages * fmt.record_bytes >= plan.queries * (4 * fmt.padded_dim + 40)


def cut(plan: plans.DecodePlan, length: int) -> list[tuple[int, int]]:
    """Pages of each chunk, as kernels/cuda/decode_args.cuh cuts a row."""
    pages = -(-length // 64)
    groups, chunks = -(-pages // plan.pages), max(1, min(plan.chunks, pages // plan.min_pages))
    begins = [min(pages, groups * i // chunks * plan.pages) for i in range(chunks + 1)]
    return list(zip(begins, begins[1:]))


@pytest.mark.parametrize(("kv_heads", "queries"), [(1, 4), (3, 3), (8, 8), (32, 16)])
def test_chunks_cover_every_page_within_the_slots(kv_heads: int, queries: int) -> None:
    plan = plans.decode_plan(CodecSpec().page_format(128), kv_heads, queries, plans.Limits())
    for length in [*range(0, 5000, 37), 32768, 131072, 524288, 1 << 20]:
        chunks = cut(plan, length)
        assert [p for a, b in chunks for p in range(a, b)] == list(range(-(-length // 64)))
        assert len({b - a for a, b in chunks[:-1]}) <= 2
        assert plan.grid(5, kv_heads, length) == (len(chunks), kv_heads * plan.blocks, 5)
        for exact in (0, 1, 132, 195, 512, 513, 4000):
            tasks = -(-exact // 16)
            for bound in (exact, 4096):
                assert len(chunks) + tasks <= plan.slots(length, bound)


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
