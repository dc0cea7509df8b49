// qk_scores: queries against packed keys, one score per token.
//
// Grid: tiles x row blocks x (batch * kv_heads) threadgroups of 128 threads; a simdgroup takes one page.
//
// What limits it, for head_dim 128 at 3 bits: 50 bytes of keys and 4 bytes of scores per row a token, so 120 GB/s
// (M4) allow 1.8e9 tokens of one KV head a second with 4 rows; 128 codes of 7 instructions (decode_attention.metal)
// allow 1.9e9: both at once. On an M3 Ultra 12e9 by memory and 15e9 by instructions.

#include "page.metal"

namespace forge {

// q: [batch, q_heads, n, D] f32, rotated, times the softmax scale; bias: [batch, q_heads, n] f32, added to every score.
// base, page_table [batch, max_pages] i64, lengths [batch] i32: the pages; k_levels: [16] f32.
// scores: [batch, q_heads, n, max_length] f32, -inf from each row's length on.
// pages: [batch, q_heads, n, page_count, 2] f32, of each page the largest score m and the sum of exp(score - m), -inf
// and 0 for a page without tokens; written with STATISTICS only.
template <class P, int ROWS, bool STATISTICS, class Bias, class PageTable, class Lengths>
inline void qk_scores(const device float* q, Bias bias, const device uchar* base, PageTable page_table, Lengths lengths,
                      int max_pages, const device float* k_levels, int kv_heads, int all_rows, int max_length,
                      device float* scores, device float* pages, threadgroup float* scratch, uint3 group,
                      uint simdgroup, uint lane) {
  const int pair = int(group.z), row = pair / kv_heads, head = pair % kv_heads;
  const int first = int(group.y) * ROWS, rows = min(ROWS, all_rows - first);
  const int length = lengths[row], page = int(group.x) * TILE_PAGES + int(simdgroup);
  const long query = long(pair) * all_rows + first;
  const int me = int(simdgroup * 32 + lane);
  stage_queries<P::D, ROWS>(q + query * P::D, rows, scratch, me);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float s[2][ROWS];
  if (page * PAGE < length) {
    const device uchar* record = base + (page_table[long(row) * max_pages + page] + long(head) * P::BYTES);
    page_scores<P, ROWS>(record, scratch, k_levels[lane & 15], lane, s);
  }
  FORGE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int token = page * PAGE + owned_token(lane, h);
    FORGE_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      s[h][r] = r < rows && token < length ? s[h][r] + bias[query + r] : -INFINITY;
      if (r < rows && token < max_length) scores[(query + r) * max_length + token] = s[h][r];
    }
  }
  const int page_count = (max_length + PAGE - 1) / PAGE;
  if (!STATISTICS || page >= page_count) return;
  FORGE_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    const float m = simd_max(max(s[0][r], s[1][r])), top = finite_or_zero(m);
    const float sum = simd_sum(exp(s[0][r] - top) + exp(s[1][r] - top));
    if (lane == 0 && r < rows) {
      device float* out = pages + 2 * ((query + r) * page_count + page);
      out[0] = m;
      out[1] = sum;
    }
  }
}

}  // namespace forge

//! body
alignas(16) threadgroup float scratch[ROWS * D];
forge::qk_scores<forge::Page<D, K_BITS, K_CODE, V_BITS, V_CODE, SCALES>, ROWS, false>(
    q, bias, base, page_table, lengths, page_table_shape[1], k_levels, KV_HEADS, q_shape[1] / KV_HEADS * q_shape[2],
    max_length, scores, scores, scratch, threadgroup_position_in_grid, simdgroup_index_in_threadgroup,
    thread_index_in_simdgroup);
