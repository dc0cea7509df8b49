// sparse_scores: the first phase of sparse attention: all scores, and of each page the largest and the sum of
// exponentials. Grid and limits as in qk_scores; the statistics add 8 bytes per row and page.

#include "qk_scores.metal"

//! body
alignas(16) threadgroup float scratch[ROWS * D];
forge::qk_scores<forge::Page<D, K_BITS, K_CODE, V_BITS, V_CODE, SCALES>, ROWS, true>(
    q, bias, base, page_table, lengths, page_table_shape[1], k_levels, KV_HEADS, q_shape[1] / KV_HEADS * q_shape[2],
    max_length, scores, pages, scratch, threadgroup_position_in_grid, simdgroup_index_in_threadgroup,
    thread_index_in_simdgroup);
