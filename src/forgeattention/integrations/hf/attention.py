"""The attention implementation "forge" of transformers: what masks say, packed layers, and those that are not packed.

Importing this registers it.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ...cache import PendingTokens
from ...cache.chunk_torch import attention, with_sinks
from ...models.support import unserved

CAPPED_QUERIES = 256
"""Queries whose soft-capped scores are in memory at once."""


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
    """Attention to keys and values as they are: transformers' "sdpa", and sink logits and soft caps, which that does
    not know.

    Returns:
        [batch, n, q_heads, head_dim].
    """
    if (cap := kwargs.get("softcap")) is not None:
        unknown = ("block_indices", "sinks", "s_aux", "indices", "position_bias")
        others = [name for name in unknown if kwargs.get(name) is not None]
        if others or dropout:
            raise ValueError(f"[forge] expected soft-capped scores without {', '.join(others) or 'dropout'}; got both")
        return capped(module, q, k, v, mask, float(cap), scaling, kwargs.get("is_causal"))
    for name in ("block_indices", "sinks"):
        if kwargs.get(name) is not None:
            raise ValueError(f"[forge] expected attention without {name}; got them from {type(module).__name__}")
    if (indices := kwargs.pop("indices", None)) is not None:
        mask = _selected(mask, indices, k)
    sinks = kwargs.get("s_aux")
    if sinks is None:
        return sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling, **kwargs)[0]
    if dropout or kwargs.get("position_bias") is not None:
        raise ValueError("[forge] expected sink logits alone; got dropout or position_bias with them")
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    width = v.shape[-1]
    if width < k.shape[-1]:  # torch's kernels want one width
        v = torch.nn.functional.pad(v, (0, k.shape[-1] - width))
    o, lse = attention(q, k, v, scale, causal=mask is None and q.shape[2] > 1, bias=mask)
    return with_sinks(o[..., :width], lse, sinks.float()).to(q.dtype).transpose(1, 2).contiguous()


def capped(
    module: torch.nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    cap: float,
    scaling: float | None,
    is_causal: bool | None,
) -> torch.Tensor:
    """Attention with scores cap * tanh(score / cap) (Gemma 2, arXiv 2408.00118), which torch's kernels do not know.

    Arguments and result as of `stock`, without dropout.
    """
    batch, heads, n, dim = q.shape
    tokens, scale = k.shape[2], dim**-0.5 if scaling is None else float(scaling)
    causal = (getattr(module, "is_causal", True) if is_causal is None else is_causal) and mask is None and n > 1
    out = q.new_empty(batch, heads, n, v.shape[3])
    k, v, least = k.unsqueeze(2), v.unsqueeze(2), torch.finfo(q.dtype).min
    for start in range(0, n, CAPPED_QUERIES):
        rows = slice(start, min(start + CAPPED_QUERIES, n))
        grouped = q[:, :, rows].unflatten(1, (k.shape[1], -1))
        scores = torch.tanh(grouped @ k.transpose(-1, -2) * (scale / cap)) * cap
        if mask is not None:
            part = mask[:, :, rows, :tokens]
            part = part.unsqueeze(2) if part.shape[1] == 1 else part.unflatten(1, (k.shape[1], -1))
            scores = scores.masked_fill(~part, least) if part.dtype == torch.bool else scores + part
        elif causal:
            at = torch.arange(tokens, device=q.device)
            scores = scores.masked_fill(at > at[tokens - n :][rows][:, None], least)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        out[:, :, rows] = (weights @ v).flatten(1, 2)
    return out.transpose(1, 2).contiguous()


def _selected(mask: torch.Tensor | None, indices: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The mask of a layer that attends only to the keys that an indexer chose (DeepSeek's sparse attention).

    Models fold the choice into the mask by themselves for "sdpa", by its name, and else give it to the function.

    Args:
        mask: [batch, 1, n, tokens], bool or additive.
        indices: chosen keys of each query, [batch, n, chosen].
        k: [batch, kv_heads, tokens, head_dim].
    """
    if mask is None or mask.ndim != 4:
        raise ValueError("[forge] expected a 4-D mask beside the indices of keys; got none")
    chosen = torch.zeros(*indices.shape[:2], k.shape[2], dtype=torch.bool, device=k.device)
    chosen = chosen.scatter_(-1, indices.long(), True)[:, None]
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


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


def forge_mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: Any = causal_mask_function, **kwargs: Any
) -> torch.Tensor | None:
    """The mask for transformers' `AttentionMaskInterface`.

    For packed layers None without a mask or where no position was ever padding, else a `PaddingMask`; for everything
    else, and for patterns other than causal, the mask of "sdpa".

    Raises:
        ValueError: a model that does not read masks of this kind.
    """
    config = kwargs.get("config")
    if config is not None and (reason := unserved(config)) is not None:
        raise ValueError(
            f"[forge] expected a model whose attention can be exchanged; {reason}: load it without "
            "attn_implementation='forge'"
        )
    layer = getattr(kv_length, "layer", None)
    if layer is None or mask_function is not causal_mask_function or not kwargs.get("allow_is_causal_skip", True):
        if q_length > 1 and "reuse" in (getattr(kwargs.get("config"), "kv_sharing_modes", None) or ()):
            # Such models drop queries half way, so that a missing mask could no longer mean a causal one.
            kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=int(kv_length), mask_function=mask_function, **kwargs
        )
    mask = kwargs.get("attention_mask")
    if mask is None or (not layer.padded and mask.shape[1] >= kv_length and bool(mask[:, :kv_length].all())):
        return None
    return mask[:, None, None].expand(-1, 1, q_length, -1).as_subclass(PaddingMask)


def forge_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function for transformers' `AttentionInterface`: packed attention for packed layers, "sdpa" for others.

    Args:
        module: the attention module.
        query: [batch, q_heads, n, head_dim].
        key, value: tensors, or the handle of a packed layer.
        attention_mask: of `forge_mask`.
        dropout, scaling, kwargs: as transformers passes them; `s_aux` are sink logits [q_heads].

    Returns:
        [batch, n, q_heads, head_dim] and None.

    Raises:
        ValueError: dropout, a soft cap, a position bias, a sliding window or full attention with a packed layer.
    """
    if not isinstance(key, PendingTokens):
        return stock(module, query, key, value, attention_mask, dropout, scaling, **kwargs), None
    causal = kwargs.get("is_causal")
    name = type(module).__name__
    for asked, wrong in (
        (f"attention_dropout={dropout} of a model in training mode; call model.eval()", dropout),
        ("soft-capped scores; put the layer into exact_layers", kwargs.get("softcap") is not None),
        ("a position_bias; put the layer into exact_layers", kwargs.get("position_bias") is not None),
        ("block_indices; put the layer into exact_layers", kwargs.get("block_indices") is not None),
        ("indices of keys; put the layer into exact_layers", kwargs.get("indices") is not None),
        ("sinks of its own; put the layer into exact_layers", kwargs.get("sinks") is not None),
        ("a sliding_window; put the layer into exact_layers", kwargs.get("sliding_window") is not None),
        ("output_attentions=True; ask for none", kwargs.get("output_attentions")),
        (
            "attention that is not causal; put the layer into exact_layers",
            not (getattr(module, "is_causal", True) if causal is None else causal),
        ),
    ):
        if wrong:
            raise ValueError(f"[forge] expected plain causal attention in a packed layer; got {name} with {asked}")
    sinks = kwargs.get("s_aux")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    layer: Any = key.layer
    sinks = None if sinks is None else sinks.detach().float()
    if layer.narrow:
        out = key.attend(layer.widened(query.detach()), attention_mask, scale, sinks)[..., : layer.head_dims[1]]
    else:
        out = key.attend(query.detach(), attention_mask, scale, sinks)
    if query.requires_grad and torch.is_grad_enabled():
        out = without_gradient(out, query)
    return out.transpose(1, 2).contiguous(), None


def without_gradient(out: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """`out`, which was computed from `source` without a gradient; asking for one is an error."""
    return _NoGradient.apply(out, source)


class _NoGradient(torch.autograd.Function):
    """A result through which no gradient can flow: says so instead of training a model by a part of its gradient."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        raise ValueError("[forge] expected a ForgeCache in inference only; got a gradient for it: train without one")


CLASS_TABLES = {
    "falcon": "FALCON_ATTENTION_CLASSES",
    "git": "GIT_SELF_ATTENTION_CLASSES",
    "gpt_neo": "GPT_NEO_ATTENTION_CLASSES",
    "gptj": "GPTJ_ATTENTION_CLASSES",
}
"""Families that look up a class by the name of the attention implementation, with a KeyError for unknown ones."""


def register() -> None:
    """Makes attn_implementation="forge" known to transformers; importing this module does it."""
    AttentionInterface.register("forge", forge_attention)
    AttentionMaskInterface.register("forge", forge_mask)
    for family, name in CLASS_TABLES.items():
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        if (classes := getattr(module, name, None)) is not None:
            classes.setdefault("forge", functools.partial(_refuse, family))


def _refuse(family: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        f"[forge] expected a model whose attention can be exchanged; got {family}, which has attention classes of its "
        "own: load it without attn_implementation='forge'"
    )


register()
