"""decode_attention without the questions that every step of a layer would answer alike."""

from __future__ import annotations

from typing import Any

from ..codec.codec import Codec
from .arrays import Array, device_of, is_torch, traced
from .attention import check_decode, decode_attention
from .checks import check_exact, check_table, describe, fail
from .registry import launch
from .table import ExactTokens, PageTable


class PreparedDecode:
    """`decode_attention` of one layer: arguments checked and backend chosen once, for an example of its calls.

    A call costs less host time than `decode_attention`. It still refuses queries of another shape, dtype or device than
    the example's, and checks tables and exact tokens that no op has seen: keep them from step to step, and take
    `ExactTokens.grown` where only the number of tokens has changed. The batch may change.

        attend = PreparedDecode(q, codec, table, exact, scale)
        out, lse = attend(q, table, exact)

    Args:
        q, codec, table, exact, scale, causal, sink_logits, backend: as of `decode_attention`.

    Raises:
        ValueError: what `decode_attention` would refuse.
    """

    def __init__(
        self,
        q: Array,
        codec: Codec,
        table: PageTable | None,
        exact: ExactTokens | None,
        scale: float,
        *,
        causal: bool = True,
        sink_logits: Array | None = None,
        backend: str = "auto",
    ) -> None:
        self._scale = check_decode(q, codec, table, exact, scale, causal, sink_logits)
        self._launch = launch("decode_attention", q, backend)
        self._codec, self._causal, self._sink_logits, self._backend = codec, causal, sink_logits, backend
        self._shape, self._dtype, self._kind = q.shape, q.dtype, type(q)
        self._torch_device = q.device if is_torch(q) else None
        self._new_tokens = q.shape[2] if causal else 0
        self._device = device_of(q)
        # What the last call was told, and need not be asked of the next.
        self._seen_shape: Any = None
        self._seen_table: PageTable | None = None
        self._seen_exact: set[Any] | None = None

    def __call__(self, q: Array, table: PageTable | None, exact: ExactTokens | None) -> tuple[Array, Array]:
        """Attends the newest queries of every row.

        Args:
            q: [batch, q_heads, n, head_dim], but for the batch like the example.
            table, exact: the row's tokens, or None.

        Returns:
            As `decode_attention`.

        Raises:
            ValueError: arguments that do not fit the example or each other.
        """
        if traced():
            options: dict[str, Any] = {"sink_logits": self._sink_logits, "backend": self._backend}
            return decode_attention(q, self._codec, table, exact, self._scale, causal=self._causal, **options)
        op, shape = "decode_attention", q.shape
        like = shape == self._seen_shape or shape[1:] == self._shape[1:]
        if not like or q.dtype != self._dtype or type(q) is not self._kind:
            raise fail(op, f"q {self._dtype} [batch, {str(list(self._shape[1:]))[1:]} as prepared", describe(q))
        if self._torch_device is not None and q.device != self._torch_device:
            raise fail(op, f"q on {self._torch_device} as prepared", q.device)
        seen = None if exact is None else exact.checked
        if shape != self._seen_shape or table is not self._seen_table or seen is not self._seen_exact or seen is None:
            self._check(q, table, exact)
            self._seen_shape, self._seen_table, self._seen_exact = shape, table, seen
        if exact is not None and exact.max_length < self._new_tokens:
            raise fail(op, f"at least {self._new_tokens} exact tokens, the causal queries' own", exact.max_length)
        return self._launch(q, self._codec, table, exact, self._scale, self._causal, self._sink_logits)

    def _check(self, q: Array, table: PageTable | None, exact: ExactTokens | None) -> None:
        """Raises ValueError for tables and exact tokens that do not fit; asks little of those that an op has seen."""
        op, batch, codec = "decode_attention", q.shape[0], self._codec
        if table is not None and (batch, self._device) not in table.checked:
            check_table(op, table, batch, q)
        if exact is None:
            if self._new_tokens > 1:
                raise fail(op, "exact tokens for more than one causal query", None)
        elif (batch, codec.kv_heads, codec.head_dim, self._device) not in exact.checked:
            check_exact(op, exact, codec, q)
