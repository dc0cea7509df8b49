"""Structures that kernels take, from one table each: their C text, their packing, and their entry points for MLX.

A kernel takes one structure, `Params`. Its table (params.py) is the only place that says what is in it. `Struct.text`
is put before the kernel's source when it is compiled, and `Struct.packer` fills the same bytes.
"""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

# C type -> (letter of module `struct`, bytes).
_NUMBERS = {"i64": ("q", 8), "int": ("i", 4), "float": ("f", 4)}


@dataclass(frozen=True)
class Leaf:
    """A pointer or number of a structure.

    Attributes:
        path: how C names it, "k_transform.mu" or "q_stride[1]".
        type: its C type.
        code: its letter in module `struct`.
        offset: bytes from the start of the outermost structure.
    """

    path: str
    type: str
    code: str
    offset: int

    @property
    def name(self) -> str:
        """As one word."""
        return re.sub(r"\W+", "_", self.path).strip("_")


@dataclass(frozen=True)
class Field:
    """A member: a pointer, a number, an array of either, or another structure."""

    name: str
    type: str | Struct
    comment: str
    counts: tuple[int, ...] = ()

    @property
    def declaration(self) -> str:
        sizes = "".join(f"[{n}]" for n in self.counts)
        kind = self.type.name if isinstance(self.type, Struct) else self.type
        return f"  {kind} {self.name}{sizes};" + (f"  // {self.comment}" if self.comment else "")

    def leaves(self) -> list[tuple[str, str, str, int]]:
        """Path behind the name, type, code and bytes of each part."""
        if isinstance(self.type, Struct):
            one = [(f".{x.path}", x.type, x.code, struct.calcsize(x.code)) for x in self.type.leaves]
        else:
            code, size = ("Q", 8) if self.type.endswith("*") else _NUMBERS[self.type]
            one = [("", self.type, code, size)]
        places = [""]
        for count in self.counts:
            places = [f"{place}[{i}]" for place in places for i in range(count)]
        return [(place + path, *rest) for place in places for path, *rest in one]  # type: ignore[misc]

    @cached_property
    def code(self) -> str:
        """Its letters in module `struct`; another structure is bytes."""
        if isinstance(self.type, Struct):
            return f"{self.type.size}s"
        codes = [code for _, _, code, _ in self.leaves()]
        return f"{len(codes)}{codes[0]}"


class Struct:
    """A structure.

    Args:
        name: in C.
        rows: (names, C type, comment) of its members, names divided by spaces; a type may end in counts, "i64[3]", and
            may be another structure.
        needs: structures that pointers among them point to.
    """

    def __init__(self, name: str, *rows: tuple[str, str | Struct, str], needs: tuple[Struct, ...] = ()) -> None:
        self.name, self._needs = name, needs
        self.fields: list[Field] = []
        for names, kind, comment in rows:
            base: str | Struct = kind
            counts: tuple[int, ...] = ()
            if isinstance(kind, str):
                base = kind.partition("[")[0]
                counts = tuple(map(int, re.findall(r"\[(\d+)\]", kind)))
            self.fields += [Field(x, base, comment if not i else "", counts) for i, x in enumerate(names.split())]
        self.leaves: list[Leaf] = []
        self.offsets: dict[str, int] = {}
        at = 0
        for field in self.fields:
            for i, (path, kind, code, size) in enumerate(field.leaves()):
                at = -(-at // size) * size  # as C aligns
                if i == 0:
                    if isinstance(field.type, Struct) and at % 8:
                        raise ValueError(f"[{name}] expected {field.name} at a multiple of 8 bytes; got {at}")
                    self.offsets[field.name] = at
                self.leaves.append(Leaf(field.name + path, kind, code, at))
                at += size
        most = max(struct.calcsize(leaf.code) for leaf in self.leaves)
        self.size = -(-at // most) * most

    @cached_property
    def text(self) -> str:
        """Its definition in C, with those of the structures in it."""
        inner = {x.name: x.text for x in self._needs}
        inner |= {f.type.name: f.type.text for f in self.fields if isinstance(f.type, Struct)}
        lines = [f"struct {self.name} {{", *(field.declaration for field in self.fields), "};"]
        check = f'static_assert(sizeof({self.name}) == {self.size}, "the launcher packs another structure");'
        return "".join(inner.values()) + "\n".join([*lines, check, ""])

    def pack(self, **values: Any) -> bytes:
        """The structure's bytes, from the values that `packer` takes."""
        out = bytearray(self.size)
        for field in self.fields:
            parts = values.pop(field.name)
            struct.pack_into("=" + field.code, out, self.offsets[field.name], *(parts if field.counts else (parts,)))
        if values:
            raise TypeError(f"[{self.name}] expected members of the structure; got {sorted(values)}")
        return bytes(out)

    def packer(self, **fixed: Any) -> Callable[..., int]:
        """A function that fills the structure.

        It takes the members that are not in `fixed` by keyword: pointers as addresses, arrays as flat sequences, other
        structures as bytes. It gives the address of a pointer to the structure, as cuLaunchKernel wants it, valid until
        the same thread calls again.
        """
        zeros: dict[str, Any] = {f.name: bytes(f.type.size) if isinstance(f.type, Struct) else 0 for f in self.fields}
        zeros |= {f.name: (0,) * len(f.leaves()) for f in self.fields if f.counts}
        first = self.pack(**{**zeros, **fixed})
        runs: list[list[Field]] = []
        for before, field in zip([None, *self.fields], self.fields):
            if field.name not in fixed:
                if runs and runs[-1][-1] is before:
                    runs[-1].append(field)
                else:
                    runs.append([field])
        local = threading.local()

        def ready() -> tuple[Any, int]:
            buffer = ctypes.create_string_buffer(first, self.size)
            pointer = ctypes.c_void_p(ctypes.addressof(buffer))
            local.pointer, local.pair = pointer, (buffer, ctypes.addressof(pointer))
            return local.pair

        # Written out as a function of keywords, which takes a third of the time of a loop over a dictionary.
        space: dict[str, Any] = {"local": local, "ready": ready}
        names = ", ".join(field.name for run in runs for field in run)
        lines = [f"def pack(*, {names}):" if names else "def pack():"]
        lines += ["    try:", "        buffer, address = local.pair", "    except AttributeError:"]
        lines += ["        buffer, address = ready()"]
        for i, run in enumerate(runs):
            codes, at = "", self.offsets[run[0].name]
            for field in run:
                codes += "x" * (self.offsets[field.name] - at) + field.code
                at = self.offsets[field.name] + struct.calcsize("=" + field.code)
            space[f"pack{i}"] = struct.Struct("=" + codes).pack_into
            values = ", ".join(f"*{field.name}" if field.counts else field.name for field in run)
            lines.append(f"    pack{i}(buffer, {self.offsets[run[0].name]}, {values})")
        exec("\n".join([*lines, "    return address"]), space)
        return space["pack"]

    def mlx_entry(self, kernel: str, outputs: tuple[str, ...]) -> str:
        """The text before a kernel's source that makes a function of it, called by an entry point mlx_<kernel>.

        MLX passes pointers of inputs, pointers of outputs, then numbers of 32 bits, and no null pointer: bit i of
        `present` says whether input i is one.
        """
        inputs, written, numbers = self._mlx_leaves(outputs)
        if len(inputs) > 31:
            raise ValueError(f"[mlx_{kernel}] expected at most 31 inputs; got {len(inputs)}")
        declared = [f"{x.type} {x.name}" for x in [*inputs, *written]] + ["int present"]
        declared += [f"{'float' if x.code == 'f' else 'int'} {x.name}" for x in numbers]
        fill = [f"p.{x.path} = present >> {i} & 1 ? {x.name} : nullptr;" for i, x in enumerate(inputs)]
        fill += [f"p.{x.path} = {x.name};" for x in [*written, *numbers]]
        return "#define FORGE_PARAMS const Params&\n" + " \\\n".join(
            [
                "#define FORGE_KERNEL(...)",
                f"  __device__ __forceinline__ void {kernel}(const Params&);",
                f'  extern "C" __global__ void __launch_bounds__(__VA_ARGS__) mlx_{kernel}({", ".join(declared)}) {{',
                f"    Params p; {' '.join(fill)} {kernel}(p);",
                "  }",
                "  __device__ __forceinline__ void\n",
            ]
        )

    def mlx_arguments(self, values: Mapping[str, Any], outputs: tuple[str, ...]) -> tuple[list[Any], list[Any]]:
        """Inputs and numbers for the entry point `mlx_entry` gives.

        Args:
            values: every member but the outputs by name; arrays (None for a null pointer), numbers, flat
                sequences for members of several, mappings for other structures.
            outputs: members that MLX allocates, in order.

        Raises:
            ValueError: members that are missing or too many, or numbers that 32 bits do not hold.
        """
        fields = {field.name: field for field in self.fields}
        given: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, Mapping):
                given |= {f"{name}.{key}": x for key, x in value.items()}
            elif isinstance(value, (tuple, list)) and name in fields:
                given |= dict(zip((name + path for path, *_ in fields[name].leaves()), value, strict=True))
            else:
                given[name] = value
        inputs, _, numbers = self._mlx_leaves(outputs)
        wanted = {x.path for x in [*inputs, *numbers]}
        if set(given) != wanted:
            raise ValueError(
                f"[{self.name}] expected {sorted(wanted - set(given))} too; got {sorted(set(given) - wanted)}"
            )
        arrays = [given[x.path] for x in inputs]
        some = next(x for x in arrays if x is not None)
        out: list[Any] = [sum(1 << i for i, x in enumerate(arrays) if x is not None)]
        for x in numbers:
            value = given[x.path]
            if x.code == "f":
                (value,) = struct.unpack("f", struct.pack("f", value))  # MLX takes only floats that 32 bits hold
            elif not -(2**31) <= value < 2**31:
                raise ValueError(f"[{self.name}] expected {x.path} of 32 bits; got {value}")
            out.append(value if x.code == "f" else int(value))
        return [some if x is None else x for x in arrays], out

    def _mlx_leaves(self, outputs: tuple[str, ...]) -> tuple[list[Leaf], list[Leaf], list[Leaf]]:
        pointers = [x for x in self.leaves if x.code == "Q"]
        by_path = {x.path: x for x in pointers}
        return (
            [x for x in pointers if x.path not in outputs],
            [by_path[name] for name in outputs],
            [x for x in self.leaves if x.code != "Q"],
        )


class SharedLayout:
    """Dynamic shared memory of a CTA: named parts behind each other, each at a multiple of 16 bytes.

    Args:
        parts: bytes of each part, in order.
    """

    def __init__(self, **parts: int) -> None:
        self.starts: dict[str, int] = {}
        at = 0
        for name, size in parts.items():
            self.starts[name] = at
            at = -(-(at + size) // 16) * 16
        self.bytes = at

    @property
    def macros(self) -> dict[str, int]:
        """Where each part begins: FORGE_AT_<NAME>."""
        return {f"FORGE_AT_{name.upper()}": start for name, start in self.starts.items()}
