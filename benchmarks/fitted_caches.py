"""Caches fitted to a model by a text that it reads once: OSCAR's, ours, and ours with OSCAR's rotations.

The text is generated (`texts.enough("mixed", ...)` with a seed of its own), and no document that is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import peer_caches
import torch
from candidates import Candidate, peer
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from forgeattention.codec import Codec, CodecSpec
from forgeattention.codec.presets import PRESETS
from forgeattention.codec.transform import hadamard
from forgeattention.integrations.hf.cache import ForgeCache
from forgeattention.models.calibration import GRAM_RIDGE, codecs_for
from forgeattention.tools.calibrate import calibrate
from forgeattention.tools.evaluation import texts
from forgeattention.tools.evaluation.streaming import attention, first_tokens, opened, spans, step, tokenise

TOKENS, SEED = 4096, 97
NAME = "forge_benchmark_capture"
CLIP_K, CLIP_V = 0.96, 0.92
"""Shares of a vector's channels that OSCAR leaves unclipped (its repository, rotation/eval_oscar_gpqa.sh)."""


@dataclass(frozen=True)
class Seen:
    """What one layer's queries and values were like.

    Attributes:
        queries: mean of q q^T over the query heads of each KV head, float64 [kv_heads, head_dim, head_dim].
        values: mean of s v v^T of each KV head, s being k^T (mean q q^T) k over its mean: how much a token's value
            counts for queries.
    """

    queries: torch.Tensor
    values: torch.Tensor


def text(tokenizer: Any, tokens: int = TOKENS) -> torch.Tensor:
    """What models are fitted on: int64 [1, tokens]."""
    ids = tokenise(tokenizer, texts.enough("mixed", 8 * tokens, SEED))
    return opened(ids[None, :tokens], first_tokens(tokenizer))


@torch.no_grad()
def capture(model: Any, ids: torch.Tensor) -> dict[int, Seen]:
    """What a model's layers of full attention see while it reads tokens [1, tokens]."""
    wanted = set(peer_caches.full_attention_layers(model.config))
    states: dict[int, list[tuple[torch.Tensor, ...]]] = {i: [] for i in wanted}

    def record(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **kwargs: Any) -> Any:
        if module.layer_idx in wanted:
            n = q.shape[2]
            states[module.layer_idx].append(tuple(x[0, :, -n:].float() for x in (q, k, v)))
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)

    AttentionInterface.register(NAME, record)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    cache = DynamicCache(config=model.config)
    with attention(model, NAME):
        for start, stop in spans(ids.shape[1], 1024):
            step(model, ids[:, start:stop].to(model.device), cache, keep=1)
    return {i: _seen(*(torch.cat(x, 1) for x in zip(*found))) for i, found in states.items()}


def _seen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Seen:
    heads = k.shape[0]
    grouped = q.reshape(heads, -1, q.shape[-1])
    gram = (grouped.transpose(1, 2) @ grouped / grouped.shape[1]).double()
    weight = torch.einsum("htd,hde,hte->ht", k.double(), gram, k.double())
    weight = weight / weight.mean(1, keepdim=True)
    values = (v.double() * weight[..., None]).transpose(1, 2) @ v.double() / v.shape[1]
    return Seen(gram.cpu(), values.cpu())


def rotation(covariance: torch.Tensor) -> torch.Tensor:
    """OSCAR's: eigenvectors of a covariance [..., head_dim, head_dim], then a Hadamard matrix, so that each coded
    channel holds all of them alike."""
    vectors = torch.linalg.eigh((covariance + covariance.transpose(-1, -2)) / 2)[1]
    return vectors @ torch.tensor(hadamard(covariance.shape[-1]))


def int2(x: torch.Tensor, clip: float) -> torch.Tensor:
    """Vectors clipped at the magnitude of their channel of rank `clip`, and rounded to four levels from their least to
    their largest, with a bfloat16 step and zero."""
    index = min(int(clip * x.shape[-1]), x.shape[-1] - 1)
    bound = x.abs().sort(-1)[0][..., index : index + 1]
    y = torch.maximum(torch.minimum(x, bound), -bound)
    low = y.amin(-1, keepdim=True)
    size = ((y.amax(-1, keepdim=True) - low) / 3).clamp_min(1e-8)
    zero = -low / size
    codes = (y / size + zero + 0.5).floor().clamp(0, 3)
    return (codes - zero.bfloat16().float()) * size.bfloat16().float()


def oscar(seen: dict[int, Seen], head_dim: int, device: Any) -> peer_caches.Peer:
    """OSCAR (arXiv 2605.17757; FutureMLS-Lab/OSCAR): INT2 of states turned by one rotation a layer, from the mean of
    its KV heads' covariances of queries (keys) and of values weighted by attention (values)."""
    turns = {
        i: [rotation(x.mean(0)).to(device, torch.float32) for x in (found.queries, found.values)]
        for i, found in seen.items()
    }

    def coder(side: int, clip: float) -> peer_caches.Coder:
        def code(x: torch.Tensor, layer: int) -> torch.Tensor:
            turn = turns[layer][side]
            return int2(x.float() @ turn, clip) @ turn.T

        return code

    source = "arXiv 2605.17757; github.com/FutureMLS-Lab/OSCAR"
    bits = 2 + 32 / head_dim
    return peer_caches.Peer("OSCAR INT2", bits, coder(0, CLIP_K), coder(1, CLIP_V), source, by_layer=True)


def gram_codecs(model: Any, spec: CodecSpec, seen: dict[int, Seen]) -> dict[int, Codec]:
    """Codecs shaped by the queries that were seen, not by the weights' guess."""
    out = {}
    for i, base in codecs_for(model, spec, seen).items():
        diagonal = base.k_transform.diagonal
        out[i] = Codec(
            spec, base.head_dim, base.kv_heads,
            k_diagonal=None if diagonal is None else diagonal[:, : base.head_dim],
            query_gram=seen[i].queries.numpy(), gram_ridge=GRAM_RIDGE,
        )  # fmt: skip
    return out


def turned_codecs(model: Any, spec: CodecSpec, seen: dict[int, Seen], shaped: bool) -> dict[int, Codec]:
    """Our codes of states turned by OSCAR's rotations, one for each KV head; `shaped`: errors too follow the queries
    that were seen."""
    custom = replace(spec, rotation="custom")
    out = {}
    for i, found in seen.items():
        k, v = (np.swapaxes(rotation(x).numpy(), 1, 2) for x in (found.queries, found.values))
        gram = {"query_gram": found.queries.numpy(), "gram_ridge": GRAM_RIDGE} if shaped else {}
        out[i] = Codec(custom, k.shape[-1], len(k), k_matrix=k, v_matrix=v, **gram)
    return out


def _packed(name: str, spec: CodecSpec, codecs: dict[int, Codec], backend: str) -> Candidate:
    bits = sum(codec.format.effective_bits for codec in codecs.values()) / len(codecs)

    def make(model: Any) -> Any:
        return ForgeCache(model, spec, codecs=codecs, backend=backend)

    return Candidate(name, bits, make, "forge", "calibrated", spec=spec)


def candidates(
    model: Any,
    tokenizer: Any,
    backend: str = "auto",
    *,
    sinks: int = 4,
    window: int = 128,
    bits: float = 2.25,
    calibrated: bool = True,
) -> list[Candidate]:
    """The caches that are fitted to a model by reading a text. The calibrated `small`, of at most `bits`, can be left
    out: it reads the text twice for every layer."""
    ids = text(tokenizer)
    seen = capture(model, ids)
    dim = next(iter(seen.values())).queries.shape[-1]
    out = [peer(oscar(seen, dim, model.device), model.config, sinks, window)]
    for preset in ("small", "balanced"):
        spec = replace(PRESETS[preset], sinks=sinks, window=window)
        custom = replace(spec, rotation="custom")
        out += [
            _packed(f"{preset}, queries seen", spec, gram_codecs(model, spec, seen), backend),
            _packed(f"{preset}, OSCAR's rotation", custom, turned_codecs(model, spec, seen, False), backend),
            _packed(
                f"{preset}, OSCAR's rotation, queries seen", custom, turned_codecs(model, spec, seen, True), backend
            ),
        ]
    if not calibrated:
        return out
    spec = replace(PRESETS["small"], sinks=sinks, window=window)
    moved = calibrate(model, spec, bits=bits, ids=ids[:, :1024])
    return [*out, _packed(f"small, calibrated to {bits:g} bits", spec, moved.codecs(model), backend)]
