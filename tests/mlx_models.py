"""mlx-lm models of random weights, and a stock cache that forgets as much as a packed one."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models import cache as stock

from forgeattention import ops
from forgeattention.cache import STEP_TOKENS
from forgeattention.codec import PAGE, Codec, CodecSpec
from forgeattention.integrations.mlx.convert import packed_width, widened
from forgeattention.ops import PageTable

SPEC = CodecSpec(k_bits=3, v_bits=2, k_code="scalar", refine=False, sinks=3, window=12)
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"rope_theta": 10000.0, "tie_word_embeddings": True},
    # two sliding-window layers before one of full attention
    "gemma3_text": {"num_hidden_layers": 3, "sliding_window": 40, "sliding_window_pattern": 3},
    # attention sinks, every other layer sliding
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 40},
    # three linear-attention layers before one of full attention
    "qwen3_next": {
        **EXPERTS,
        "num_hidden_layers": 4,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [],
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
    # state-space and attention side by side in each layer
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16},
}


def model(kind: str = "llama", seed: int = 0, dtype: Any = mx.float32, **changes: Any) -> Any:
    """Random weights, large enough for predictions that differ from token to token."""
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    made = module.Model(module.ModelArgs.from_dict({"model_type": kind, **SIZES, **KINDS[kind], **changes}))
    mx.random.seed(seed)
    made.update(tree_map(lambda p: weights(p, dtype), made.parameters()))
    made.eval()
    mx.eval(made.parameters())
    return made


def weights(p: mx.array, dtype: Any) -> mx.array:
    if p.ndim < 2:
        return mx.random.uniform(0.5, 1.5, p.shape).astype(dtype)
    return (mx.random.normal(p.shape) * 1.7 * p.shape[-1] ** -0.5).astype(dtype)


class SlowCache(stock.KVCache):
    """mlx-lm's own cache of one sequence, whose keys and values lose precision page by page."""

    def __init__(self, spec: CodecSpec = SPEC) -> None:
        super().__init__()
        self.spec = spec
        self.pages = 0
        self.given: Any = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        past, n, self.given = self.offset, keys.shape[2], None
        exact = tuple(mx.array(x) for x in super().update_and_fetch(keys, values))
        width = packed_width(keys.shape[3], values.shape[3])
        codec = Codec(self.spec, width, keys.shape[1])
        while past + n - self.spec.sinks - self.pages * PAGE >= self.spec.window + PAGE:
            start = self.spec.sinks + self.pages * PAGE
            at = slice(start, start + PAGE)
            k, v = coded(codec, self.keys[0, :, at], self.values[0, :, at])
            self.keys[0, :, at], self.values[0, :, at] = k, v
            self.pages += 1
        step = n == 1 or (past and n <= min(STEP_TOKENS, self.spec.window))
        if not step:
            self.given = exact
        return self.keys_and_values()

    def keys_and_values(self) -> Any:
        """What the newest tokens attend to, for layers that share this one's keys too."""
        return super().keys_and_values() if self.given is None else self.given

    def trim(self, n: int) -> int:
        n = super().trim(n)
        self.pages = min(self.pages, max(0, self.offset - self.spec.sinks) // PAGE)
        return n


def coded(codec: Codec, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
    """Keys and values [kv_heads, 64, head_dim] as their codes decode."""
    page, first = np.empty(codec.page_bytes, np.uint8), np.zeros(1, np.int64)
    k32, v32 = (np.array(widened(x, codec.head_dim).astype(mx.float32)) for x in (k, v))
    ops.encode(k32, v32, codec, page, first, backend="reference")
    table = PageTable(page, first[None], np.array([PAGE], np.int32), PAGE)
    found = ops.decode_pages(codec, table, backend="reference")
    return tuple(mx.array(x[0])[..., : of.shape[-1]].astype(of.dtype) for x, of in zip(found, (k, v)))


def slow_prompt_cache(made: Any, spec: CodecSpec = SPEC) -> list[Any]:
    """mlx-lm's own prompt cache with slow caches in place of its KVCaches."""

    def swap(layer: Any) -> Any:
        if isinstance(layer, stock.CacheList):
            return stock.CacheList(*map(swap, layer.caches))
        return SlowCache(spec) if type(layer) is stock.KVCache else layer

    return [swap(layer) for layer in stock.make_prompt_cache(made)]


def flat(cache: list[Any]) -> list[Any]:
    """The layers' caches, those in a `CacheList` too."""
    return [part for layer in cache for part in getattr(layer, "caches", [layer])]


def tokens(rows: int, n: int, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(1, 97, (rows, n)).tolist()


def greedy(made: Any, cache: list[Any], prompt: list[int], n: int, chunk: int = 1000) -> tuple[list[int], Any]:
    """n tokens after the prompt, read in chunks, and the log-probabilities of each, [n, vocab]. Slow caches read a few
    tokens one by one, since a packed cache gives them the same."""
    out: list[int] = []
    found = []
    single = chunk <= STEP_TOKENS and any(isinstance(x, SlowCache) for x in flat(cache))
    starts = [0, *range(chunk, len(prompt), 1 if single else chunk), len(prompt)]
    for start, stop in zip(starts, starts[1:]):
        logits = made(mx.array([prompt[start:stop]]), cache=cache)
    for _ in range(n):
        last = logits[0, -1].astype(mx.float32)
        found.append(np.array(last - mx.logsumexp(last)))
        out.append(int(last.argmax()))
        logits = made(mx.array([[out[-1]]]), cache=cache)
    return out, np.stack(found)
