// value_sum: weighted sums of packed values, split over tokens. The splits' sums are added outside.
//
// Grid: splits x row blocks x (batch * kv_heads) threadgroups of 128 threads. With SKIP, pages and groups of 16 tokens
// without weight are left out before they are read or looked up.
//
// What limits it, for head_dim 128 at 3 bits: 50 bytes of values and 4 bytes of weights per row a token, so 120 GB/s
// (M4) allow 1.8e9 tokens of one KV head a second with 4 rows, and 7 instructions a code (decode_attention.metal)
// 1.9e9.

#include "page.metal"

namespace forge {

// Floats of threadgroup memory: weights [ROWS, TILE], totals [4, ROWS]; joining reuses it.
constexpr int value_scratch(int dim, int rows) {
  return larger(rows * TILE + TILE_PAGES * rows, join_scratch(dim, rows));
}

// Given weights. p: [batch, q_heads, n, max_length] f32, read up to each row's length. A `row` counts queries of all
// heads.
template <class Pointer>
struct GivenWeights {
  Pointer p;
  int max_length;
  bool tile_used(long row, int tile) const { return true; }
  float weight(long row, int token) const { return p[row * max_length + token]; }
};
template <class Pointer>
inline GivenWeights<Pointer> given_weights(Pointer p, int max_length) {
  GivenWeights<Pointer> weights;
  weights.p = p;
  weights.max_length = max_length;
  return weights;
}

// source: where the weights come from; a tile that none of a block's rows use is left out. The pages as in qk_scores;
// v_levels: [16] f32. sums: [batch, kv_heads, splits, rows, D] f32, stored coordinates; mass: [batch, kv_heads, splits,
// rows] f32, sums of the weights.
template <class P, int ROWS, bool SKIP, class Source, class PageTable, class Lengths>
inline void value_sum(Source source, const device uchar* base, PageTable page_table, Lengths lengths, int max_pages,
                      const device float* v_levels, int kv_heads, int all_rows, device float* sums, device float* mass,
                      threadgroup float* scratch, uint3 group, uint3 groups, uint simdgroup, uint lane) {
  const int pair = int(group.z), row = pair / kv_heads, head = pair % kv_heads;
  const int first = int(group.y) * ROWS, rows = min(ROWS, all_rows - first);
  const int length = lengths[row], page_count = (length + PAGE - 1) / PAGE, tiles = (length + TILE - 1) / TILE;
  const int split = int(group.x), splits = split_count(tiles);
  const int begin = split < splits ? tiles * split / splits : 0;
  const int end = split < splits ? tiles * (split + 1) / splits : 0;
  const long query = long(pair) * all_rows + first;
  const PageTable pages = page_table + long(row) * max_pages;
  threadgroup float* weights = scratch;
  threadgroup float* totals = scratch + ROWS * TILE;
  float total[ROWS], sum[2 * Share<P>::COUNT][ROWS];
  FORGE_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    total[r] = 0.0f;
    FORGE_UNROLL
    for (int i = 0; i < 2 * Share<P>::COUNT; ++i) sum[i][r] = 0.0f;
  }
  for (int tile = begin; tile < end; ++tile) {
    bool tile_used = false;
    for (int r = 0; r < rows; ++r) tile_used = tile_used || source.tile_used(query + r, tile);
    if (!tile_used) continue;
    const int page = tile * TILE_PAGES + int(simdgroup);
    const bool present = page < page_count;
    const device uchar* record = base + (present ? pages[page] + long(head) * P::BYTES : 0);
    const int exponent = present ? v_base(page_header(record + P::MEAN, lane)) : 0;
    FORGE_UNROLL
    for (int k = 0; k < 2; ++k) {
      const int i = int(lane) + 32 * k, token = page * PAGE + i;
      const float scale = token < length ? token_scale<P::SCALES>(record + P::V_SCALES, i, exponent) : 0.0f;
      FORGE_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        const float w = r < rows && token < length ? source.weight(query + r, token) : 0.0f;
        total[r] += w;
        weights[r * TILE + int(simdgroup) * PAGE + i] = w * scale;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    tile_values<P, ROWS, SKIP>(base, pages, head, tile * TILE_PAGES, page_count, weights, v_levels[lane & 15],
                               simdgroup, lane, sum);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  FORGE_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    const float l = simd_sum(total[r]);
    if (lane == 0) totals[int(simdgroup) * ROWS + r] = l;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int me = int(simdgroup * 32 + lane);
  const long at = (long(pair) * groups.x + split) * all_rows + first;
  if (me < rows) {
    float l = 0.0f;
    FORGE_UNROLL
    for (int k = 0; k < TILE_PAGES; ++k) l += totals[k * ROWS + me];
    mass[at + me] = l;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  join_values<P, ROWS>(sum, scratch, simdgroup, lane);
  for (int i = me; i < rows * P::D; i += 128) sums[at * P::D + i] = scratch[i];
}

}  // namespace forge

//! body
alignas(16) threadgroup float scratch[forge::value_scratch(D, ROWS)];
forge::value_sum<forge::Page<D, K_BITS, K_CODE, V_BITS, V_CODE, SCALES>, ROWS, SKIP>(
    forge::given_weights(p, p_shape[3]), base, page_table, lengths, page_table_shape[1], v_levels, KV_HEADS,
    p_shape[1] / KV_HEADS * p_shape[2], sums, mass, scratch, threadgroup_position_in_grid, threadgroups_per_grid,
    simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
