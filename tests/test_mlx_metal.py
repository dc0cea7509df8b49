"""The mlx-lm integration on the Metal backend: MLX's arrays and lazy operations, kernels under the emulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from metal.cases import Emulator  # noqa: E402
from metal.emulator import BFloat16  # noqa: E402
from mlx_lm.models import cache as stock  # noqa: E402
from mlx_lm.tokenizer_utils import TokenizerWrapper  # noqa: E402
from mlx_models import SPEC, greedy, model, slow_prompt_cache, tokens  # noqa: E402
from tiny import tokenizer  # noqa: E402
from tolerances import MLX_MODEL  # noqa: E402

from forgeattention.backends import metal  # noqa: E402
from forgeattention.backends.metal import attention, pages, scores, sparse  # noqa: E402
from forgeattention.integrations import mlx as forge  # noqa: E402
from forgeattention.ops import registry  # noqa: E402
from forgeattention.sparse import SparseSpec  # noqa: E402


class Device:
    """Stands in for MLX's GPU: takes and gives MLX arrays."""

    xp = mx

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def run(self, launch: Any) -> list[Any]:
        self.kernels.add(launch.kernel)
        inputs = {name: self._host(x) for name, x in launch.inputs.items()}
        return [mx.array(x) for x in Emulator().run(replace(launch, inputs=inputs))]

    @staticmethod
    def _host(x: Any) -> Any:
        x = x if isinstance(x, mx.array) else mx.array(x)
        return BFloat16(np.array(x.view(mx.uint16))) if x.dtype == mx.bfloat16 else np.array(x)


@pytest.fixture
def device(monkeypatch: Any) -> Any:
    made = Device()
    for module in (attention, pages, scores, sparse):
        monkeypatch.setattr(module, "mlx_device", lambda: made)
    monkeypatch.setattr(metal, "available_to_mlx", lambda: (True, "the emulator"))
    monkeypatch.setattr(registry, "native", lambda kind: "metal" if kind == "mlx" else kind)
    registry.find.cache_clear()
    with forge.patched():
        yield made
    registry.find.cache_clear()


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("chunk", [1000, 90])
def test_models_compute_what_stock_layers_of_decoded_values_do(device: Device, kind: str, chunk: int) -> None:
    made, prompt = model(kind), tokens(1, 170)[0]
    want, want_logs = greedy(made, slow_prompt_cache(made), prompt, 5, chunk)
    cache = forge.make_prompt_cache(made, SPEC, fitted=False)
    found, logs = greedy(made, cache, prompt, 5, chunk)
    assert np.abs(logs - want_logs).max() < MLX_MODEL
    assert found == want
    kernels = {"encode", "decode_attention", "merge_attention"}
    assert device.kernels == (kernels | {"prefill_attention"} if chunk == 90 else kernels)


@pytest.mark.parametrize("fast", [False, True])
def test_sparse_steps(device: Device, fast: bool) -> None:
    """All tokens kept is the dense cache; of some, what the oracle computes."""
    made, prompt = model(), tokens(1, 420)[0]

    def run(sparse: SparseSpec | None, backend: str = "auto") -> Any:
        cache = forge.make_prompt_cache(made, SPEC, fitted=False, sparse=sparse, backend=backend)
        return greedy(made, cache, prompt, 4, 1000)[1]

    dense = run(None)
    everything = SparseSpec(top_k=4096, fast=fast, min_context=0)
    assert np.abs(run(everything) - dense).max() < MLX_MODEL
    few = SparseSpec(top_k=64, fast=True, min_context=0) if fast else SparseSpec(top_p=0.9, min_context=0)
    some = run(few)
    assert np.abs(some - run(few, "reference")).max() < MLX_MODEL
    assert np.abs(some - dense).max() > 10 * MLX_MODEL
    sparse = {"sparse_scores", "sparse_threshold", "sparse_attention"}
    assert device.kernels & sparse == (set() if fast else sparse)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_batches_trims_and_saved_caches(device: Device, dtype: str, tmp_path: Any) -> None:
    made, words = model(dtype=getattr(mx, dtype)), TokenizerWrapper(tokenizer())
    prompts = [*tokens(1, 150), *tokens(1, 40, seed=1)]
    caches = [forge.make_prompt_cache(made, SPEC, fitted=False) for _ in prompts]
    answer = mlx_lm.batch_generate(
        made, words, prompts, caches, max_tokens=4, return_token_ids=True, return_prompt_caches=True
    )
    for prompt, row, cache in zip(prompts, answer.token_ids, answer.caches):
        alone = forge.make_prompt_cache(made, SPEC, fitted=False)
        made(mx.array([prompt[:-1]]), cache=alone)
        want, _ = greedy(made, alone, prompt[-1:], 4)
        assert row == want
        # into a page, so that its tokens come back from their codes
        assert stock.trim_prompt_cache(cache, 30) == stock.trim_prompt_cache(alone, 30) == 30
        forge.save_prompt_cache(tmp_path / "cache.safetensors", cache, made)
        back = forge.load_prompt_cache(tmp_path / "cache.safetensors", made)
        again = [greedy(made, x, prompt[:3], 3)[0] for x in (alone, cache, back)]
        assert again[1] == again[2]
        # MLX's products for a batch round otherwise than those for a row, which half precision keeps
        assert again[0] == again[1] or dtype != "float32"
    assert "decode_pages" in device.kernels


def test_codecs_fitted_to_the_model_lose_no_more_than_on_the_cpu(device: Device) -> None:
    made, prompt = model(), tokens(1, 170)[0]
    spec = replace(SPEC, k_code="trellis8", v_bits=3)
    _, exact = greedy(made, stock.make_prompt_cache(made), prompt, 1)
    lost = {}
    for backend in ("metal", "cpu"):
        cache = forge.make_prompt_cache(made, spec, backend=backend)
        assert all(layer.codec.shaping is not None for layer in cache)
        made(mx.array([prompt[:-1]]), cache=cache)
        _, found = greedy(made, cache, prompt[-1:], 1)
        lost[backend] = np.linalg.norm(found - exact)
    assert 0 < lost["metal"] < 1.1 * lost["cpu"]
    assert "encode" in device.kernels
