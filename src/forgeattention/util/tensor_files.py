"""Files of arrays under a checksum: safetensors, replaced whole, and on disk before they take their name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .files import replaced

Tensors = dict[str, NDArray[Any]]
Metadata = dict[str, str]


def save_tensors(
    path: str | os.PathLike[str], tensors: Tensors, metadata: Mapping[str, str], *, mode: int = 0o644
) -> None:
    """Writes a file that `load_tensors` reads.

    Args:
        path: the file.
        tensors: arrays by name.
        metadata: texts by name; "sha256" is added, of all else.
        mode: permissions of the file.
    """
    path = Path(path)
    told = {**metadata, "sha256": checksum(tensors, metadata)}
    with replaced(path, mode=mode) as temporary:
        save_file(tensors, temporary, told)
        _sync(temporary)
    _sync(path.absolute().parent)


def load_tensors(path: str | os.PathLike[str], op: str, wanted: Mapping[str, str]) -> tuple[Metadata, Tensors]:
    """Reads a file of `save_tensors`.

    Args:
        path: the file.
        op: who asks, for messages.
        wanted: metadata that the file must have.

    Returns:
        Metadata without "sha256", and arrays by name.

    Raises:
        ValueError: a damaged file, or other metadata.
    """
    metadata, tensors = _read(path, op, with_tensors=True)
    claimed = metadata.pop("sha256", None)
    _check(op, metadata, wanted)
    expect(op, "checksum", checksum(tensors, metadata), claimed)
    return metadata, tensors


def load_metadata(path: str | os.PathLike[str], op: str, wanted: Mapping[str, str]) -> Metadata:
    """The metadata of such a file, without its arrays and before its checksum is looked at; arguments and errors as of
    `load_tensors`."""
    metadata, _ = _read(path, op, with_tensors=False)
    _check(op, metadata, wanted)
    return metadata


def json_field(op: str, metadata: Mapping[str, str], name: str) -> Any:
    """What a text of the metadata says as JSON. Raises ValueError where it is none."""
    try:
        return json.loads(metadata[name])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"[{op}] expected {name} as JSON; got {type(error).__name__}") from None


def expect(op: str, what: str, expected: Any, got: Any) -> None:
    """Raises ValueError unless both are equal."""
    if expected != got:
        raise ValueError(f"[{op}] expected {what} {expected!r}; got {got!r}")


def checksum(tensors: Tensors, metadata: Mapping[str, str]) -> str:
    """SHA-256 of metadata and arrays, with their names, dtypes and shapes."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _check(op: str, metadata: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    for name, want in wanted.items():
        expect(op, "format version" if name == "version" else name, want, metadata.get(name))


def _read(path: str | os.PathLike[str], op: str, with_tensors: bool) -> tuple[Metadata, Tensors]:
    try:
        with safe_open(os.fspath(path), framework="np") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()} if with_tensors else {}  # noqa: SIM118
    except (SafetensorError, TypeError, AttributeError) as error:  # the latter two: a dtype that NumPy has not
        raise ValueError(f"[{op}] expected a complete safetensors file; got {path}: {error}") from None
    return metadata, tensors


def _sync(path: str | os.PathLike[str]) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
