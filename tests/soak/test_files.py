"""Damaged files of every kind that is read: each loads to what it held, or raises ValueError, in bounded memory.

A kind with a checksum (`whole`) must be refused or load to the same content. Kinds without one (a GGUF file, reports,
a config, plans) may give other numbers, but no other error.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

MEMORY = 3 << 30
"""Bytes of address space that a reading process may have beyond what its libraries take."""


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Flipped bits, other bytes, cut, lengthened, repeated, exchanged parts; most of it near the start, where headers
    are."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        size = len(out)
        near = min(size, int(rng.choice([8, 64, 1024, size or 1])))
        at = int(rng.integers(0, max(near, 1)))
        many = int(rng.integers(1, 17))
        kind = rng.integers(8)
        if kind == 0 and size:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[at : at + many] = rng.bytes(len(out[at : at + many]))
        elif kind == 2:
            del out[int(rng.integers(0, size + 1)) :]
        elif kind == 3:
            out += rng.bytes(many)
        elif kind == 4:
            out[at:at] = out[at : at + many]
        elif kind == 5:
            del out[at : at + many]
        elif kind == 6:
            digits = [i for i in range(near) if 48 <= out[i] <= 57]
            if digits:
                out[int(rng.choice(digits))] = int(rng.integers(48, 58))
        else:
            out[at : at + many] = rng.choice([b"\0", b"\xff", b"[", b"-1", b"null"]) * many
    return bytes(out)


class Kind:
    """A kind of file.

    Attributes:
        make: writes a good one.
        read: gives its content in a form that can be compared.
        whole: whether a checksum covers it.
    """

    whole = True

    def make(self, path: Path) -> None:
        raise NotImplementedError

    def read(self, path: Path) -> Any:
        raise NotImplementedError


class SavedCache(Kind):
    def __init__(self) -> None:
        from test_cache_storage import CODECS, layers

        self.codecs, self.layers = CODECS, layers

    def make(self, path: Path) -> None:
        from forgeattention.cache import save

        save(path, self.layers(), "m", {"runs": [3]})

    def read(self, path: Path) -> Any:
        from test_cache_storage import read

        loaded, extra = read(path)
        return extra, {i: [x.lengths.tolist(), *self.held(x)] for i, x in loaded.items()}

    def held(self, layer: Any) -> list[Any]:
        pages = [layer.pool.page(p).numpy().tobytes() for r in range(layer.batch) for p in layer.row_pages(r).tolist()]
        starts = [layer.page_starts(r).tolist() for r in range(layer.batch)]
        n = layer.exact_lengths
        tokens = [x[r, :, : n[r]].numpy().tobytes() for r in range(layer.batch) for x in (layer.exact.k, layer.exact.v)]
        return [pages, starts, tokens]


class ModelCache(Kind):
    """What `ForgeCache.save` writes, the prefixes of a server among it."""

    def __init__(self) -> None:
        import tiny
        import torch

        import forgeattention.integrations.hf  # makes the attention function "forge" known

        assert forgeattention.integrations.hf
        config = {"hidden_size": 64, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
        self.model = tiny.llama(1, **config).float().eval()
        self.model.set_attn_implementation("forge")
        self.ids = torch.randint(0, 90, (2, 260), generator=torch.Generator().manual_seed(0))

    def make(self, path: Path) -> None:
        import torch

        from forgeattention.integrations.hf import ForgeCache

        cache = ForgeCache(self.model, "balanced")
        with torch.no_grad():
            self.model(self.ids, past_key_values=cache)
        cache.save(path, self.model)

    def read(self, path: Path) -> Any:
        from forgeattention.integrations.hf import ForgeCache

        cache = ForgeCache.load(path, self.model)
        return cache.spec, cache.layers[0].cache.lengths.tolist(), SavedCache.held(self, cache.layers[0].cache)


class SentRow(Kind):
    def make(self, path: Path) -> None:
        from test_cache_transfer import cache

        from forgeattention.cache import export_row

        path.write_bytes(export_row(cache(200)))

    def read(self, path: Path) -> Any:
        from test_cache_transfer import CODEC

        from forgeattention.cache import TorchArrays, export_row, import_row

        return export_row(import_row(path.read_bytes(), CODEC, TorchArrays()))


class BudgetFile(Kind):
    def make(self, path: Path) -> None:
        from forgeattention.sparse import Budgets

        Budgets("me", {3: np.array([5, 0], np.int32), 11: np.array([70, 123], np.int32)}).save(path)

    def read(self, path: Path) -> Any:
        from forgeattention.sparse import Budgets

        return {i: b.tolist() for i, b in Budgets.load(path, "me").layers.items()}


class CentreFile(Kind):
    def __init__(self) -> None:
        from forgeattention.eviction import Rope

        self.rope = Rope(np.array([1.0, 0.1, 0.01]))

    def make(self, path: Path) -> None:
        from forgeattention.eviction import Centres, save_centres

        centres = Centres(self.rope, 3)
        centres.add(np.random.default_rng(0).standard_normal((3, 9, 6)), np.arange(9))
        save_centres(path, {4: centres, 12: centres})

    def read(self, path: Path) -> Any:
        from forgeattention.eviction import load_centres

        found = load_centres(path, self.rope)
        return {i: {name: x.tolist() for name, x in c.arrays().items()} for i, c in found.items()}


class CalibrationFile(Kind):
    def __init__(self) -> None:
        self.model = ModelCache().model

    def make(self, path: Path) -> None:
        from forgeattention import CodecSpec
        from forgeattention.models.calibration import Calibration
        from forgeattention.models.fingerprint import fingerprint

        grams = {0: np.eye(64, dtype=np.float32)[None]}
        Calibration(fingerprint(self.model), CodecSpec(), {0: (3, 2)}, grams).save(path)

    def read(self, path: Path) -> Any:
        from forgeattention.models.calibration import Calibration

        found = Calibration.load(path, self.model)
        return found.spec, found.table, {i: g.tolist() for i, g in found.grams.items()}


class Plans(Kind):
    """The file counts as none where it cannot be read: it holds only which of a few launches were quickest."""

    whole = False

    def make(self, path: Path) -> None:
        path.write_text(json.dumps({"Apple M4": {"128": 4, "64": 8}, "Apple M1": {"96": 2}}, indent=2))

    def read(self, path: Path) -> Any:
        from forgeattention.backends.metal import plan

        plan.plan_file = lambda: path
        plan.gpu_name = lambda: "Apple M4"
        plan.measured.cache_clear()
        found = plan.measured()
        assert all(isinstance(dim, int) and rows in plan.CHOICES for dim, rows in found.items())
        return found


class ModelConfig(Kind):
    whole = False

    def make(self, path: Path) -> None:
        path.write_text(json.dumps({"model_type": "llama", "hidden_size": 64, "rope_parameters": {"rope_theta": 1e4}}))

    def read(self, path: Path) -> Any:
        from forgeattention.models.shape_mlx import read_config

        fields = read_config(str(path))
        assert "model_type" in fields
        return fields


class Records(Kind):
    whole = False

    def make(self, path: Path) -> None:
        found = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("decode_attention-*.json"))
        path.write_bytes(found[0].read_bytes()[:20000] if not found else found[0].read_bytes())

    def read(self, path: Path) -> Any:
        from forgeattention.tools.bench.report import page
        from forgeattention.util.files import read_json

        return page(read_json(path, "bench", "records"))


class GGUFFile(Kind):
    whole = False

    def make(self, path: Path) -> None:
        import gguf

        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(2048)
        writer.add_token_list(["a", "b", "c"])
        writer.add_array("numbers", [1, 2, 3])
        writer.add_bool("tokenizer.ggml.add_bos_token", True)
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
        writer.add_tensor("output.weight", np.ones((8, 32), np.float16))
        for step in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{step}_to_file")()
        writer.close()

    def read(self, path: Path) -> Any:
        from forgeattention.models.gguf import open_gguf

        reader = open_gguf(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return fields, [(t.name, t.data.shape) for t in reader.tensors]


class MLXPromptCache(Kind):
    """mlx-lm's own format, which has no checksum: what cannot be a cache is refused."""

    whole = False

    def make(self, path: Path) -> None:
        import mlx.core as mx
        from mlx_lm.models import base
        from mlx_lm.models.cache import save_prompt_cache

        from forgeattention import CodecSpec
        from forgeattention.integrations.mlx import PackedKVCache, patched

        cache = PackedKVCache(CodecSpec())
        q, k, v = (
            mx.array(np.random.default_rng(seed).standard_normal((1, heads, 300, 64)).astype(np.float32))
            for seed, heads in enumerate((4, 2, 2))
        )
        with patched():
            handles = cache.update_and_fetch(k, v)
            base.scaled_dot_product_attention(q, *handles, cache=cache, scale=0.125, mask="causal")
        save_prompt_cache(str(path), [cache])

    def read(self, path: Path) -> Any:
        import mlx.core as mx
        from mlx.utils import tree_unflatten

        from forgeattention.integrations.mlx import PackedKVCache

        try:
            arrays = tree_unflatten(list(mx.load(str(path), format="safetensors").items()))
            state = arrays[0]
            assert isinstance(state, list)
        except Exception as error:  # what MLX itself refuses
            raise ValueError(str(error)) from None
        return PackedKVCache.from_state(state).offset


KINDS: dict[str, type[Kind]] = {
    "saved cache": SavedCache,
    "a model's saved cache": ModelCache,
    "sent row": SentRow,
    "budgets": BudgetFile,
    "centres": CentreFile,
    "calibration": CalibrationFile,
    "plans": Plans,
    "config": ModelConfig,
    "records": Records,
    "GGUF": GGUFFile,
    "MLX prompt cache": MLXPromptCache,
}


def read_many(name: str, count: int, folder: Path, seed: int) -> Counter[str]:
    """Reads `count` damaged files, in this process."""
    import resource

    kind = KINDS[name]()
    good, path = folder / "good.safetensors", folder / "damaged.json"
    kind.make(good)
    data = good.read_bytes()
    path.write_bytes(data)
    want = pickle.dumps(kind.read(path))
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    found: Counter[str] = Counter()
    for i in range(count):
        bad = damaged(data, np.random.default_rng([seed, i]))
        path.write_bytes(bad)
        try:
            got = kind.read(path)
        except ValueError:
            found["refused"] += 1
            continue
        except BaseException as error:
            raise AssertionError(f"{name}, file {i} of seed {seed}: {type(error).__name__}: {error}") from error
        same = pickle.dumps(got) == want
        if kind.whole and not same:
            raise AssertionError(f"{name}, file {i} of seed {seed} loads to other content")
        found["the same" if same else "other numbers"] += 1
    return found


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files(name: str, tmp_path: Path, number: Callable[[str], int], counts: Counter[str]) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    program = (
        "import sys, pathlib, json; sys.path[:0] = sys.argv[4:]; import test_files; "
        "print(json.dumps(test_files.read_many(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]), SEED)))"
    ).replace("SEED", str(seed))
    here = Path(__file__).parent
    command = [sys.executable, "-c", program, name, str(number("files")), str(tmp_path), str(here), str(here.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counts.update(json.loads(done.stdout.splitlines()[-1]))
    assert sum(counts.values()) == number("files")
