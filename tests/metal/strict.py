"""What Apple's front end would say of the kernels, asked of clang: the text that MLX hands to the compiler against the
declarations of strict.h. Nothing runs and no Mac is needed.

    PYTHONPATH=src:tests python -m metal.strict [--full] [--jobs N]

clang 19 or newer is needed ($CLANG, or what `find_clang` finds). The text of each kernel function is read twice:

`spaces`: C++ for OpenCL 2021, clang's language nearest to Metal. Address spaces are real. Refused are conversions and
    casts between them, variables at namespace scope outside of constant memory (a `constexpr` too), static locals,
    threadgroup variables outside of kernels, function pointers, exceptions, virtual functions, `new`, variable-length
    arrays, narrowing in braces, library functions with types that Metal's do not take, barrier flags that are not
    constant. From the syntax tree: pointers and references without an address space, `goto`, and lambdas, which the
    language has since MSL 3.2 (macOS 15) only.
`cxx14`: C++14, the base of MSL 3.1, with -Wall -Wextra -Wconversion -pedantic.

Threadgroup memory (at most 32 KB) and buffers (at most 31) of every function are counted besides. What this is not:
Apple's front end or headers; library signatures are the specification's text.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from forgeattention.backends.metal.launch import BODY, KERNELS, Launch, kernel_text

from .msl import mlx_source

HERE = Path(__file__).parent
OLDEST = 19
MAX_BUFFERS, MAX_THREADGROUP_BYTES = 31, 32768
BLOCK = 40
"""Kernel functions that are compiled in one call."""
_COMMON = ["-fsyntax-only", "-I", str(HERE), "-include", "strict.h", "-ferror-limit=0", "-Wno-unknown-attributes"]
_NO_GLOBALS = "-cl-ext=-__opencl_c_program_scope_global_variables,-__opencl_c_device_enqueue"
READINGS = {
    "spaces": [
        *("-x", "cl", "-cl-std=clc++2021", "-cl-no-stdinc", "-Xclang", _NO_GLOBALS, "-DSTRICT_SPACES"),
        *("-target", "x86_64"),
    ],
    "cxx14": [
        *("-x", "c++", "-std=c++14", "-target", "x86_64", "-pedantic", "-Wall", "-Wextra", "-Wconversion"),
        *("-Wno-sign-conversion", "-Wno-sign-compare", "-Wno-implicit-int-float-conversion", "-Wno-unused-function"),
        # `if constexpr` is an extension that MLX's own kernels use under MSL 3.1
        *("-Wno-unused-parameter", "-Wno-undefined-inline", "-Wno-undefined-internal", "-Wno-c++17-extensions"),
    ],
}
_TYPES = {"float32": "float", "float16": "half", "bfloat16": "bfloat"}
_FUNCTION = re.compile(r"(template <[^>]*>\n)?\[\[kernel\]\] void (\w+)\(\n", re.S)
_THREADGROUP = re.compile(r"^ *(?:alignas\(\d+\) )?threadgroup \w+ (\w+)\[", re.M)
_MESSAGE = re.compile(r"^(?:.*/)?([\w.]+):(\d+):\d+: (?:fatal )?(error|warning): (.*)$", re.M)
_DECLARATION = re.compile(r"\b(ParmVarDecl|VarDecl|FieldDecl|FunctionDecl|CXXMethodDecl) 0x\w+ (.*)")
_HEAD = re.compile(
    r"(?:prev 0x\w+ )?<.*?> (?:\S+ )?(?:used |referenced |constexpr |invalid )*"
    r"((?!used|referenced)\w+|operator\S+) '([^']*)'"
)


@cache
def find_clang() -> str | None:
    """The path of a clang that is new enough, or None."""
    names = [os.environ.get("CLANG"), *(f"clang-{version}" for version in range(25, OLDEST - 1, -1)), "clang"]
    for path in filter(None, (shutil.which(name) for name in names if name)):
        said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"clang version (\d+)", said)
        if version and int(version[1]) >= OLDEST:
            return path
    return None


def compile_text(reading: str, text: str, extra: Sequence[str] = ()) -> str:
    """Everything that clang prints of a text in one reading."""
    compiler = find_clang()
    assert compiler is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.metal"
        path.write_text(text)
        command = [compiler, *READINGS[reading], *_COMMON, *extra, str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr + done.stdout


def _lines(kernel: str) -> Iterator[tuple[int, str, str, int]]:
    """The lines of `kernel_text`: part (0 header, 1 body), text, file, and line number there."""
    seen: set[Path] = set()

    def expand(path: Path) -> Iterator[tuple[int, str, str, int]]:
        if path in seen:
            return
        seen.add(path)
        for number, line in enumerate(path.read_text().partition(BODY)[0].splitlines(True), 1):
            if include := re.match(r'#include "(.+)"\n', line):
                yield from expand((path.parent / include[1]).resolve())
            elif line != "#pragma once\n":
                yield 0, line, path.name, number

    path = (KERNELS / f"{kernel}.metal").resolve()
    yield from expand(path)
    header, _, body = path.read_text().partition(BODY)
    for number, line in enumerate(body.splitlines(True), header.count("\n") + 2):
        yield 1, line, path.name, number


def numbered(kernel: str) -> tuple[str, str]:
    """Header and body of a kernel as `kernel_text` gives them, with a #line wherever a file or line is skipped."""
    parts, plain = ["", ""], ["", ""]
    before: tuple[int, str, int] | None = None
    for part, line, name, number in _lines(kernel):
        if before != (part, name, number - 1):
            parts[part] += f'#line {number} "{name}"\n'
        parts[part] += line
        plain[part] += line
        before = (part, name, number)
    assert tuple(plain) == kernel_text(kernel)
    return parts[0], parts[1]


def generated(launch: Launch) -> tuple[str, str, str, str]:
    """As MLX generates them: the kernel function's name, what stands before the body and after it, and the body."""
    header, body = kernel_text(launch.kernel)
    dtypes = {k: d for k, (_, d) in launch.outputs.items()}
    name = f"forgeattention_{launch.kernel}"
    name, text = mlx_source(name, header, body, launch.inputs, dtypes, launch.template)
    before, after = text[len(header) :].split(body)
    return name, before, after, body


def instance(launch: Launch, reading: str, body: str) -> str:
    """One kernel function for clang; `body` is its numbered body."""
    name, before, after, plain = generated(launch)
    if sizes := [f"sizeof({v})" for v in _THREADGROUP.findall(plain)]:
        body += f'\n  static_assert({" + ".join(sizes)} <= {MAX_THREADGROUP_BYTES}, "too much threadgroup memory");\n'
    if reading == "spaces":
        # Kernel functions are no templates there: the arguments become constants of the function.
        match = _FUNCTION.match(before)
        assert match, before
        constants = ""
        for key, value in launch.template:
            if isinstance(value, str):
                constants += f"  typedef {_TYPES[value]} {key};\n"
            else:
                constants += f"  constexpr {'bool' if isinstance(value, bool) else 'int'} {key} = {int(value)};\n"
        return f"kernel void {name}(\n{before[match.end() :]}{constants}{body}\n}}\n"
    body = re.sub(r"^( *(?:alignas\(\d+\) )?)(?=threadgroup \w+ \w+\[)", r"\1static ", body, flags=re.M)
    before = before.replace("[[kernel]]", "" if launch.template else "__attribute__((used))")
    return before + body + re.sub(r"\[\[(host_name\(.*?\)|kernel)\]\]", "", after)


def check(launches: Iterable[Launch], jobs: int = 1) -> tuple[Counter[str], list[str]]:
    """Compiles every distinct kernel function among the launches in both readings.

    Returns:
        How many functions each kernel has, and what was found: "file:line error: ..." with how often it was said.
    """
    named: dict[str, dict[str, Launch]] = defaultdict(dict)
    for launch in launches:
        named[launch.kernel].setdefault(generated(launch)[0], launch)
    found: Counter[str] = Counter()
    work: list[tuple[str, str, str]] = []
    for kernel, instances in sorted(named.items()):
        header, body = numbered(kernel)
        for reading in READINGS:
            texts = [instance(launch, reading, body) for launch in instances.values()]
            work += [(kernel, reading, header + "".join(texts[i : i + BLOCK])) for i in range(0, len(texts), BLOCK)]
        for name, launch in instances.items():
            if (buffers := generated(launch)[1].count("[[buffer(")) > MAX_BUFFERS:
                found[f"{kernel} error: {buffers} buffers, at most {MAX_BUFFERS}: {name}"] += 1
        found.update(declarations(next(iter(instances.values()))))

    def compiled(item: tuple[str, str, str]) -> list[str]:
        kernel, reading, text = item
        said = compile_text(reading, text)
        messages = [f"{file}:{line} {kind}: {what}" for file, line, kind, what in _MESSAGE.findall(said)]
        return messages if messages or not said else [f"{kernel} error: {said[:500]}"]

    with ThreadPoolExecutor(jobs) as pool:
        for messages in pool.map(compiled, work):
            found.update(messages)
    return Counter({k: len(v) for k, v in named.items()}), [f"{m} ({times} times)" for m, times in found.items()]


def without_space(dump: str) -> list[str]:
    """Declarations in a syntax tree whose own type has a pointer or reference without an address space."""
    found = []
    for kind, rest in _DECLARATION.findall(dump):
        head = _HEAD.match(rest)
        if head and " implicit " not in rest and re.search(r"__generic [^,)]*[*&]", head[2]):
            found.append(f"{kind} {head[1]} '{head[2]}'")
    return sorted(set(found))


DUMP = ["-Xclang", "-ast-dump", "-fno-color-diagnostics"]
"""Makes `compile_text` give the syntax tree."""


def declarations(launch: Launch) -> list[str]:
    """What only the syntax tree tells, for one launch: pointers without an address space, lambdas, goto."""
    header, body = numbered(launch.kernel)
    dump = compile_text("spaces", header + instance(launch, "spaces", body), DUMP)
    found = [f"no address space: {x}" for x in without_space(dump)]
    found += [f"lambda at {x}" for x in set(re.findall(r"LambdaExpr .* '\(lambda at ([^)]*)\)'", dump))]
    return [f"{launch.kernel} error: {x}" for x in [*found, *(["goto"] if "GotoStmt" in dump else [])]]


def main() -> int:
    from .launches import launches

    parser = argparse.ArgumentParser(description="Read the Metal kernels as Apple's compiler would, with clang.")
    parser.add_argument(
        "--full", action="store_true", help="every page format with every head_dim: an hour of one core"
    )
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    if find_clang() is None:
        print(f"clang {OLDEST} or newer was not found", file=sys.stderr)
        return 2
    counts, found = check(launches(args.full), args.jobs)
    for kernel, count in sorted(counts.items()):
        print(f"{kernel:18} {count:6} functions")
    print("\n".join(found) or "nothing found")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
