"""A long-context test without a trained model: an induction circuit whose weights are written down, not learned.

Two layers of a stock transformers model (SmolLM3, whose layers may go without RoPE). Tokens have random codes. In
layer 0 every token attends to the one before it, by position alone, and copies its code; in layer 1, which has no
positions, it attends to tokens that follow a token like itself, and copies their code, which the head turns into a
prediction (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022, arXiv
2209.11895). So after "... k v ... k" it predicts v, at any distance. What it misses, the cache has lost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import memory
from .streaming import attention, spans, step

KV_HEADS = 2
Q_HEADS = 4
THETA = 20.0
"""RoPE base: all wavelengths are short (6 to 126 tokens), so that neighbours differ much in every frequency."""
SHARPNESS = (64.0, 40.0)
"""Score of a perfect match less that of an unrelated token, by layer; ln of a million tokens is 14."""


@dataclass(frozen=True)
class Task:
    """A sequence with pairs to remember.

    Attributes:
        ids: int64, [tokens]: filler with `keys[i]` at `places[i]` and `values[i]` right after it.
        keys, values: int64, [pairs]; a key stands once in `ids`.
        places: int64, [pairs].
    """

    ids: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    places: torch.Tensor


@dataclass(frozen=True)
class Recall:
    """What came back.

    Attributes:
        hits: per pair, whether the value was the likeliest next token after its key.
        margins: per pair, logit of the value less the best other one; a perfect recall gives 1 less the cosine of the
            value's code to the nearest other one.
        depths: per pair, its place as a share of the length.
        cache_bytes: held after the last question.
        read_seconds: for the sequence; `ask_seconds`: for all questions, one token each.
    """

    hits: list[bool]
    margins: list[float]
    depths: list[float]
    cache_bytes: int
    read_seconds: float
    ask_seconds: float


def build(
    head_dim: int = 64,
    vocabulary: int = 4096,
    *,
    twin: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Any:
    """The model.

    Args:
        head_dim: 64, 128 or any other even number.
        vocabulary: tokens, even.
        twin: if given, token 2 i + 1 has a code with this cosine to that of token 2 i, in every head; else all codes
            are independent.
        seed: of the codes.
        dtype, device: of the weights.

    Returns:
        A transformers causal language model of two layers, 4 query heads and 2 KV heads.

    Raises:
        ValueError: an odd head_dim or vocabulary, a cosine outside (-1, 1).
    """
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    if head_dim % 2 or head_dim < 2 or vocabulary % 2 or vocabulary < 2:
        raise ValueError(f"[induction] expected an even head_dim and vocabulary; got {head_dim}, {vocabulary}")
    if twin is not None and not -1 < twin < 1:
        raise ValueError(f"[induction] expected a cosine between -1 and 1; got {twin}")
    code = KV_HEADS * head_dim
    # The residual stream: the token's code, the code of the one before, the answer's code, a constant.
    own, before, answer, one = slice(0, code), slice(code, 2 * code), slice(2 * code, 3 * code), 3 * code
    hidden = 3 * code + 2
    config = SmolLM3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2, num_hidden_layers=2,
        num_attention_heads=Q_HEADS, num_key_value_heads=KV_HEADS, head_dim=head_dim, no_rope_layers=[1, 0],
        rope_parameters={"rope_type": "default", "rope_theta": THETA}, max_position_embeddings=2**21,
        rms_norm_eps=1e-12, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = SmolLM3ForCausalLM(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.zero_()
    codes = _codes(head_dim, vocabulary, twin, seed)
    inner = model.model
    inner.embed_tokens.weight[:, own] = codes
    inner.embed_tokens.weight[:, one] = 1
    # A norm divides by the root mean square, which is known: KV_HEADS for each code and 1 for the constant.
    for layer, parts in zip(inner.layers, (1, 2)):
        layer.input_layernorm.weight.fill_(math.sqrt((parts * KV_HEADS + 1) / hidden))
        layer.post_attention_layernorm.weight.fill_(1)
    inner.norm.weight.fill_(math.sqrt((3 * KV_HEADS + 1) / hidden))

    group = Q_HEADS // KV_HEADS
    pairs = head_dim // 2
    first, second = (layer.self_attn for layer in inner.layers)
    # Scores of layer 0 depend on the distance alone: sum over frequencies of cos(f (distance - 1)).
    f = THETA ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    size = math.sqrt(SHARPNESS[0] * math.sqrt(head_dim) / pairs)
    for h in range(KV_HEADS):
        first.k_proj.weight[h * head_dim : h * head_dim + pairs, one] = size
    for h in range(Q_HEADS):
        first.q_proj.weight[h * head_dim : h * head_dim + pairs, one] = (size * f.cos()).float()
        first.q_proj.weight[h * head_dim + pairs : (h + 1) * head_dim, one] = (-size * f.sin()).float()
    eye = torch.eye(code)
    first.v_proj.weight[:, own] = eye
    second.q_proj.weight[:, own] = torch.cat(
        [SHARPNESS[1] * math.sqrt(head_dim) * eye[h // group * head_dim :][:head_dim] for h in range(Q_HEADS)]
    )
    second.k_proj.weight[:, before] = eye
    second.v_proj.weight[:, own] = eye
    for module, target in ((first, before), (second, answer)):
        for h in range(Q_HEADS):
            part = eye[:, h // group * head_dim :][:, :head_dim] / group
            module.o_proj.weight[target, h * head_dim : (h + 1) * head_dim] = part
    model.lm_head.weight[:, answer] = codes / KV_HEADS
    # RoPE's frequencies stay in float32, as in models that are loaded: with the eight bits of a bfloat16 all of them
    # would come round together every 2 pi 2^12 tokens, and layer 0 could not tell that distance from 1.
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model.to(device)


def task(length: int, pairs: int = 16, vocabulary: int = 4096, *, twins: bool = False, seed: int = 0) -> Task:
    """A sequence of random tokens in which the keys stand once each, spread from the second token to the last.

    Args:
        length: tokens.
        pairs: keys to remember.
        vocabulary: of the model; keys are even tokens.
        twins: put each key's twin (the next token number) and another value somewhere too, which a blurred memory
            would take for it.
        seed: of everything.

    Raises:
        ValueError: no room for so many pairs.
    """
    slots = pairs * (2 if twins else 1)
    if pairs < 1 or length < 8 * slots or vocabulary < 8 * slots:
        raise ValueError(f"[induction] expected length and vocabulary >= {8 * slots}; got {length}, {vocabulary}")
    draw = torch.Generator().manual_seed(seed)
    special = 2 * torch.randperm(vocabulary // 2, generator=draw)[: 2 * slots]
    keys, values = special[:pairs], special[pairs : 2 * pairs]
    reserved = torch.zeros(vocabulary, dtype=torch.bool)
    reserved[keys] = reserved[keys + 1] = True
    filler = torch.arange(vocabulary)[~reserved]
    ids = filler[torch.randint(len(filler), (length,), generator=draw)]
    # The first token has none before it: it attends to itself and would answer to its own name.
    at = torch.linspace(1, length - 2, slots).long()
    # Twins stand in the middle between keys, in another order.
    mine = at[:: 2 if twins else 1]
    ids[mine], ids[mine + 1] = keys, values
    if twins:
        other = at[1::2][torch.randperm(pairs, generator=draw)]
        ids[other], ids[other + 1] = keys + 1, special[2 * pairs : 3 * pairs]
    return Task(ids, keys, values, mine)


@torch.no_grad()
def recall(
    model: Any, task: Task, make_cache: Callable[[], Any], *, implementation: str | None = None, block: int = 2048
) -> Recall:
    """Read the sequence into a new cache, block by block, then show every key once and look at the prediction.

    Raises:
        ValueError: the made cache is not empty.
    """
    cache = make_cache()
    if (held := int(cache.get_seq_length())) != 0:
        raise ValueError(f"[induction] expected make_cache to make an empty cache; got one of {held} tokens")
    ids = task.ids.to(model.device)
    hits, margins = [], []
    with attention(model, implementation):
        start = time.perf_counter()
        for first, last in spans(len(ids), block):
            logits = step(model, ids[None, first:last], cache, keep=1)
        float(logits[0, -1, 0])
        read = time.perf_counter()
        for key, value in zip(task.keys.tolist(), task.values.tolist()):
            logits = step(model, torch.tensor([[key]], device=model.device), cache, keep=1)[0, -1].cpu()
            rest = logits.clone()
            rest[value] = -math.inf
            margins.append(float(logits[value] - rest.max()))
            hits.append(margins[-1] > 0)
        end = time.perf_counter()
    depths = (task.places / (len(ids) - 1)).tolist()
    return Recall(hits, margins, depths, memory.cache_bytes(cache), read - start, end - read)


def _codes(head_dim: int, vocabulary: int, twin: float | None, seed: int) -> torch.Tensor:
    """Float32 [vocabulary, KV_HEADS * head_dim], of norm 1 in every head."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randn(vocabulary, KV_HEADS, head_dim, generator=draw, dtype=torch.float64)
    codes /= codes.norm(dim=-1, keepdim=True)
    if twin is not None:
        base, other = codes[0::2], codes[1::2]
        other = other - (other * base).sum(-1, keepdim=True) * base
        other /= other.norm(dim=-1, keepdim=True)
        codes[1::2] = twin * base + math.sqrt(1 - twin * twin) * other
    return codes.reshape(vocabulary, -1).float()
