"""Attention of layers that are not packed, in torch, and what masks say."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ...cache.chunk_torch import attention, with_sinks


def stock(
    module: torch.nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention of a layer that is not packed: transformers' "sdpa", and sink logits, which that does not know.

    Returns:
        [batch, n, q_heads, head_dim].
    """
    sinks = kwargs.get("s_aux")
    if sinks is None:
        return sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling, **kwargs)[0]
    if dropout or kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("[forge] expected sink logits alone; got dropout, softcap or position_bias with them")
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    o, lse = attention(q, k, v, scale, causal=mask is None and q.shape[2] > 1, bias=mask)
    return with_sinks(o, lse, sinks.float()).to(q.dtype).transpose(1, 2).contiguous()


class PaddingMask(torch.Tensor):
    """Which positions are real, bool [batch, 1, n, positions], the same for all n queries (without memory for them).

    Has the shape of a full mask, since models slice masks by query; a class of its own, since it says nothing of
    causality.
    """


def padding(mask: torch.Tensor, past: NDArray[np.bool_], n: int) -> NDArray[np.bool_] | None:
    """Which of n new positions are real, by a padding mask or by a 4-D mask that is causal up to padding.

    Args:
        mask: `PaddingMask`, or bool or additive [batch or 1, heads or 1, m, positions] for the last m of the n.
        past: bool [batch, positions before], which of them are real.
        n: new positions.

    Returns:
        bool [batch, n], or None if all are real.

    Raises:
        ValueError: a mask that hides or shows other positions.
    """
    batch, seen = past.shape
    total = seen + n
    if isinstance(mask, PaddingMask):
        given = mask[:, 0, -1, :total].cpu().numpy()
        given = np.pad(given, ((0, 0), (0, total - given.shape[1])))
    elif mask.ndim == 4 and mask.shape[2] <= n and mask.shape[3] >= total:
        shown = mask[..., :total] if mask.dtype == torch.bool else mask[..., :total] == 0
        plain = mask.dtype == torch.bool or bool((shown | (mask[..., :total] <= torch.finfo(mask.dtype).min / 2)).all())
        real = shown[:, 0, -1].expand(batch, total)
        m = mask.shape[2]
        causal = torch.ones(m, total, dtype=torch.bool, device=mask.device).tril(total - m)
        expected = causal & real[:, None, None]
        # What a padded query before all real tokens sees is read by nobody: masks show it nothing, all, or itself.
        alone = torch.eye(total, dtype=torch.bool, device=mask.device)[total - m :]
        unread = ~expected.any(-1) & (~shown.any(-1) | shown.all(-1) | (shown == alone).all(-1))
        same = (shown == expected).all(-1) | unread
        if not plain or not bool(same.all()):
            raise ValueError("[forge] expected a mask that is causal up to padding; got another pattern")
        given = real.cpu().numpy()
    else:
        raise ValueError(f"[forge] expected a mask [{batch}, 1, {n}, {total}]; got {list(mask.shape)}")
    if past.shape[0] and not (given[:, :seen] == past).all():
        raise ValueError("[forge] expected the padding of earlier steps unchanged; got another mask for the past")
    keep = given[:, seen:]
    return None if keep.all() else np.ascontiguousarray(keep)


def tensor_bytes(layer: Any) -> int:
    """Bytes of the tensors that a stock cache layer holds."""
    found: list[Any] = list(vars(layer).values())
    for value in vars(layer).values():
        if isinstance(value, dict):
            found += value.values()
    storages = [x.untyped_storage() for x in found if isinstance(x, torch.Tensor)]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())
