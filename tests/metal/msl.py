"""The text of a Metal kernel: as MLX generates it, and as C++ for the headers in shim/."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

MAX_CONSTANT_ARRAY = 8
"""MLX passes inputs of fewer elements in the constant address space."""

_TYPES = {
    "bool": "bool",
    "uint8": "uint8_t",
    "uint16": "uint16_t",
    "uint32": "uint32_t",
    "uint64": "uint64_t",
    "int8": "int8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "int64": "int64_t",
    "float16": "float16_t",
    "bfloat16": "bfloat16_t",
    "float32": "float",
}
_ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}
_EMULATED = {
    **{a: f"ids.{a}" for a in _ATTRIBUTES if "quadgroup" not in a},
    "grid_size": "ids.threads_per_grid",
    "thread_execution_width": "32",
    "threads_per_simdgroup": "32",
}

Template = Sequence[tuple[str, "str | int | bool"]]
"""Template arguments in order: a name with an int, a bool or a dtype name such as "float16"."""


class EmulatorError(AssertionError):
    """A fault in a kernel or its launch. `kind` names it."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"[{kind}] {message}")
        self.kind = kind


class BFloat16:
    """A bfloat16 array: its bits as uint16, since NumPy has no such dtype."""

    dtype = "bfloat16"

    def __init__(self, bits: NDArray[np.uint16]) -> None:
        self.bits = np.ascontiguousarray(bits, np.uint16)
        self.shape, self.ndim, self.size = self.bits.shape, self.bits.ndim, self.bits.size

    @classmethod
    def rounded(cls, x: NDArray) -> BFloat16:
        """The nearest bfloat16 values, ties to even."""
        u = np.ascontiguousarray(x, np.float32).view(np.uint32)
        return cls(((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16))

    def float32(self) -> NDArray[np.float32]:
        return (self.bits.astype(np.uint32) << 16).view(np.float32)


Array = NDArray | BFloat16


def type_name(dtype: object) -> str:
    return _TYPES[dtype if isinstance(dtype, str) else np.dtype(dtype).name]  # type: ignore[call-overload]


def mlx_source(
    name: str,
    header: str,
    source: str,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, str],
    template: Template = (),
) -> tuple[str, str]:
    """The kernel's name and whole text as `mx.fast.metal_kernel` generates them.

    Args:
        name: the kernel's name as given to MLX.
        header: text before the kernel.
        source: the kernel's body.
        inputs: arrays by name, in order.
        outputs: dtype names by output name, in order.
        template: template arguments in order.
    """
    values = [_TYPES[v] if isinstance(v, str) else str(int(v)) for _, v in template]
    arguments = "<" + ", ".join(values) + ">" if template else ""
    kernel = f"custom_kernel_{name}" + ("__" + "_".join(values) if template else "")
    for array in inputs.values():
        kernel += "_" + type_name(array.dtype)
        kernel += "s" if array.ndim == 0 else "c" if array.size < MAX_CONSTANT_ARRAY else ""
    for dtype in outputs.values():
        kernel += "_" + _TYPES[dtype]

    parameters: list[str] = []
    for key, array in inputs.items():
        space, mark = "constant" if array.size < MAX_CONSTANT_ARRAY else "device", "&" if array.ndim == 0 else "*"
        parameters.append(f"const {space} {type_name(array.dtype)}{mark} {key} [[buffer({len(parameters)})]]")
        if array.ndim > 0:
            for suffix, declared in (("shape", "int*"), ("strides", "int64_t*"), ("ndim", "int&")):
                if f"{key}_{suffix}" in source:
                    parameters.append(f"const constant {declared} {key}_{suffix} [[buffer({len(parameters)})]]")
    for key, dtype in outputs.items():
        parameters.append(f"device {_TYPES[dtype]}* {key} [[buffer({len(parameters)})]]")
    parameters += [f"{t} {a} [[{a}]]" for a, t in _ATTRIBUTES.items() if a in source]

    text = header
    if template:
        kinds = ["typename" if isinstance(v, str) else "bool" if isinstance(v, bool) else "int" for _, v in template]
        text += "template <" + ", ".join(f"{k} {n}" for k, (n, _) in zip(kinds, template)) + ">\n"
    text += f"[[kernel]] void {kernel}(\n" + ",\n".join(f"  {p}" for p in parameters) + ") {\n" + source + "\n}\n"
    if template:
        named = kernel + arguments
        text += f'\ntemplate [[host_name("{kernel}")]] [[kernel]] decltype({named}) {named};\n'
    return kernel, text


_TYPE_NAME = r"(?:metal::|forge::)*\w+(?:\s*<[^<>;(){}]*>)?"
_POINTER = re.compile(
    rf"(?P<before>\bconst\s+)?\b(?P<space>device|threadgroup|constant)\s+(?P<after>const\s+)?(?P<type>{_TYPE_NAME})"
    r"(?P<east>\s+const)?\s*(?P<mark>[*&])"
)
_VARIABLE = re.compile(
    r"(?:\balignas\((?P<align>\d+)\)\s+)?"
    rf"\bthreadgroup\s+(?P<type>{_TYPE_NAME})\s+(?P<name>\w+)\s*(?P<dims>(?:\[[^\]]*\]\s*)*);"
)


def _pointer(match: re.Match[str]) -> str:
    const = any(match[group] for group in ("before", "after", "east"))
    kind = "ptr" if match["mark"] == "*" else "ref"
    if kind == "ref" and (const or match["space"] == "constant"):
        return f"const {match['type']}&"
    element = f"const {match['type']}" if const or match["space"] == "constant" else match["type"]
    return f"msl::{match['space']}_{kind}<{element}>"


def _variable(match: re.Match[str]) -> str:
    dims = re.findall(r"\[([^\]]*)\]", match["dims"])
    if len(dims) != 1:
        raise EmulatorError("translation", f"expected a one-dimensional threadgroup array; got {match[0]}")
    kind, name, align = match["type"], match["name"], match["align"] or f"alignof({match['type']})"
    return f'static msl::threadgroup_storage<{kind}, {dims[0]}, {align}> {name}_; auto {name} = {name}_.get("{name}");'


def translate(text: str, body: str) -> str:
    """MSL as generated by `mlx_source` to C++ for the shim; `body` is the kernel's own body within it."""
    outside, inside = text.replace(body, "\0"), body
    if _VARIABLE.search(outside):
        raise EmulatorError("translation", "threadgroup variables must be declared in the kernel's body")
    inside = _VARIABLE.sub(_variable, inside)
    cpp = re.sub(r"\ntemplate \[\[host_name.*", "\n", outside).replace("\0", inside)
    cpp = _POINTER.sub(_pointer, cpp)
    # The shared header asks g++, too, to unroll; that would double the compile time.
    cpp = cpp.replace('_Pragma("GCC unroll 4")', "")
    return re.sub(r"\breinterpret_cast\s*<(msl::\w+_ptr<[^>]*>)>", r"\1", cpp)


def _checked(pointer: str, element: str, region: int) -> str:
    return f"{pointer}<{element}>(reinterpret_cast<{element}*>(r[{region}].begin), &r[{region}])"


def entry_point(
    kernel: str, inputs: Mapping[str, Array], outputs: Mapping[str, str], source: str, template: Template
) -> str:
    """C++ that launches the kernel over memory regions, one for each buffer in the order of the kernel's parameters."""
    arguments, region = [], 0
    for key, array in inputs.items():
        kind = type_name(array.dtype)
        space = "constant" if array.size < MAX_CONSTANT_ARRAY else "device"
        if array.ndim == 0:
            arguments.append(f"*reinterpret_cast<const {kind}*>(r[{region}].begin)")
        else:
            arguments.append(_checked(f"msl::{space}_ptr", f"const {kind}", region))
        region += 1
        if array.ndim > 0:
            for suffix, kind in (("shape", "int"), ("strides", "int64_t"), ("ndim", "int")):
                if f"{key}_{suffix}" in source:
                    value = f"*reinterpret_cast<const {kind}*>(r[{region}].begin)"
                    pointer = _checked("msl::constant_ptr", f"const {kind}", region)
                    arguments.append(value if suffix == "ndim" else pointer)
                    region += 1
    for dtype in outputs.values():
        arguments.append(_checked("msl::device_ptr", _TYPES[dtype], region))
        region += 1
    for attribute, kind in _ATTRIBUTES.items():
        if attribute in source:
            value = _EMULATED[attribute]
            arguments.append(f"uint3({value}.x, {value}.y, {value}.z)" if kind == "uint3" else value)
    values = [_TYPES[v] if isinstance(v, str) else str(int(v)) for _, v in template]
    call = kernel + ("<" + ", ".join(values) + ">" if template else "")
    return f"""
static void msl_thread_main(msl::Region* r, const msl::ThreadIds& ids) {{
  {call}({", ".join(arguments)});
}}
extern "C" __attribute__((visibility("default"))) int msl_launch(msl::Launch* launch) {{
  return msl::run(launch, msl_thread_main);
}}
"""
