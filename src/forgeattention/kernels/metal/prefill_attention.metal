// prefill_attention: many queries over packed tokens, all of them attended.
//
// Grid: blocks of 32 rows x (batch * kv_heads) threadgroups of 128 threads. A row is a query of one of the KV head's
// query heads. Each simdgroup has 8 rows; keys, then values, of a page are decoded once for all 32 rows into
// threadgroup memory, as int8 levels, and multiplied as 8 x 8 matrices. Scales of tokens are applied to the scores
// and the weights, so that levels stay exact.
//
// Limited by arithmetic: per page and block 4,096 D multiply-adds against 128 D codes of 3 instructions (decoding is
// a tenth) and 50 D bytes at 3 bits. An M4 (10 cores, 128 lanes each, about 1.5 GHz) has 1.9e12 multiply-adds a
// second, so 2,048 queries of 32 heads over 32K packed tokens of head_dim 128 take 0.29 s or more; an M3 Ultra (80
// cores) an eighth. Sums take D / 4 registers a lane: those of head_dim 512 will not all stay in them.

#include "page.metal"

namespace forge {

enum { BLOCK = 32 };

// Shape of the decoded tile: TOKENS of a page at a time, key rows and value columns padded against bank conflicts.
template <class P>
struct Tile {
  enum {
    TOKENS = P::D > 256 ? 32 : 64,
    PARTS = PAGE / TOKENS,
    BLOCKS = TOKENS / 8,
    K_STRIDE = P::D + 4,   // bytes from token to token
    V_STRIDE = TOKENS + 4  // bytes from channel to channel
  };
};

// 32-bit words of threadgroup memory for the levels of one side.
constexpr int prefill_words(int dim) {
  return dim > 256 ? larger(32 * (dim + 4), dim * 36) / 4 : larger(64 * (dim + 4), dim * 68) / 4;
}

// Row and first column of the two elements that a lane holds of an 8 x 8 matrix (as MLX's steel/gemm/mma.h has it).
inline int fragment_row(uint lane) { return int(lane / 4 & 4) + int(lane / 2 % 4); }
inline int fragment_column(uint lane) { return int(lane / 4 & 2) * 2 + int(lane % 2) * 2; }

inline void set_elements(thread simdgroup_matrix<float, 8, 8>& m, float x, float y) {
  m.thread_elements()[0] = x;
  m.thread_elements()[1] = y;
}

inline uint four_levels(thread const float (&x)[8], int first) {
  return as_type<uint>(char4(char(x[first]), char(x[first + 1]), char(x[first + 2]), char(x[first + 3])));
}

// Levels of part `part` of a page's keys to tile[token][channel]; tokens of the part in their order on the page.
template <class P>
inline void decode_keys(const device uchar* record, int part, float levels, threadgroup uint* tile, uint simdgroup,
                        uint lane) {
  const int count = P::UNITS / Tile<P>::PARTS;
  for (int unit = part * count + int(simdgroup); unit < (part + 1) * count; unit += 4) {
    uint nibbles[4];
    load_nibbles<P::D, P::K_BITS, P::K_CODE, 1>(record, lane, unit, nibbles);
    FORGE_UNROLL
    for (int n = 0; n < 4; ++n) {
      float x[8];
      look_up(nibbles[n], levels, x);
      const int token = k_token(P::D, int(lane), unit, n), channel = k_channel(P::D, int(lane), unit, n, 0);
      const int local = token / 16 * (Tile<P>::TOKENS / 4) + token % 16 - part * (Tile<P>::TOKENS / 4);
      threadgroup uint* to = tile + (local * Tile<P>::K_STRIDE + channel) / 4;
      to[0] = four_levels(x, 0);
      to[1] = four_levels(x, 4);
    }
  }
}

// Levels of part `part` of a page's values to tile[channel][token].
template <class P>
inline void decode_values(const device uchar* record, int part, float levels, threadgroup uint* tile, uint simdgroup,
                          uint lane) {
  const int words = 4 / Tile<P>::PARTS;
  for (int unit = int(simdgroup); unit < P::UNITS; unit += 4) {
    uint nibbles[4];
    load_nibbles<P::D, P::V_BITS, P::V_CODE, 1>(record + P::V_CODES, lane, unit, nibbles);
    FORGE_UNROLL
    for (int k = 0; k < words; ++k) {
      float x[8];
      look_up(nibbles[part * words + k], levels, x);
      const int local = int(lane & 3) * (Tile<P>::TOKENS / 4) + 4 * k;
      tile[(v_channel(int(lane), unit, 0) * Tile<P>::V_STRIDE + local) / 4] = four_levels(x, 0);
      tile[(v_channel(int(lane), unit, 4) * Tile<P>::V_STRIDE + local) / 4] = four_levels(x, 4);
    }
  }
}

// q: [batch, q_heads, n, D] f32, rotated, times softmax scale and log2 e; bias: [batch, q_heads, n] f32, added to every
// score; the pages as in qk_scores; k_levels, v_levels: [16] f32, the int8 levels; units: [2] f32, what level 1 of keys
// and of values is worth. o: [batch, q_heads, n, D] f32, stored coordinates; lse: [batch, q_heads, n] f32, natural log.
template <class P, class Bias, class PageTable, class Lengths>
inline void prefill_attention(const device float* q, Bias bias, const device uchar* base, PageTable page_table,
                              Lengths lengths, int max_pages, const device float* k_levels,
                              const device float* v_levels, float k_unit, float v_unit, int kv_heads, int rows,
                              device float* o, device float* lse, threadgroup uint* tile, threadgroup float* scales,
                              uint3 group, uint simdgroup, uint lane) {
  typedef simdgroup_matrix<float, 8, 8> Matrix;
  const int pair = int(group.y), head = pair % kv_heads, me = int(simdgroup * 32 + lane);
  const int length = lengths[pair / kv_heads], page_count = (length + PAGE - 1) / PAGE;
  const PageTable pages = page_table + long(pair / kv_heads) * max_pages;
  const int row = int(group.x) * BLOCK + int(simdgroup) * 8 + fragment_row(lane), column = fragment_column(lane);
  const long query = long(pair) * rows + min(row, rows - 1);
  const float offset = bias[query];
  threadgroup const char* levels = (threadgroup const char*)tile;
  threadgroup float* k_scales = scales;
  threadgroup float* v_scales = scales + PAGE;
  threadgroup float* means = scales + 2 * PAGE;

  Matrix sum[P::D / 8];
  FORGE_UNROLL
  for (int c = 0; c < P::D / 8; ++c) sum[c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  float top = -INFINITY, total = 0.0f;
  for (int page = 0; page < page_count; ++page) {
    const device uchar* record = base + (pages[page] + long(head) * P::BYTES);
    const uint header = page_header(record + P::MEAN, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (me < PAGE) {
      k_scales[me] = k_unit * token_scale<P::SCALES>(record + P::K_SCALES, me, k_base(header));
    } else {
      const bool valid = page * PAGE + me - PAGE < length;
      const float scale = token_scale<P::SCALES>(record + P::V_SCALES, me - PAGE, v_base(header));
      v_scales[me - PAGE] = valid ? v_unit * scale : 0.0f;
    }
    for (int c = me; c < P::D; c += 128) means[c] = mean_scale(header) * float(char(record[P::MEAN + c]));
    for (int part = 0; part < Tile<P>::PARTS; ++part) {
      if (part > 0) threadgroup_barrier(mem_flags::mem_threadgroup);
      decode_keys<P>(record, part, k_levels[lane & 15], tile, simdgroup, lane);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      Matrix s[Tile<P>::BLOCKS];
      FORGE_UNROLL
      for (int b = 0; b < Tile<P>::BLOCKS; ++b) s[b] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      float mean = 0.0f;
      for (int c = 0; c < P::D / 8; ++c) {
        const float2 x = *(const device float2*)(q + query * P::D + 8 * c + column);
        mean += x.x * means[8 * c + column] + x.y * means[8 * c + column + 1];
        Matrix a, k;
        set_elements(a, x.x, x.y);
        FORGE_UNROLL
        for (int b = 0; b < Tile<P>::BLOCKS; ++b) {
          threadgroup const char* from = levels + (8 * b + column) * Tile<P>::K_STRIDE + 8 * c + fragment_row(lane);
          set_elements(k, float(from[0]), float(from[Tile<P>::K_STRIDE]));
          simdgroup_multiply_accumulate(s[b], a, k, s[b]);
        }
      }
      // the four lanes of a row differ in bits 0 and 3
      mean += simd_shuffle_xor(mean, 1);
      mean += simd_shuffle_xor(mean, 8);
      float p[Tile<P>::BLOCKS][2], most = top;
      FORGE_UNROLL
      for (int b = 0; b < Tile<P>::BLOCKS; ++b) {
        FORGE_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int local = 8 * b + column + i, quarter = Tile<P>::TOKENS / 4;
          const int token = local / quarter * 16 + part * quarter + local % quarter;
          const float score = s[b].thread_elements()[i] * k_scales[token] + mean + offset;
          p[b][i] = page * PAGE + token < length ? score : -INFINITY;
          most = max(most, p[b][i]);
        }
      }
      most = max(most, simd_shuffle_xor(most, 1));
      most = max(most, simd_shuffle_xor(most, 8));
      const float zero = finite_or_zero(most), shrink = exp2(top - zero);
      top = most;
      total *= shrink;
      FORGE_UNROLL
      for (int c = 0; c < P::D / 8; ++c) {
        set_elements(sum[c], sum[c].thread_elements()[0] * shrink, sum[c].thread_elements()[1] * shrink);
      }
      FORGE_UNROLL
      for (int b = 0; b < Tile<P>::BLOCKS; ++b) {
        FORGE_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int local = 8 * b + column + i, quarter = Tile<P>::TOKENS / 4;
          const float weight = exp2(p[b][i] - zero);
          total += weight;
          p[b][i] = weight * v_scales[local / quarter * 16 + part * quarter + local % quarter];
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      decode_values<P>(record, part, v_levels[lane & 15], tile, simdgroup, lane);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      FORGE_UNROLL
      for (int b = 0; b < Tile<P>::BLOCKS; ++b) {
        Matrix a, v;
        set_elements(a, p[b][0], p[b][1]);
        FORGE_UNROLL
        for (int c = 0; c < P::D / 8; ++c) {
          threadgroup const char* from = levels + (8 * c + column) * Tile<P>::V_STRIDE + 8 * b + fragment_row(lane);
          set_elements(v, float(from[0]), float(from[Tile<P>::V_STRIDE]));
          simdgroup_multiply_accumulate(sum[c], a, v, sum[c]);
        }
      }
    }
  }
  total += simd_shuffle_xor(total, 1);
  total += simd_shuffle_xor(total, 8);
  if (row >= rows) return;
  const float share = total > 0.0f ? 1.0f / total : 0.0f;
  FORGE_UNROLL
  for (int c = 0; c < P::D / 8; ++c) {
    const float2 x = float2(sum[c].thread_elements()[0], sum[c].thread_elements()[1]);
    *(device float2*)(o + query * P::D + 8 * c + column) = x * share;
  }
  if (column == 0) lse[query] = total > 0.0f ? (top + log2(total)) * M_LN2_F : -INFINITY;
}

}  // namespace forge

//! body
threadgroup uint tile[forge::prefill_words(D)];
threadgroup float scales[2 * forge::PAGE + D];
forge::prefill_attention<forge::Page<D, K_BITS, K_CODE, V_BITS, V_CODE, SCALES>>(
    q, bias, base, page_table, lengths, page_table_shape[1], k_levels, v_levels, units[0], units[1], KV_HEADS,
    q_shape[1] / KV_HEADS * q_shape[2], o, lse, tile, scales, threadgroup_position_in_grid,
    simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
