"""What the subcommands have in common: the spec, the model and the caches that the command line asks for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ... import models
from ...codec.presets import DEFAULT, PRESETS
from ...codec.spec import CodecSpec
from ...eviction import Eviction
from ...models.shape import head_dim
from ...sparse import SparseSpec, sparse_means


def asks_for_spec(args: argparse.Namespace) -> bool:
    """Whether the command line names a preset or bits."""
    return any(getattr(args, name) is not None for name in ("preset", "k_bits", "v_bits"))


def spec_from(args: argparse.Namespace) -> CodecSpec:
    """The codec that the command line asks for: `--preset`, with `--k-bits` and `--v-bits` in place of its own."""
    return PRESETS[args.preset or DEFAULT].with_bits(args.k_bits, args.v_bits)


def sparse_from(args: argparse.Namespace) -> SparseSpec | None:
    """What `--sparse` and `--sparse-min` ask for."""
    text = getattr(args, "sparse", None)
    return None if text is None else SparseSpec.parse(text, min_context=args.sparse_min)


def caches(
    model: Any, spec: CodecSpec, backend: str = "auto", **options: Any
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Makers of an exact and of a packed cache for `model`; `options` as for `ForgeCache`."""
    from transformers import DynamicCache

    from ...integrations.hf.cache import ForgeCache

    return lambda: DynamicCache(config=model.config), lambda: ForgeCache(model, spec, backend=backend, **options)


@dataclass(frozen=True)
class Setup:
    """A loaded model and both caches.

    Attributes:
        bits: effective bits per packed element.
        sparse: what decode steps of the packed cache read; None for all.
        sparse_log: statistics of every sparse step so far.
    """

    model: Any
    tokenizer: Any
    spec: CodecSpec
    make_exact: Callable[[], Any]
    make_packed: Callable[[], Any]
    bits: float
    sparse: SparseSpec | None = None
    sparse_log: list[dict[str, float]] = field(default_factory=list)

    def sparse_result(self) -> dict[str, Any]:
        """What of sparse attention belongs into a command's result; nothing without it."""
        if self.sparse is None:
            return {}
        means = sparse_means(self.sparse_log)
        if means:
            print(
                f"sparse: kept {means['kept_tokens']:.0f} tokens of a query, dropped {means['dropped_mass']:.4f} of "
                f"the mass (worst {means['dropped_mass_worst']:.4f}), tiles skipped {means['tiles_skipped']:.3f}, read "
                f"{means['bytes_read'] / means['bytes_dense']:.3f} of the packed bytes"
            )
        return {"sparse": vars(self.sparse), "sparse_statistics": means, "sparse_steps": len(self.sparse_log)}


def setup(args: argparse.Namespace) -> Setup:
    """Load what `--model`, `--device`, `--dtype`, `--backend` and the spec's arguments say."""
    import torch

    spec = spec_from(args)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    model, tokenizer = models.load(args.model, dtype=dtype, device=args.device)
    sparse, log = sparse_from(args), list[dict[str, float]]()
    evict = getattr(args, "evict", None)
    eviction = None if evict is None else Eviction.parse(evict)
    options: dict[str, Any] = {"sparse": sparse, "sparse_log": log, "eviction": eviction}
    make_exact, make_packed = caches(model, spec, args.backend, **options)
    bits = spec.page_format(head_dim(model)).effective_bits
    return Setup(model, tokenizer, spec, make_exact, make_packed, bits, sparse, log)


def eviction_report(cache: Any) -> dict[str, Any] | None:
    """What eviction did in a cache (`ForgeCache.report`), or None for a cache that does not evict.

    Raises:
        ValueError: it evicts, and no round has been: what was measured is no result of eviction.
    """
    if getattr(cache, "eviction", None) is None:
        return None
    found = cache.report()["eviction"]
    if not found.get("rounds"):
        raise ValueError("[eval] expected rounds of eviction; got none: take a longer text or a smaller retention")
    return found


def eviction_summary(evict: str, reports: list[dict[str, Any]]) -> str:
    """What eviction did in all of a run's caches together, as a line."""
    total = {name: sum(report[name] for report in reports) for name in ("rounds", "evicted", "demoted", "recalled")}
    share = sum(report["held"] for report in reports) / sum(report["seen"] for report in reports)
    return (
        f"eviction {evict}: {total['rounds']:,} rounds of layers, {total['evicted']:,} pages evicted, "
        f"{total['demoted']:,} demoted, {total['recalled']:,} recalled; {share:.0%} of the tokens in memory at the end"
    )
