"""Reading tokens into a cache block by block, as every measure here does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def attention(model: Any, implementation: str | None) -> Iterator[None]:
    """Run `model` with this transformers attention implementation; None leaves it as it is."""
    before = model.config._attn_implementation
    if implementation is None or implementation == before:
        yield
        return
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def first_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the model wants in front of every text, such as Gemma's `<bos>`; none for most.

    A piece cut out of a long text needs them as much as a whole text: without `<bos>` Gemma-3-270M's perplexity of
    plain prose is above a hundred.
    """
    ids: list[int] = tokenizer("")["input_ids"]
    end = tokenizer.eos_token_id
    return ids[:-1] if len(ids) > 1 and ids[-1] == end else ids


def tokenise(tokenizer: Any, text: str) -> torch.Tensor:
    """A text without first or last tokens added, so that pieces can be cut from it: int64 [tokens]."""
    ids: torch.Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return ids[0]


def opened(pieces: torch.Tensor, first: Sequence[int]) -> torch.Tensor:
    """Pieces [pieces, tokens] with the `first_tokens` of the model in front, their last tokens left out instead."""
    if not first:
        return pieces
    front = torch.tensor(list(first), dtype=pieces.dtype, device=pieces.device).expand(len(pieces), -1)
    return torch.cat([front, pieces[:, : pieces.shape[1] - len(first)]], 1)


def spans(tokens: int, block: int) -> list[tuple[int, int]]:
    """The borders (start, end) of `tokens` cut into blocks; the last may be shorter.

    Raises:
        ValueError: `block` is not positive.
    """
    if block < 1:
        raise ValueError(f"[streaming] expected block >= 1; got {block}")
    return [(start, min(start + block, tokens)) for start in range(0, tokens, block)]


def step(model: Any, ids: torch.Tensor, cache: Any, keep: int = 0) -> torch.Tensor:
    """Feed one block to the model.

    Args:
        model: a transformers causal language model.
        ids: int64, [batch, tokens].
        cache: the transformers cache that holds what came before; it grows by `tokens`.
        keep: how many last positions get logits; 0 means all.

    Returns:
        Logits, float32, [batch, kept tokens, vocabulary].
    """
    return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits.float()
