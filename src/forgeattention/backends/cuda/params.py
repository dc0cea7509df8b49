"""The parameters of every CUDA kernel: the one place that says what a kernel is told.

Each row is (names, C type, what it is). `structs.Struct` makes of a table the text of `struct Params`, which is put
before the kernel's source when it is compiled, what fills it, and the entry point for MLX. Shapes are in elements.
"""

from __future__ import annotations

from .structs import Struct

PARTS = 8
"""Most parts that one launch of merge_parts joins."""

TRANSFORM = Struct(
    "TransformArgs",
    ("signs", "const float*", "[heads, DIM] for HADAMARD, A = H diag(s d): s d (encode) or s / d (queries, outputs)"),
    ("in_matrix", "const float*", "[heads, DIM, DIM] for MATRIX: A^T (encode) or A^-1 (queries)"),
    ("out_matrix", "const float*", "[heads, DIM, DIM] for MATRIX: (A^-1)^T"),
    ("mu", "const float*", "[heads, DIM], or null"),
    ("stride", "i64", "elements between heads of signs or matrices, 0 if all share one"),
    ("mu_stride", "i64", ""),
)

DECODE_ATTENTION = Struct(
    "Params",
    ("q", "const void*", "FORGE_TYPE [batch, q_heads, n, head_dim]"),
    ("base", "const u8*", "added to page_table; null if that holds addresses"),
    ("page_table", "const i64*", "[batch, max_pages] bytes"),
    ("lengths", "const int*", "[batch] packed tokens, or null"),
    ("exact_k exact_v", "const void*", "FORGE_EXACT_TYPE [batch, kv_heads, capacity, head_dim], 16-byte aligned rows"),
    ("exact_lengths", "const int*", "[batch], or null"),
    (
        "exact_blocks",
        "const int*",
        "[batch, exact_stride] if FORGE_EXACT_BLOCK; k_stride, v_stride: of blocks, heads, tokens",
    ),
    ("sink_logits", "const float*", "[q_heads], or null"),
    ("out", "void*", "FORGE_TYPE [batch, q_heads, n, head_dim]"),
    ("lse", "float*", "[batch, q_heads, n]"),
    (
        "part",
        "float*",
        "[batch, kv_heads, query_tiles, partials, QUERIES, DIM]: of each split, then of each task of exact tokens",
    ),
    ("part_ml", "float2*", "the same without DIM: (maximum in log2 units, sum)"),
    ("counter", "u32*", "[batch, kv_heads, query_tiles], zero before and after"),
    ("k_transform v_transform", TRANSFORM, ""),
    ("q_stride k_stride v_stride out_stride", "i64[3]", "elements: row, head, token"),
    ("max_pages exact_stride", "i64", ""),
    ("kv_heads group n queries query_tiles causal", "int", "queries = group * n"),
    ("num_splits min_pages partials", "int", "a row's head has at most num_splits splits, of min_pages or more"),
    ("max_length", "int", "tokens that no row exceeds, and most rows have"),
    ("scale_log2 k_unit v_unit", "float", ""),
)

MERGE = Struct(
    "Params",
    ("a", "const void*", "FORGE_TYPE [batch, heads, n, DIM]"),
    ("a_lse", "const float*", "[rows]"),
    ("b", "const float*", "[rows, DIM]"),
    ("b_lse", "const float*", "[rows]"),
    ("out", "void*", "FORGE_TYPE [rows, DIM]"),
    ("lse", "float*", "[rows]"),
    ("a_stride", "i64[3]", "elements: row of the batch, head, token"),
    ("rows heads n", "int", "rows = batch * heads * n"),
)

TURN_QUERIES = Struct(
    "Params",
    ("q", "const void*", "FORGE_TYPE [batch, q_heads, n, head_dim]"),
    ("out", "void*", "f16 [batch, q_heads, n, DIM], contiguous"),
    ("shift", "float*", "[batch, q_heads, n] q . mu"),
    ("transform", TRANSFORM, ""),
    ("q_stride", "i64[3]", "elements: row, head, token"),
    ("rows q_heads group n", "int", "rows = batch * q_heads * n"),
)

MERGE_PARTS = Struct(
    "Params",
    ("part", f"const void*[{PARTS}]", "f16 [batch, kv_heads, group n, DIM]"),
    ("part_lse", f"const float*[{PARTS}]", "[batch, kv_heads, group n], contiguous"),
    ("shift", "const float*", "[rows], times scale added to lse"),
    ("sum", "float*", "[rows, DIM] parts joined earlier and now, rotated; null if there are no others"),
    ("out", "float*", "[rows, HEAD_DIM], written with the last parts"),
    ("lse", "float*", "[rows], of parts joined so far"),
    ("transform", TRANSFORM, ""),
    ("stride", f"i64[{PARTS}][3]", "elements: row of the batch, KV head, query"),
    ("rows kv_heads queries", "int", "rows = batch * kv_heads * queries, queries = group * n"),
    ("parts first last", "int", "first, last: whether these parts are"),
    ("scale", "float", ""),
)

ENCODE = Struct(
    "Params",
    ("k v", "const void*", "FORGE_TYPE [pages, kv_heads, 64, head_dim] by their strides"),
    ("base", "u8*", "added to offsets; null if they are addresses"),
    ("offsets", "const i64*", "[pages] bytes; a page whose offset is negative is left out"),
    (
        "slots",
        "const int*",
        "[pages, 64] tokens in blocks, -1 - (block * exact_block + place) (page_tables.cu); or null",
    ),
    ("bad", "int*", "set to 1 where a value is not finite or a scale overflows; such a page is then undefined"),
    ("feedback", "const u32*", "[heads, feedback_stride] of shaped keys (key_search.cuh), or null"),
    ("k_transform v_transform", TRANSFORM, ""),
    ("k_stride v_stride", "i64[3]", "elements: page (with slots: block), head, token"),
    ("exact_block", "i64", "tokens of a block, with slots"),
    ("feedback_stride", "i64", "words between heads of feedback, 0 if all share one"),
    ("k_unit v_unit", "float", ""),
)

ENCODE_LAYERS = Struct(
    "LayersParams",
    ("layers", "const Params*", "[count] of encode"),
    ("filled", "const int*", "numbers of the pages that fill"),
    ("fills", "const int*", "how many there are"),
    ("count kv_heads", "int", ""),
    needs=(ENCODE,),
)

DECODE_PAGES = Struct(
    "Params",
    ("base", "const u8*", "added to page_table; null if that holds addresses"),
    ("page_table", "const i64*", "[batch, max_pages] bytes"),
    ("lengths", "const int*", "[batch] tokens"),
    ("k v", "void*", "FORGE_TYPE [batch, kv_heads, max_length, FORGE_WIDTH]"),
    ("k_transform v_transform", TRANSFORM, ""),
    ("max_pages", "i64", ""),
    ("kv_heads max_length", "int", ""),
    ("k_unit v_unit", "float", ""),
)

COMPACT = Struct(
    "Params",
    ("base", "const u8*", "added to offsets; null if they are addresses"),
    ("offsets", "const i64*", "[pages] bytes, multiples of 16"),
    ("out", "u8*", "[pages, 16 words]"),
    ("words", "i64", "of 16 bytes in a page"),
)

APPEND_TOKENS = Struct(
    "Params",
    ("k v", "const u8*", "[batch, heads, n, 4 words] bytes"),
    ("to_k to_v", "u8*", "[batch, heads, capacity, 4 words]"),
    ("lengths", "int*", "[batch] tokens, n more afterwards"),
    ("k_stride v_stride to_k_stride to_v_stride", "i64[3]", "bytes: row, head, token"),
    ("heads n words capacity", "int", ""),
)

APPEND_STEP = Struct(
    "Params",
    ("k v", "const u8*", "[batch, heads, 1, 4 words] bytes"),
    ("to_k to_v", "u8*", "[batch, heads, capacity, 4 words]"),
    ("exact packed", "int*", "[batch] tokens"),
    ("page_table", "const i64*", "[batch, max_pages] addresses"),
    ("encode_offsets", "i64*", "[batch] address of the page that is to be coded after this launch, or -1"),
    ("tickets", "int*", "[batch] zeros before and after"),
    ("k_stride v_stride", "i64[2]", "bytes: row, head"),
    ("to_k_stride to_v_stride", "i64[3]", "bytes: row, head, token"),
    ("heads words capacity sinks encode_at max_pages", "int", ""),
)

SCORES = Struct(
    "Params",
    (
        "q",
        "const void*",
        "FORGE_TYPE [batch, q_heads, n, head_dim]; of value_sum float weights [.., max_length], contiguous",
    ),
    ("base", "const u8*", "added to page_table; null if that holds addresses"),
    ("page_table", "const i64*", "[batch, max_pages] bytes"),
    ("lengths", "const int*", "[batch] tokens"),
    ("out", "float*", "qk_scores: [batch, q_heads, n, max_length]; value_sum: [splits, batch, q_heads, n, head_dim]"),
    ("transform", TRANSFORM, "of keys; of values"),
    ("q_stride", "i64[3]", "elements: row, head, token"),
    ("max_pages", "i64", ""),
    ("kv_heads group n queries query_tiles max_length", "int", "queries = group * n, in tiles of 8"),
    ("scale unit", "float", ""),
)

SPARSE_SCORES = Struct(
    "Params",
    ("q", "const void*", "FORGE_TYPE [batch, q_heads, n, head_dim]"),
    ("base", "const u8*", "added to page_table; null if that holds addresses"),
    ("page_table", "const i64*", "[batch, max_pages] bytes"),
    ("lengths", "const int*", "[batch] tokens"),
    ("scores", "float*", "[batch, q_heads, n, 64 pages], -inf from the row's length on"),
    ("stats", "float2*", "[batch, q_heads, n, pages]"),
    ("transform", TRANSFORM, ""),
    ("q_stride", "i64[3]", "elements: row, head, token"),
    ("max_pages", "i64", ""),
    ("kv_heads group n queries query_tiles pages", "int", "queries = group * n"),
    ("scale unit", "float", ""),
)

SPARSE_THRESHOLD = Struct(
    "Params",
    ("scores", "const float*", "[rows, 64 pages]"),
    ("stats", "const float2*", "[rows, pages]"),
    ("lengths", "const int*", "[batch]"),
    ("budgets", "const int*", "[q_heads], or null for `budget`"),
    ("exact_lse", "const float*", "[rows], or null"),
    ("threshold", "float*", "[rows]"),
    ("last kept", "int*", "[rows]"),
    ("dropped top", "float*", "[rows]; top is the largest score"),
    ("q_heads n pages budget", "int", ""),
    ("top_p", "float", "0 for a number of tokens"),
)

SPARSE_ATTENTION = Struct(
    "Params",
    ("scores", "const float*", "[batch, q_heads, n, 64 pages]"),
    ("stats", "const float2*", "[batch, q_heads, n, pages]"),
    ("threshold top", "const float*", "[batch, q_heads, n]"),
    ("last", "const int*", "[batch, q_heads, n]"),
    ("base", "const u8*", "added to page_table; null if that holds addresses"),
    ("page_table", "const i64*", "[batch, max_pages] bytes"),
    ("lengths", "const int*", "[batch] tokens"),
    ("other", "const void*", "FORGE_TYPE [batch, q_heads, n, head_dim], or null"),
    ("other_lse", "const float*", "[batch, q_heads, n]"),
    ("out", "void*", "FORGE_TYPE [batch, q_heads, n, head_dim]"),
    ("lse", "float*", "[batch, q_heads, n]"),
    ("part", "float*", "[batch, kv_heads, query_tiles, splits, QUERIES, LINE]"),
    ("counter", "u32*", "[batch, kv_heads, query_tiles], zero before and after"),
    ("transform", TRANSFORM, ""),
    ("max_pages", "i64", ""),
    ("kv_heads queries query_tiles pages", "int", ""),
    ("unit", "float", ""),
)

PAGE_SCORES = Struct(
    "Params",
    ("q", "const void*", "FORGE_TYPE [batch, q_heads, n, head_dim]"),
    ("base", "const u8*", "added to page_table; null if that holds addresses"),
    ("page_table", "const i64*", "[batch, max_pages] bytes"),
    ("lengths", "const int*", "[batch] tokens"),
    ("out", "float*", "[batch, q_heads, n, pages]"),
    ("transform", TRANSFORM, ""),
    ("q_stride", "i64[3]", "elements: row, head, token"),
    ("max_pages", "i64", ""),
    ("kv_heads group n queries query_tiles pages", "int", "queries = group * n"),
    ("scale", "float", ""),
)

PAGE_SELECT = Struct(
    "Params",
    ("means", "const float*", "[batch, kv_heads, queries, pages], -inf past a row's last page"),
    ("page_table", "const i64*", "[batch, max_pages] bytes"),
    ("lengths", "const int*", "[batch] tokens"),
    ("chosen", "i64*", "[batch, kv_heads, budget] bytes, of the head's own records"),
    ("tokens", "int*", "[batch, kv_heads] tokens of the chosen pages"),
    ("read", "u8*", "[batch, kv_heads, pages], 1 where chosen"),
    ("max_pages", "i64", ""),
    ("kv_heads queries pages budget record", "int", ""),
)

PAGE_TABLES = Struct(
    "Params",
    ("starts", "const int*", "[rows + 1] first new token of a row among the step's"),
    ("lengths", "const int*", "[rows] tokens with the new ones"),
    ("packed_table", "const int*", "[rows, packed_stride] blocks of pages_per_block pages; 0: none"),
    ("exact_table", "const int*", "[rows, exact_stride] blocks of exact_block tokens; 0: none"),
    ("page_table", "i64*", "[rows, max_pages] bytes of the packed pages"),
    ("packed", "int*", "[rows] packed tokens"),
    ("blocks", "int*", "[rows, max_blocks] exact blocks"),
    ("exact", "int*", "[rows] exact tokens: with the new ones in the first decode_rows rows, without in the others"),
    (
        "fill_offsets",
        "i64*",
        "[fills] bytes of a page that fills in this step, or -1: row r's from r + starts[r] / 64 on",
    ),
    ("filled fills", "int*", "numbers of the pages that fill, in any order; how many there are, 0 before"),
    ("fill_tokens", "int*", "[fills, 64] a page's tokens: number of a new one, or -1 - (block * exact_block + place)"),
    ("block_bytes page_bytes", "i64", ""),
    ("packed_stride exact_stride max_pages max_blocks", "i64", ""),
    ("decode_rows window pages_per_block exact_block sink_blocks", "int", ""),
    ("fill_exact", "int", "name new tokens of filled pages by their exact blocks too"),
)

PAGED_APPEND = Struct(
    "Params",
    ("k v", "const u8*", "[tokens, heads, 16 words] bytes, rows at multiples of 16"),
    ("cache", "u8*", "[blocks, exact_block, heads, 2 x 16 words]: a token's key and value of a head side by side"),
    ("slots", "const i64*", "[tokens] block * exact_block + place; below exact_block (block 0, or -1): not kept"),
    ("fill_offsets", "const i64*", "[fills]"),
    ("fill_tokens", "const int*", "[fills, 64]"),
    ("fill_k fill_v", "u8*", "[heads, 64 fills, 16 words]"),
    ("k_stride v_stride", "i64[2]", "bytes: token, head"),
    ("cache_stride", "i64[3]", "bytes: block, token, head"),
    ("fill_stride", "i64", "bytes of a head's pages"),
    ("tokens heads words exact_block", "int", "words of 16 bytes"),
)

STRUCTS = {
    "decode_attention": DECODE_ATTENTION,
    "merge": MERGE,
    "turn_queries": TURN_QUERIES,
    "merge_parts": MERGE_PARTS,
    "encode": ENCODE,
    "encode_layers": ENCODE_LAYERS,
    "decode_pages": DECODE_PAGES,
    "compact": COMPACT,
    "append_tokens": APPEND_TOKENS,
    "append_step": APPEND_STEP,
    "qk_scores": SCORES,
    "value_sum": SCORES,
    "sparse_scores": SPARSE_SCORES,
    "sparse_threshold": SPARSE_THRESHOLD,
    "sparse_attention": SPARSE_ATTENTION,
    "page_scores": PAGE_SCORES,
    "page_select": PAGE_SELECT,
    "page_tables": PAGE_TABLES,
    "paged_append": PAGED_APPEND,
}
"""By the kernel's file in kernels/cuda."""
