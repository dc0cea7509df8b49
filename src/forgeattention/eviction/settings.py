"""What a cache is told about eviction."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .policy import POLICIES, AttentionWindow, Policy
from .store import DiskStore, HostStore
from .triattention import Centres

ON_EVICT = ("drop", "host", "disk")


@dataclass(frozen=True)
class Eviction:
    """How a packed cache gives up pages.

    Attributes:
        policy: which pages, and how many.
        on_evict: "drop", or demote to "host" memory or to a file ("disk"), from where pages are recalled.
        interval: tokens from one round to the next.
        fraction: share of the model's layers that are evicted from, for hybrid scaling (`policy.effective`); None
            reads it from the model's config.
        centres: query centres by layer, from `load_centres`; None gathers them while the prompt is read.
        max_bytes: most bytes that a layer's demoted pages take; what goes beyond it is dropped.
        folder: of the file on disk; the system's folder for temporary files if None.
        join: a page's score is that of its best token, or their mean.
        recall_share: a demoted page comes back when some query is estimated to give it this share of the packed
            tokens' attention.
        recall_pages: most recalled pages that a row holds in a layer at a time, beyond its budget.
    """

    policy: Policy
    on_evict: Literal["drop", "host", "disk"] = "drop"
    interval: int = 128
    fraction: float | None = None
    centres: Mapping[int, Centres] | None = None
    max_bytes: int | None = None
    folder: str | os.PathLike[str] | None = None
    join: Literal["max", "mean"] = "max"
    recall_share: float = 0.05
    recall_pages: int = 8

    def __post_init__(self) -> None:
        if self.on_evict not in ON_EVICT:
            raise ValueError(f"[eviction] expected on_evict in {ON_EVICT}; got {self.on_evict!r}")
        if self.interval < 1 or self.recall_pages < 0 or not 0 <= self.recall_share <= 1:
            raise ValueError(
                "[eviction] expected interval >= 1, recall_pages >= 0 and recall_share in [0, 1]; got "
                f"{self.interval}, {self.recall_pages}, {self.recall_share}"
            )

    @classmethod
    def parse(cls, text: str) -> Eviction:
        """From "POLICY:RETENTION[:drop|host|disk]", such as "v3:0.9:host"; for the window, tokens: "window:4096".

        Raises:
            ValueError: another form.
        """
        name, _, rest = text.partition(":")
        amount, _, on_evict = rest.partition(":")
        form = f"POLICY:RETENTION[:{'|'.join(ON_EVICT)}] with POLICY of {', '.join(POLICIES)}"
        try:
            made = AttentionWindow(tokens=int(amount)) if name == "window" else POLICIES[name](float(amount))
        except (KeyError, ValueError) as error:
            raise ValueError(f"[eviction] expected {form}; got {text!r} ({error})") from None
        if on_evict not in ("", *ON_EVICT):
            raise ValueError(f"[eviction] expected {form}; got {text!r}")
        return cls(made, on_evict or "drop")  # type: ignore[arg-type]

    def store(self, page_bytes: int) -> HostStore | None:
        """A new store for demoted pages of a layer, or None where they are dropped."""
        if self.on_evict == "drop":
            return None
        if self.on_evict == "host":
            return HostStore(page_bytes, self.max_bytes)
        return DiskStore(page_bytes, self.max_bytes, self.folder)
