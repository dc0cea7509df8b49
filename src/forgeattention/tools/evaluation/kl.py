"""How far a cache bends a model's predictions: KL divergence, same top token and perplexity against the exact cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .streaming import attention, opened, spans, step


@dataclass(frozen=True)
class Part:
    """Means over the positions from `start` to before `stop` of every text; see `Fidelity`."""

    start: int
    stop: int
    kl: float
    same_top: float
    perplexity: float
    exact_perplexity: float


@dataclass(frozen=True)
class Fidelity:
    """Means over all measured positions.

    Attributes:
        kl: KL(exact || candidate) of the next-token distributions, nats.
        same_top: share of positions where both caches make the same token the likeliest, in [0, 1].
        perplexity: of the text, read with the candidate cache.
        exact_perplexity: of the same tokens, read with the exact cache.
        positions: how many positions `kl` and `same_top` are means of.
        parts: the same by position, in order: does the damage grow with the context?
    """

    kl: float
    same_top: float
    perplexity: float
    exact_perplexity: float
    positions: int
    parts: tuple[Part, ...] = ()


def windows(ids: torch.Tensor, length: int, count: int, first: Sequence[int] = ()) -> torch.Tensor:
    """The first `count` pieces of `length` tokens of a text.

    Args:
        ids: int64, [tokens].
        length, count: tokens of a piece, and how many.
        first: tokens that the model wants in front of every text (`streaming.first_tokens`); they take the place of a
            piece's last ones.

    Returns:
        int64, [count, length].

    Raises:
        ValueError: the text is too short.
    """
    if length < 2 or count < 1 or length * count > ids.shape[0]:
        raise ValueError(
            f"[kl] expected length >= 2 and count >= 1 with length * count within the text's {ids.shape[0]} tokens; "
            f"got length {length}, count {count}"
        )
    return opened(ids[: length * count].reshape(count, length), first)


@torch.no_grad()
def compare(
    model: Any,
    ids: torch.Tensor,
    make_cache: Callable[[], Any],
    *,
    block: int = 128,
    prompt_block: int | None = None,
    start: int | None = None,
    parts: int = 1,
    implementation: str | None = None,
    reference_implementation: str | None = None,
    on_window: Callable[[], None] | None = None,
) -> Fidelity:
    """Read texts with the exact cache and with another one, side by side, and compare what the model predicts.

    Both caches grow block by block as in chunked prefill and decoding, so that every prediction is made from what the
    candidate cache really holds by then. `block=1` is decoding itself.

    Args:
        model: a transformers causal language model.
        ids: int64, [texts, tokens]; each text is read alone, with new caches. The exact one is transformers'
            DynamicCache.
        make_cache: makes an empty candidate cache.
        block: tokens that are read at once.
        prompt_block: the same before `start`; `block` if None.
        start: first position measured; half of the text if None, so that the candidate has something to lose.
        parts: into how many ranges of positions, equal to one, `Fidelity.parts` divides the measured ones.
        implementation: transformers attention implementation for the candidate; None leaves the model's.
        reference_implementation: the same for the exact cache.
        on_window: called after every text.

    Raises:
        ValueError: `ids` has no measured position that predicts a token, a made cache is not empty, or the model
            predicts NaN or inf.
    """
    from transformers import DynamicCache

    if ids.ndim != 2 or ids.shape[0] < 1:
        raise ValueError(f"[kl] expected ids of shape [texts, tokens]; got {list(ids.shape)}")
    tokens = ids.shape[1]
    start = tokens // 2 if start is None else start
    if not 0 <= start < tokens - 1:
        raise ValueError(f"[kl] expected 0 <= start < tokens - 1 = {tokens - 1}; got {start}")
    if not 1 <= parts <= tokens - 1 - start:
        raise ValueError(f"[kl] expected 1 <= parts <= {tokens - 1 - start} measured positions; got {parts}")

    # Per position: KL, same top token, loss, exact loss; the last position predicts nothing that the text holds.
    sums = torch.zeros(4, tokens, dtype=torch.float64)
    for text in ids.to(model.device):
        reference, candidate = DynamicCache(config=model.config), make_cache()
        if (held := int(candidate.get_seq_length())) != 0:
            raise ValueError(f"[kl] expected make_cache to make an empty cache; got one of {held} tokens")
        read = start if prompt_block else 0
        pieces = [*spans(read, prompt_block or block), *((read + a, read + b) for a, b in spans(tokens - read, block))]
        for first, last in pieces:
            piece = text[None, first:last]
            with attention(model, reference_implementation):
                exact = step(model, piece, reference)[0]
            with attention(model, implementation):
                other = step(model, piece, candidate)[0]
            skip = max(start - first, 0)
            if skip >= last - first:
                continue
            p, q = (logits[skip:].log_softmax(-1) for logits in (exact, other))
            if not (torch.isfinite(p).all() and torch.isfinite(q).all()):
                raise ValueError("[kl] expected finite predictions; got NaN or inf")
            at = slice(first + skip, last)
            target = text[first + skip + 1 : last + 1, None]
            known = slice(first + skip, first + skip + len(target))
            sums[0, at] += (p.exp() * (p - q)).sum(-1).double().cpu()
            sums[1, at] += (p.argmax(-1) == q.argmax(-1)).double().cpu()
            sums[2, known] -= q[: len(target)].gather(-1, target)[:, 0].double().cpu()
            sums[3, known] -= p[: len(target)].gather(-1, target)[:, 0].double().cpu()
        if on_window is not None:
            on_window()
    count = ids.shape[0]

    def means(first: int, stop: int) -> dict[str, float]:
        kl, same = (sums[:2, first:stop].sum(1) / (count * (stop - first))).tolist()
        predicted = min(stop, tokens - 1) - first
        loss, exact_loss = (sums[2:, first:stop].sum(1) / (count * predicted)).tolist()
        return {"kl": kl, "same_top": same, "perplexity": math.exp(loss), "exact_perplexity": math.exp(exact_loss)}

    borders = [start + (tokens - start) * i // parts for i in range(parts + 1)]
    ranges = tuple(Part(a, b, **means(a, b)) for a, b in zip(borders, borders[1:]))
    return Fidelity(**means(start, tokens), positions=count * (tokens - start), parts=ranges)
