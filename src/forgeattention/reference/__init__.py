"""Float64 NumPy oracle: one plain function per op, the meaning that every backend must reproduce."""

from .attention import decode_attention, merge, prefill_attention, qk_scores, value_sum
from .pages import compact, decode_page, decode_pages, encode, encode_page
from .triattention import triattention_score

__all__ = [
    "compact",
    "decode_attention",
    "decode_page",
    "decode_pages",
    "encode",
    "encode_page",
    "merge",
    "prefill_attention",
    "qk_scores",
    "triattention_score",
    "value_sum",
]
