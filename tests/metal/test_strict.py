"""What Apple's compiler refuses is planted and seen; then the kernels are read (strict.py)."""

import re

import pytest

from .launches import launches
from .strict import DUMP, OLDEST, check, compile_text, find_clang, generated, instance, numbered, without_space

pytestmark = pytest.mark.skipif(find_clang() is None, reason=f"clang {OLDEST} or newer is not installed")

HEAD = "namespace forge {\n%s\n}\n"
KERNEL = (
    "kernel void k(const device float* a, const constant float* c, device float* o, const constant int& n) {\n%s\n}\n"
)
ERROR, TREE = "an error", "a declaration without address space"
# By name: what stands in the namespace, the kernel's body, what must be found (or the text that must be said).
FAULTS = {
    "reference without address space": (
        "inline void f(float& x) { x = 1.0f; }",
        "float x; forge::f(x); o[0] = x;",
        TREE,
    ),
    "pointer without address space": (
        "inline float f(const float* x) { return x[0]; }",
        "float x[2] = {}; o[0] = forge::f(x);",
        TREE,
    ),
    "array reference without address space": (
        "inline float f(const float (&x)[2]) { return x[0]; }",
        "float x[2] = {}; o[0] = forge::f(x);",
        TREE,
    ),
    "local pointer without address space": ("", "float x[2] = {}; float* p = x; o[0] = p[0];", TREE),
    "pointer without address space in a class": (
        "struct S { float* p; };",
        "forge::S s; s.p = nullptr; o[0] = 1.0f;",
        TREE,
    ),
    "device as threadgroup": (
        "inline float f(const threadgroup float* x) { return x[0]; }",
        "o[0] = forge::f(a);",
        ERROR,
    ),
    "constant as device": ("inline float f(const device float* x) { return x[0]; }", "o[0] = forge::f(c);", ERROR),
    "cast between spaces": ("", "o[0] = ((const threadgroup float*)a)[0];", ERROR),
    "device to thread reference": ("inline void f(thread float& x) { x = 1.0f; }", "forge::f(o[0]);", ERROR),
    "write to constant": ("inline void f(const constant float* x) { x[0] = 1.0f; }", "forge::f(c);", ERROR),
    "constexpr at namespace scope": ("constexpr int N = 4;", "o[forge::N] = 1.0f;", "program scope variable"),
    "const at namespace scope": ("const float X = 4.0f;", "o[0] = forge::X;", "program scope variable"),
    "static local": ("", "static int s = 0; o[0] = float(s);", ERROR),
    "threadgroup variable in a function": (
        "inline float f() { threadgroup float s[4]; return s[0]; }",
        "o[0] = forge::f();",
        ERROR,
    ),
    "int and uint": ("", "o[0] = float(min(n, 3u));", ERROR),
    "half and float": ("", "o[0] = max(a[0], half(1.0h));", ERROR),
    "shuffle of long": ("", "o[0] = float(simd_shuffle_xor(long(n), ushort(1)));", ERROR),
    "or of float": ("", "o[0] = simd_or(a[0]);", ERROR),
    "dot of char4": ("", "o[0] = float(dot(char4(1, 2, 3, 4), char4(1, 2, 3, 4)));", ERROR),
    "a function that precise:: lacks": ("", "o[0] = precise::popcount(a[0]);", ERROR),
    "narrowing": ("", "const char x[2] = {n, 0}; o[0] = float(x[0]);", ERROR),
    "vector conversion": ("", "const float4 x = int4(0); o[0] = x.x;", ERROR),
    "goto": ("", "goto end; end: o[0] = 1.0f;", "GotoStmt"),
    "lambda": ("", "const auto f = [&](int i) { return a[i]; }; o[0] = f(1);", "LambdaExpr"),
    "array of variable length": ("", "float x[n]; x[0] = 1.0f; o[0] = x[0];", ERROR),
    "barrier flags at run time": (
        "",
        "const mem_flags f = n > 0 ? mem_flags::mem_device : mem_flags::mem_none; threadgroup_barrier(f); o[0] = 1.0f;",
        ERROR,
    ),
    "virtual function": ("struct S { virtual float f() { return 1.0f; } };", "forge::S s; o[0] = s.f();", ERROR),
    "exception": ("", "throw 1; o[0] = 1.0f;", ERROR),
    "function pointer": (
        "inline float f(float x) { return x; }",
        "float (*g)(float) = forge::f; o[0] = g(1.0f);",
        ERROR,
    ),
    "new": ("", "device int* p = new int(1); o[0] = float(p[0]);", ERROR),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name):
    head, body, want = FAULTS[name]
    said = compile_text("spaces", HEAD % head + KERNEL % body, DUMP)
    if want == ERROR:
        assert re.search(r"^\S+ error: ", said, re.M)
    elif want == TREE:
        assert without_space(said)
    else:
        assert want in said


def test_nothing_is_said_of_what_is_right():
    head = "inline float f(const device float* x, thread float& y) { y = x[0]; return precise::sqrt(y); }"
    said = compile_text("spaces", HEAD % head + KERNEL % "float y; o[0] = forge::f(a, y) + c[n];", DUMP)
    assert "error:" not in said
    assert not without_space(said)


def test_threadgroup_memory_is_counted():
    shown = {}
    for launch in launches():
        if launch.kernel not in shown:
            text = instance(launch, "cxx14", numbered(launch.kernel)[1])
            arrays = len(re.findall(r"\bthreadgroup \w+ \w+\[", generated(launch)[3]))
            assert text.count("static threadgroup ") == arrays
            assert ("too much threadgroup memory" in text) == (arrays > 0)
            shown[launch.kernel] = arrays
    assert shown["prefill_attention"] == 2
    assert sum(shown.values()) == 9


def test_the_kernels_are_taken():
    counts, found = check(launches())
    assert not found
    assert counts.keys() == {
        *("compact", "decode_attention", "decode_pages", "encode", "merge_attention", "prefill_attention", "qk_scores"),
        *("sparse_attention", "sparse_scores", "sparse_threshold", "value_sum"),
    }
