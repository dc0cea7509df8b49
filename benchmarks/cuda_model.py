"""Whole models on CUDA: decode tokens/s, prefill of a chunk and peak memory, packed against exact keys and values.

    python benchmarks/bench_model.py --device cuda --json OUT [--models llama-3.1-8b ...] [--memory 300000]

Weights are random, of the models' true shapes. The past is random keys and values put into the caches directly, so that
long contexts cost no prefill; `--memory` reads its tokens through the model instead, in chunks, and keeps the memory
after each. Both caches decode in a CUDA graph. The exact cache is keys in one buffer of fixed size with flash attention
over just the context (its every step is the same one; it does not grow). cuDNN's attention would be up to 13 % faster
for its steps and nearly twice as fast for its chunks: ratios here are over flash alone.
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import torch
from cuda_decode import environment
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin

from forgeattention import ops
from forgeattention.codec import PAGE
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.integrations.hf.graph import DecodeGraph

SHAPES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "llama",
        torch.bfloat16,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "qwen2.5-7b": (
        "qwen2",
        torch.bfloat16,
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "smollm2-135m": (
        "llama",
        torch.float16,
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
}
CHUNK = 2048


class FixedLayer(CacheLayerMixin):
    """Exact keys and values in a buffer, whose new tokens always follow the same `context` old ones."""

    is_sliding = False

    def __init__(self, context: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        shape = 1, kv_heads, context + CHUNK, head_dim
        self.keys, self.values = (torch.randn(shape, dtype=dtype, device="cuda") for _ in range(2))
        self.context, self.is_initialized = context, True

    def lazy_initialization(self, *_: Any) -> None:
        pass

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        end = self.context + key_states.shape[2]
        self.keys[:, :, self.context : end] = key_states
        self.values[:, :, self.context : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.context

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.context + query_length, 0

    def get_max_length(self) -> int:
        return -1


def flash(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float | None = None, **_: Any) -> Any:
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, q.shape[2] > 1, scale=scaling)[0]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("bench_fp16", flash)
AttentionMaskInterface.register("bench_fp16", lambda *_, **__: None)


def build(name: str) -> Any:
    kind, dtype, sizes = SHAPES[name]
    config = AutoConfig.for_model(kind, max_position_embeddings=1 << 20, bos_token_id=None, eos_token_id=None, **sizes)
    config.dtype = dtype
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="forge", dtype=dtype)
    return model.eval().requires_grad_(False)


def fill(cache: ForgeCache, model: Any, context: int) -> None:
    """Random tokens in every layer of a packed cache."""
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in cache.layers:
        for at in range(0, context, 8192):
            shape = 1, config.num_key_value_heads, min(8192, context - at), dim
            k, v = (torch.randn(shape, dtype=model.dtype, device="cuda") for _ in range(2))
            layer.lazy_initialization(k, v) if layer.cache is None else None
            layer.cache.append(k, v)
            layer.record(shape[2], None)


def seconds_of(run: Any) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def packed(model: Any, context: int, steps: int) -> dict[str, Any]:
    model.set_attn_implementation("forge")
    cache = ForgeCache(model, graph=False)
    fill(cache, model, context)
    ids = torch.randint(0, 1000, (1, CHUNK), device="cuda")
    one = ids[:, :1].clone()
    with DecodeGraph(model, cache, max_length=context + 16384) as graph:
        model(input_ids=one, past_key_values=cache, use_cache=True)
        torch.cuda.reset_peak_memory_stats()
        each = [
            seconds_of(lambda: model(input_ids=one, past_key_values=cache, use_cache=True, logits_to_keep=1))
            for _ in range(steps)
        ]
        peak = torch.cuda.max_memory_allocated()
        assert graph.eager == 0
    eager = [
        seconds_of(lambda: model(input_ids=one, past_key_values=cache, use_cache=True, logits_to_keep=1))
        for _ in range(8)
    ]
    size = cache.nbytes
    prefill = [
        seconds_of(lambda: model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1))
        for _ in range(8)
    ]
    return {
        "step_ms_median": 1e3 * statistics.median(each),
        "step_ms_mean": 1e3 * statistics.mean(each),
        "step_ms_worst": 1e3 * max(each),
        "step_ms_without_graph": 1e3 * statistics.median(eager),
        "tokens_per_s": 1 / statistics.mean(each),
        "prefill_chunk_ms": 1e3 * min(prefill),
        "cache_bytes": size,
        "peak_bytes": peak,
    }


def exact(model: Any, context: int, steps: int) -> dict[str, Any]:
    model.set_attn_implementation("bench_fp16")
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = [
        FixedLayer(context, config.num_key_value_heads, dim, model.dtype) for _ in range(config.num_hidden_layers)
    ]
    cache = Cache(layers=layers)
    ids = torch.randint(0, 1000, (1, CHUNK), device="cuda")
    one, at = ids[:, :1].clone(), torch.full((1, 1), context, device="cuda")

    def step() -> Any:
        return model(input_ids=one, position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=1)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    torch.cuda.reset_peak_memory_stats()
    each = [seconds_of(graph.replay) for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated()
    prefill = [
        seconds_of(lambda: model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1))
        for _ in range(8)
    ]
    return {
        "step_ms_median": 1e3 * statistics.median(each),
        "step_ms_mean": 1e3 * statistics.mean(each),
        "tokens_per_s": 1 / statistics.mean(each),
        "prefill_chunk_ms": 1e3 * min(prefill),
        "cache_bytes": sum(x.nbytes for layer in layers for x in (layer.keys, layer.values)),
        "peak_bytes": peak,
    }


def encode_ms(model: Any) -> float:
    """Encoding of one chunk in all layers, on the device."""
    codec = ForgeCache(model).layers[0].codec
    k, v = (torch.randn(codec.kv_heads, CHUNK, codec.head_dim, dtype=model.dtype, device="cuda") for _ in range(2))
    out = torch.empty(CHUNK // PAGE * codec.page_bytes, dtype=torch.uint8, device="cuda")
    at = torch.arange(CHUNK // PAGE, device="cuda") * codec.page_bytes
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    ops.encode(k, v, codec, out, at)
    times = []
    for _ in range(5):
        events[0].record()
        for _ in range(20):
            ops.encode(k, v, codec, out, at)
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]) / 20)
    return statistics.median(times) * model.config.num_hidden_layers


def memory_curve(model: Any, tokens: int, chunk: int, steps: int) -> dict[str, Any]:
    """Reads `tokens` random tokens through the model, then decodes; bytes allocated and at the peak of each chunk."""
    model.set_attn_implementation("forge")
    cache = ForgeCache(model, graph=False)
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    points: list[dict[str, float]] = []
    weights, begun = torch.cuda.memory_allocated(), time.perf_counter()

    def note(phase: str) -> None:
        torch.cuda.synchronize()
        exact_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * dim * cache.get_seq_length()
        points.append({
            "phase": phase, "tokens": cache.get_seq_length(), "s": time.perf_counter() - begun,
            "allocated": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated(),
            "cache": cache.nbytes, "exact_cache_would_be": exact_bytes,
        })  # fmt: skip
        torch.cuda.reset_peak_memory_stats()

    ids = torch.randint(0, 1000, (1, chunk), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    for at in range(0, tokens, chunk):
        piece = ids[:, : min(chunk, tokens - at)]
        model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        note("prefill")
    with DecodeGraph(model, cache, max_length=tokens + 16384):
        for i in range(steps):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            if i % 32 == 31:
                note("decode")
    return {"op": "memory_curve", "weights_bytes": weights, "chunk": chunk, "points": points}


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def records(names: list[str], contexts: list[int], steps: int, memory: int, save: Any) -> None:
    """Measures, and hands all records so far to `save` after each."""
    out: list[dict[str, Any]] = [{"op": "env", "env": environment(0.0)}]
    for name in names:
        model = build(name)
        encode = encode_ms(model)
        for context in contexts:
            row: dict[str, Any] = {"op": "model", "model": name, "context": context, "steps": steps, "chunk": CHUNK}
            for which, measure in (("packed", packed), ("exact", exact)):
                try:
                    row[which] = measure(model, context, steps)
                except torch.cuda.OutOfMemoryError:
                    row[which] = {"out_of_memory": True}
                free()
            row["encode_ms"] = encode
            both = row["packed"], row["exact"]
            if not any("out_of_memory" in x for x in both):
                row["decode_ratio"] = both[1]["step_ms_mean"] / both[0]["step_ms_mean"]
                row["prefill_ratio"] = both[1]["prefill_chunk_ms"] / both[0]["prefill_chunk_ms"]
            if "prefill_chunk_ms" in both[0]:
                row["encode_share_of_prefill"] = encode / both[0]["prefill_chunk_ms"]
            print(name, context, {k: v for k, v in row.items() if k not in ("op", "model", "context")}, flush=True)
            out.append(row)
            save(out)
        if memory and name == names[0]:
            curve = memory_curve(model, memory, 4 * CHUNK, 512)
            curve["model"] = name
            out.append(curve)
            save(out)
            print(name, "memory curve", curve["points"][-1], flush=True)
        del model
        free()
