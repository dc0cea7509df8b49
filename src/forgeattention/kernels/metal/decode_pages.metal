// decode_pages: stored keys and values, for inspection and for ops that want them in memory.
//
// Grid: tiles x 1 x (batch * kv_heads) threadgroups of 128 threads; a simdgroup takes one page.
//
// Limited by what it writes, for head_dim 128 at 3.125 bits in half precision: 100 bytes read and 512 written per token
// and KV head, so 120 GB/s (M4) allow 0.2e9 of them a second, an M3 Ultra 1.3e9; 256 codes of about 6 instructions
// (extract, lookup, scale, address, store) would allow 1.2e9 and 10e9.

#include "page.metal"

namespace forge {

// The pages as in qk_scores; k_levels, v_levels: [16] f32.
// k, v: [batch, kv_heads, max_length, D] of T, stored coordinates; zero from each row's length on.
template <class P, class T, class PageTable, class Lengths>
inline void decode_pages(const device uchar* base, PageTable page_table, Lengths lengths, int max_pages,
                         const device float* k_levels, const device float* v_levels, int kv_heads, int max_length,
                         device T* k, device T* v, uint3 group, uint simdgroup, uint lane) {
  const int pair = int(group.z), row = pair / kv_heads, head = pair % kv_heads;
  const int length = lengths[row], page = int(group.x) * TILE_PAGES + int(simdgroup), first = page * PAGE;
  const long at = (long(pair) * max_length + first) * P::D;
  const int wanted = min(int(PAGE), max_length - first);
  if (first >= length) {
    for (int i = int(lane); i < wanted * P::D; i += 32) k[at + i] = T(0.0f), v[at + i] = T(0.0f);
    return;
  }
  const device uchar* record = base + (page_table[long(row) * max_pages + page] + long(head) * P::BYTES);
  const device uchar* mean_row = record + P::MEAN;
  const uint header = page_header(mean_row, lane);
  const int valid = min(int(PAGE), length - first);
  for (int half_page = 0; half_page < 2; ++half_page) {
    uint nibbles[4 * P::STEPS];
    load_nibbles<P::D, P::K_BITS, P::K_CODE, P::STEPS>(record, lane, half_page * P::STEPS, nibbles);
    for (int i = 0; i < 4 * P::STEPS; ++i) {
      const int unit = half_page * P::STEPS + i / 4;
      const int token = k_token(P::D, int(lane), unit, i % 4), channel = k_channel(P::D, int(lane), unit, i % 4, 0);
      float x[8];
      look_up(nibbles[i], k_levels[lane & 15], x);
      if (token >= wanted) continue;
      const float scale = token_scale<P::SCALES>(record + P::K_SCALES, token, k_base(header));
      vec<T, 4> y[2];
      for (int e = 0; e < 8; ++e) {
        const float value = x[e] * scale + float(char(mean_row[channel + e])) * mean_scale(header);
        y[e / 4][e % 4] = T(token < valid ? value : 0.0f);
      }
      device vec<T, 4>* to = (device vec<T, 4>*)(k + at + token * P::D + channel);
      to[0] = y[0], to[1] = y[1];
    }
  }
  for (int unit = 0; unit < P::UNITS; unit += 2) {
    uint nibbles[8];
    load_nibbles<P::D, P::V_BITS, P::V_CODE, 2>(record + P::V_CODES, lane, unit, nibbles);
    for (int i = 0; i < 8; ++i) {
      float x[8];
      look_up(nibbles[i], v_levels[lane & 15], x);
      for (int e = 0; e < 8; ++e) {
        const int token = v_token(int(lane), i % 4, e), channel = v_channel(int(lane), unit + i / 4, e);
        if (token >= wanted) continue;
        const float scale = token < valid ? token_scale<P::SCALES>(record + P::V_SCALES, token, v_base(header)) : 0.0f;
        v[at + token * P::D + channel] = T(x[e] * scale);
      }
    }
  }
}

}  // namespace forge

//! body
forge::decode_pages<forge::Page<D, K_BITS, K_CODE, V_BITS, V_CODE, SCALES>, T>(
    base, page_table, lengths, page_table_shape[1], k_levels, v_levels, KV_HEADS, max_length, k, v,
    threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
