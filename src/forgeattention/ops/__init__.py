"""The operations on a packed cache. Each validates its arguments, chooses a backend and launches it."""

from .attention import decode_attention, merge, prefill_attention
from .pages import append_tokens, compact, decode_into, decode_pages, encode
from .prepared import PreparedDecode
from .registry import report
from .scores import qk_scores, value_sum
from .sparse import page_scores, page_select, sparse_attention, sparse_scores, sparse_threshold
from .steps import append_step, encode_rows
from .table import ExactTokens, PageTable, Scores, Threshold
from .threads import get_num_threads, set_num_threads

__all__ = [
    "ExactTokens",
    "PageTable",
    "PreparedDecode",
    "Scores",
    "Threshold",
    "append_step",
    "append_tokens",
    "compact",
    "decode_attention",
    "decode_into",
    "decode_pages",
    "encode",
    "encode_rows",
    "get_num_threads",
    "merge",
    "page_scores",
    "page_select",
    "prefill_attention",
    "qk_scores",
    "report",
    "set_num_threads",
    "sparse_attention",
    "sparse_scores",
    "sparse_threshold",
    "value_sum",
]
