"""The operations on a packed cache. Each validates its arguments, chooses a backend and launches it."""

from .compact import compact
from .decode_attention import decode_attention
from .decode_pages import decode_pages
from .dispatch import report
from .encode import encode
from .merge import merge
from .prefill_attention import prefill_attention
from .qk_scores import qk_scores
from .sparse import Scores, Threshold, page_scores, sparse_attention, sparse_scores, sparse_threshold
from .table import ExactTokens, PageTable
from .threads import get_num_threads, set_num_threads
from .value_sum import value_sum

__all__ = [
    "ExactTokens",
    "PageTable",
    "Scores",
    "Threshold",
    "compact",
    "decode_attention",
    "decode_pages",
    "encode",
    "get_num_threads",
    "merge",
    "page_scores",
    "prefill_attention",
    "qk_scores",
    "report",
    "set_num_threads",
    "sparse_attention",
    "sparse_scores",
    "sparse_threshold",
    "value_sum",
]
