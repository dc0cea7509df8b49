"""Keys, values and queries of SmolLM2 in the shape of the benchmarks' attention layer.

Eight KV heads from eight layers (2, 6, ..., 26, 29; heads 0, 1, 2 in turn) read documents of 8192 tokens, its longest
context: Python source of the standard library, then prose and licences, one after another, so that a query meets the
keys of many documents. Each head's 64 channels are padded with zeros to 128, which changes no score. A KV head has
three queries, of the last position; the fourth is the first head's of the position before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from forgeattention import models
from forgeattention.tools.evaluation import texts
from forgeattention.tools.evaluation.streaming import attention

LAYERS = (2, 6, 10, 14, 18, 22, 26, 29)
DOCUMENT, DIM = 8192, 128


def text_of(chars: int) -> str:
    parts = [texts.read("genesis"), texts.read("licences")]
    size = sum(map(len, parts))
    for path in sorted(Path(sys.modules["argparse"].__file__ or "").parent.rglob("*.py")):
        if size >= chars:
            break
        if "test" not in path.parts and "site-packages" not in path.parts:
            parts.insert(0, path.read_text(encoding="utf-8", errors="ignore"))
            size += len(parts[0])
    return "\n".join(parts)


@contextmanager
def watched(model: Any, look: Callable[[int, Any, Any, Any], None]) -> Iterator[None]:
    """In it every attention of the model first calls `look(layer, q, k, v)`: [batch, heads, tokens, head_dim]."""

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        look(module.layer_idx, q, k, v)
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    AttentionInterface.register("benchmark_states", attend)
    AttentionMaskInterface.register("benchmark_states", sdpa_mask)
    with attention(model, "benchmark_states"):
        yield


@torch.no_grad()
def states(context: int, name: str = "smollm2", device: str = "cuda") -> dict[str, Any]:
    """`kv`: keys and values [8, context, 128] float16 on the host; `q`: [1, 32, 1, 128]."""
    model, tokenizer = models.load(name, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
    ids = tokenizer(text_of(8 * context), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    if len(ids) < context:
        raise ValueError(f"[real_states] expected {context} tokens of text; got {len(ids)}")
    ids = ids[-context:]
    k, v = (torch.zeros(len(LAYERS), context, DIM, dtype=torch.float16) for _ in range(2))
    q = torch.zeros(1, 32, 1, DIM, dtype=torch.float16)
    where = [0, 0]

    def record(layer: int, query: Any, key: Any, value: Any) -> None:
        if layer in LAYERS:
            i = LAYERS.index(layer)
            head, group = i % 3, query.shape[1] // key.shape[1]
            k[i, slice(*where), :64], v[i, slice(*where), :64] = key[0, head].half().cpu(), value[0, head].half().cpu()
            own = query[0, head * group : (head + 1) * group].half().cpu()
            q[0, 4 * i : 4 * i + 3, 0, :64], q[0, 4 * i + 3, 0, :64] = own[:, -1], own[0, -2]

    with watched(model, record):
        for start in range(0, context, DOCUMENT):
            where[:] = start, min(start + DOCUMENT, context)
            model(ids[None, slice(*where)].to(device), logits_to_keep=1, use_cache=False)
    # The benchmark's scale is that of 128 channels.
    return {"kv": (k, v), "q": q * 2**0.5}
