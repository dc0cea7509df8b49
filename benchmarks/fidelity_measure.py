"""What fidelity.py measures of a cache on documents: how far its predictions are from the exact cache's."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from candidates import EXACT, Candidate

from forgeattention.tools.evaluation import texts
from forgeattention.tools.evaluation.streaming import attention, first_tokens, opened, spans, step, tokenise

BLOCK = 128
Row = dict[str, Any]


def documents(tokenizer: Any, windows: int, length: int, names: Sequence[str]) -> dict[str, list[torch.Tensor]]:
    """`windows` pieces of `length` tokens of each text, evenly spread, the model's first tokens in front of each."""
    out = {}
    for name in names:
        text = texts.enough(name, max(40_000, 8 * length) * windows)
        ids, first = tokenise(tokenizer, text), first_tokens(tokenizer)
        if len(ids) < windows * length:
            raise ValueError(f"[fidelity] expected {windows * length} tokens of {name}; got {len(ids)}")
        starts = [(2 * i + 1) * (len(ids) - length) // (2 * windows) for i in range(windows)]
        out[name] = list(opened(torch.stack([ids[start : start + length] for start in starts]), first))
    return out


def pack(values: torch.Tensor) -> str:
    """Float32 values as base64 text, for a journal."""
    return base64.b64encode(values.float().cpu().numpy().astype("<f4").tobytes()).decode()


def unpack(text: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The inverse of `pack`, flat."""
    return np.frombuffer(base64.b64decode(text), "<f4")


def predictions(
    model: Any, ids: torch.Tensor, candidate: Candidate, block: int = BLOCK, start: int | None = None
) -> Iterator[torch.Tensor]:
    """Log-probabilities [batch, block, vocabulary] at the positions of documents [batch, tokens] from `start` on (half
    of them if None), block by block."""
    tokens, cache = ids.shape[1], candidate.make(model)
    first = tokens // 2 if start is None else start
    for begin, stop in spans(tokens, block):
        keep = min(stop - first, stop - begin)
        with attention(model, candidate.implementation):
            logits = step(model, ids[:, begin:stop].to(model.device), cache, max(keep, 1))
        if keep > 0:
            yield logits.log_softmax(-1)


def loss_of(predicted: torch.Tensor, ids: torch.Tensor, at: int) -> float:
    """Sum over the tokens of documents [batch, tokens] that log-probabilities [batch, block, vocabulary], those at
    positions from `at` on, predict."""
    target = ids[:, at + 1 : at + 1 + predicted.shape[1], None].to(predicted.device)
    return -float(predicted[:, : target.shape[1]].gather(-1, target).double().sum())


def compare(
    model: Any,
    ids: torch.Tensor,
    candidates: Sequence[Candidate],
    block: int = BLOCK,
    reference: Sequence[torch.Tensor] | None = None,
    start: int | None = None,
) -> dict[str, Row]:
    """What every cache predicts beside what the exact one does, read side by side, block by block.

    Args:
        model: a transformers causal language model.
        ids: documents, int64 [batch, tokens].
        candidates: caches by name.
        block: tokens read at once.
        reference: the exact cache's predictions, if they are at hand.
        start: first position measured; half of the documents if None.

    Returns:
        By name: means of the KL to the exact cache (nats), of the share of the same top token and of the loss; how many
        `positions` they are means of; and `each`, the KL at every position (`pack`, row by row).
    """
    batch, tokens = ids.shape
    first = tokens // 2 if start is None else start
    exact = predictions(model, ids, EXACT, block, start) if reference is None else iter(reference)
    others = {c.name: predictions(model, ids, c, block, start) for c in candidates if c.name != EXACT.name}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in others}
    sums = {c.name: [0.0, 0.0] for c in candidates}
    at = first
    for p in exact:
        top, likely = p.argmax(-1), p.exp()
        for name, own in sums.items():
            q = next(others[name]) if name in others else p
            if name in others:
                found[name].append((likely * (p - q)).sum(-1).clamp_min(0))
            own[0] += float((top == q.argmax(-1)).sum())
            own[1] += loss_of(q, ids, at)
        at += p.shape[1]
    count = batch * (tokens - first)
    out = {}
    for name, (same, loss) in sums.items():
        each = torch.cat(found[name], 1) if name in others else torch.zeros(batch, tokens - first)
        out[name] = {
            "kl": float(each.double().mean()),
            "same_top": same / count,
            "loss": loss / (count - batch),
            "positions": count,
            "start": first,
            "each": pack(each),
        }
    return out


def greedy(model: Any, ids: torch.Tensor, candidate: Candidate, count: int) -> torch.Tensor:
    """`count` tokens after each of the prompts [batch, tokens], or fewer, ended by end-of-sequence tokens, if all rows
    ended: [batch, count]."""
    stop = torch.tensor(model.generation_config.eos_token_id, device=ids.device).reshape(-1)
    cache, out = candidate.make(model), torch.empty(len(ids), 0, dtype=ids.dtype, device=ids.device)
    ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    with attention(model, candidate.implementation):
        for start, last in spans(ids.shape[1], 2 * BLOCK):
            logits = step(model, ids[:, start:last], cache, keep=1)
        while True:
            new = logits[:, -1].argmax(-1, keepdim=True)
            new = torch.where(ended, stop[0], new)
            out = torch.cat([out, new], 1)
            ended |= torch.isin(new, stop)
            if out.shape[1] == count or bool(ended.all()):
                return torch.nn.functional.pad(out, (0, count - out.shape[1]), value=int(stop[0]))
            logits = step(model, new, cache, keep=1)
