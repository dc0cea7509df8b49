"""Keys and values that a model made and that its layer's cache does not have yet."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .layer import LayerCache
from .steps import StaticSteps

Keep = NDArray[np.bool_]


class PackedLayer(Protocol):
    """A packed layer of a framework's cache, as `PendingTokens` sees it.

    Attributes:
        shared: whether later layers of the model attend to this layer's keys too.
    """

    shared: bool

    @property
    def target(self) -> LayerCache | StaticSteps:
        """What takes the tokens: the layer's cache, or the steps of a graph over it."""

    def real_tokens(self, tokens: PendingTokens, mask: Any, m: int) -> Keep | None:
        """Which of the tokens are real, bool [batch, n], by the mask of the last m of them; None for all.

        Raises:
            ValueError: a mask that says more than which tokens are padding.
        """

    def appended(self, tokens: PendingTokens, keep: Keep | None) -> None:
        """Told that the tokens are in the cache now."""

    def abandoned(self, tokens: PendingTokens) -> None:
        """Told that attention to the tokens failed; they may or may not be in the cache (`tokens.appended`)."""

    def attribute(self, tokens: PendingTokens, name: str) -> Any:
        """What a model finds that reads an attribute of the tokens; raises ValueError for what packed keys do not
        have."""


class PendingTokens:
    """What a packed layer gives a model in place of keys and values. The attention function, which knows queries and
    mask, appends them to the cache and attends.

    Args:
        layer: where they belong.
        k, v: [batch, kv_heads, n, head_dim].

    Attributes:
        appended: whether they are in the cache.
    """

    def __init__(self, layer: PackedLayer, k: Any, v: Any) -> None:
        self.layer = layer
        self.k = k
        self.v = v
        self.appended = False
        self._past: LayerCache | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.layer.attribute(self, name)

    def attend(self, q: Any, mask: Any, scale: float, sink_logits: Any | None) -> Any:
        """Attention of the tokens over the whole sequence; the first call appends them. Layers that share these keys
        call it again.

        Args:
            q: [batch, q_heads, m, head_dim], the queries of the last m tokens.
            mask: as the framework's layer understands it.
            scale: softmax scale.
            sink_logits: float32 [q_heads], extra logits without a value; None for none.

        Returns:
            [batch, q_heads, m, head_dim] in q's dtype; zeros where a token is not real.
        """
        layer = self.layer
        cache = layer.target
        try:
            keep = layer.real_tokens(self, mask, q.shape[2])
            if self.appended:
                if self._past is None:
                    return cache.attend(q, scale, causal=q.shape[2] > 1, sink_logits=sink_logits)[0]
                return self._past.attend_chunk(q, self.k, self.v, scale, keep=keep, sink_logits=sink_logits)
            if layer.shared and not cache.is_step(self.k.shape[2], keep):
                # Layers that share these keys attend later, when the cache has moved on.
                self._past = cache.fork()
            out = cache.step(q, self.k, self.v, scale, keep=keep, sink_logits=sink_logits)
            self.appended = True
            layer.appended(self, keep)
        except BaseException:
            layer.abandoned(self)
            raise
        return out
