"""Saved caches: what comes back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from forgeattention import CodecSpec
from forgeattention.cache import LayerCache, TorchArrays, load, save
from forgeattention.codec import Codec
from forgeattention.util import tensor_files

SPEC = CodecSpec(k_bits=2, v_bits=3, sinks=3, window=10)
CODECS = {0: Codec(SPEC, 64, 1), 5: Codec(SPEC, 80, 2)}


def layers(dtype: torch.dtype = torch.float32) -> dict[int, LayerCache]:
    made = {}
    for number, codec in CODECS.items():
        cache = LayerCache(codec, 3, TorchArrays(), str(dtype).removeprefix("torch."), backend="reference")
        keep = np.ones((3, 200), np.bool_)
        keep[0, :90] = False
        keep[1] = False
        random = torch.Generator().manual_seed(number)
        shape = (3, codec.kv_heads, 200, codec.head_dim)
        cache.append(*(torch.randn(shape, generator=random).to(dtype) for _ in range(2)), keep)
        cache.select([0, 2, 2, 1])
        made[number] = cache
    return made


def read(path: Path, codecs: dict[int, Codec] = CODECS, model: str = "m", **options: Any) -> Any:
    return load(path, codecs, model, TorchArrays(), backend="reference", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_saved_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = layers(dtype)
    save(tmp_path / "cache", saved, "m", {"runs": [3, [1, 0]]})
    loaded, extra = read(tmp_path / "cache")
    assert extra == {"runs": [3, [1, 0]]}
    for number, old in saved.items():
        new = loaded[number]
        assert new.dtype == old.dtype
        assert new.lengths.tolist() == old.lengths.tolist() == [110, 200, 200, 0]
        pages = np.unique(np.concatenate([old.row_pages(i) for i in range(4)]))
        assert new.pool.in_use == old.pool.in_use == len(pages)
        q = torch.randn(4, 2 * old.codec.kv_heads, 1, old.codec.head_dim)
        for a, b in zip(old.attend(q, 0.1, causal=False), new.attend(q, 0.1, causal=False)):
            assert torch.equal(a, b)
        new.append(*(torch.randn(4, old.codec.kv_heads, 70, old.codec.head_dim).to(dtype) for _ in range(2)))
        assert new.lengths.tolist() == [180, 270, 270, 70]


def test_an_existing_file_stays_whole_until_the_new_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache"
    save(path, layers(), "first")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tensor_files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, layers(), "second")
    monkeypatch.undo()
    read(path, model="first")
    assert os.listdir(tmp_path) == ["cache"]


def test_truncated(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    save(path, layers(), "m")
    data = path.read_bytes()
    for size in (0, 4, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"\[cache.load\] expected a complete safetensors file; got"):
            read(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match=r"\[cache.load\] expected"):
        read(path)


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    save(path, layers(), "m")
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    random = np.random.default_rng(0)
    places = [
        *range(0, 8),
        *random.integers(8, header, 120).tolist(),
        *random.integers(header, len(data), 120).tolist(),
    ]
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(random.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"\[cache.load\] expected .*; got"):
            read(path)
    path.write_bytes(data)
    read(path)


def test_another_model_codec_or_set_of_layers(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    save(path, layers(), "m")
    with pytest.raises(ValueError, match=r"\[cache.load\] expected model 'n'; got 'm'"):
        read(path, model="n")
    other = Codec(dataclasses.replace(SPEC, window=11), 64, 1)
    for codecs in ({0: other, 5: CODECS[5]}, {0: CODECS[0]}, {1: CODECS[0], 5: CODECS[5]}):
        with pytest.raises(ValueError, match=r"\[cache.load\] expected codecs .*; got"):
            read(path, codecs)


@pytest.mark.parametrize(("field", "value"), [("version", "1"), ("format", "other")])
def test_another_format(tmp_path: Path, field: str, value: str) -> None:
    path = tmp_path / "cache"
    save(path, layers(), "m")
    with safe_open(path, "np") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, path, {**metadata, field: value})
    with pytest.raises(ValueError, match=rf"\[cache.load\] expected format.*; got '{value}'"):
        read(path)


def test_a_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"\[cache.load\] expected format 'forgeattention cache'; got None"):
        read(path)
    path.write_text(json.dumps({"not": "safetensors"}))
    with pytest.raises(ValueError, match=r"\[cache.load\] expected a complete safetensors file; got"):
        read(path)


def test_a_pool_too_small_for_the_file(tmp_path: Path) -> None:
    save(tmp_path / "cache", layers(), "m")
    with pytest.raises(ValueError, match=r"\[page_pool\] expected at most 2 pages; got"):
        read(tmp_path / "cache", max_pages=2)


def forged(path: Path, change: Any) -> None:
    """A saved file with other contents under a checksum that fits them."""
    with safe_open(path, "np") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    del metadata["sha256"]
    metadata["sha256"] = tensor_files.checksum(tensors, metadata)
    save_file(tensors, path, metadata)


FORGERIES: dict[str, Any] = {
    "a length": lambda t, m: t["0.lengths"].__setitem__((0, 0), 50),
    "packed": lambda t, m: t["0.lengths"].__setitem__((1, 1), 100),
    "more pages": lambda t, m: t["0.lengths"].__setitem__((1, 1), 640),
    "seen": lambda t, m: t["0.lengths"].__setitem__((2, 1), 3),
    "negative": lambda t, m: t["0.lengths"].__setitem__((0, 2), -1),
    "page number": lambda t, m: t["0.table"].__setitem__((1, 0), 1000),
    "table's dtype": lambda t, m: t.__setitem__("0.table", t["0.table"].astype(np.float32)),
    "table's shape": lambda t, m: t.__setitem__("0.table", t["0.table"][:, :1].copy()),
    "starts": lambda t, m: t["0.starts"].__setitem__((1, 1), 0),
    "tokens": lambda t, m: t.__setitem__("0.k", t["0.k"][:, :, :-1].copy()),
    "no values": lambda t, m: t.pop("0.v"),
    "dtype": lambda t, m: m.__setitem__("dtypes", '{"0": "float64", "5": "float32"}'),
    "deep JSON": lambda t, m: m.__setitem__("extra", "[" * 100000 + "]" * 100000),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_contents_that_no_cache_holds_are_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "cache"
    save(path, layers(), "m")
    read(path)
    forged(path, FORGERIES[what])
    with pytest.raises(ValueError, match=r"\[cache.load\] expected"):
        read(path)
