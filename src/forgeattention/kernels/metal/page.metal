// What the kernels share: one simdgroup reads one page record (docs/format.md).
//
// Lane l = 4 g + t. Keys: the four lanes of a g hold the same 8 tokens, each a quarter of the channels. Values: a lane
// holds 16 neighbouring tokens (given by t) of every eighth channel. Level indices become levels by simd_shuffle: lane
// i holds level i mod 16 of the codebook, so a lookup is one instruction without divergence or memory. Loops over
// thread-private arrays are unrolled by request: an array that is indexed at run time would leave the registers.

#include "../shared/format.h"

namespace forge {

// A tile is four pages, one for each simdgroup of a threadgroup of 128 threads.
enum { TILE_PAGES = 4, TILE = TILE_PAGES * PAGE };

// A page format as a type. D is padded_dim.
template <int D_, int K_BITS_, int K_CODE_, int V_BITS_, int V_CODE_, int SCALES_>
struct Page {
  enum {
    D = D_,
    K_BITS = K_BITS_,
    K_CODE = K_CODE_,
    V_BITS = V_BITS_,
    V_CODE = V_CODE_,
    SCALES = SCALES_,
    STEPS = D / 32,  // nibble words of one token in one lane (keys)
    UNITS = D / 16,
    K_SCALES = k_scale_offset(D, K_BITS),
    MEAN = mean_offset(D, K_BITS, SCALES),
    V_CODES = v_offset(D, K_BITS, SCALES),
    V_SCALES = v_scale_offset(D, K_BITS, V_BITS, SCALES),
    BYTES = record_bytes(D, K_BITS, V_BITS, SCALES)
  };
};

// Level indices of COUNT units of a lane from unit `first` on, four nibble words a unit.
template <int D, int BITS, int CODE, int COUNT>
inline void load_nibbles(const device uchar* part, uint lane, int first, thread uint (&nibbles)[4 * COUNT]) {
  const device uint* codes = (const device uint*)part;
  uint w[COUNT][BITS];
  FORGE_UNROLL
  for (int word = 0; word < BITS; ++word) {
    if (COUNT % 4 == 0) {
      FORGE_UNROLL
      for (int u = 0; u + 3 < COUNT; u += 4) {
        const uint4 x = *(const device uint4*)(codes + word_index(D, BITS, lane, first + u, word));
        w[u][word] = x.x, w[u + 1][word] = x.y, w[u + 2][word] = x.z, w[u + 3][word] = x.w;
      }
    } else if (COUNT % 2 == 0) {
      FORGE_UNROLL
      for (int u = 0; u + 1 < COUNT; u += 2) {
        const uint2 x = *(const device uint2*)(codes + word_index(D, BITS, lane, first + u, word));
        w[u][word] = x.x, w[u + 1][word] = x.y;
      }
    } else {
      FORGE_UNROLL
      for (int u = 0; u < COUNT; ++u) w[u][word] = codes[word_index(D, BITS, lane, first + u, word)];
    }
  }
  FORGE_UNROLL
  for (int u = 0; u < COUNT; ++u) {
    uint n[4];
    unit_nibbles<BITS, CODE>(w[u], n);
    FORGE_UNROLL
    for (int k = 0; k < 4; ++k) nibbles[4 * u + k] = n[k];
  }
}

// The eight levels of a nibble word; `levels` is the lane's own entry of the codebook.
inline void look_up(uint nibbles, float levels, thread float (&x)[8]) {
  FORGE_UNROLL
  for (int e = 0; e < 8; ++e) x[e] = simd_shuffle(levels, ushort(extract_bits(nibbles, 4 * e, 4)));
}

// The 32 header bits in the mean row: fp16 mean_scale, int8 k_base, int8 v_base.
inline uint page_header(const device uchar* mean, uint lane) { return simd_or(uint(mean[lane] & 1) << lane); }
inline float mean_scale(uint header) { return float(as_type<half>(ushort(header & 0xffff))); }
inline int k_base(uint header) { return int(char(header >> 16 & 0xff)); }
inline int v_base(uint header) { return int(char(header >> 24)); }

template <int SCALES>
inline float token_scale(const device uchar* scales, int token, int base) {
  if (SCALES == FP16) return float(((const device half*)scales)[token]);
  const int b = scales[token];
  return b == 0 ? 0.0f : exp2(float(base) + float(b - 1) / float(LOG8_STEPS));
}

// Token (of 64) whose score lane 4 g + t owns after page_scores, h = 0, 1.
inline int owned_token(uint lane, int h) {
  return int(lane >> 3) * 16 + 2 * (int(lane & 3) + 4 * h) + int(lane >> 2 & 1);
}

// Position of a channel in a staged query: the order in which page_scores reads, such that the four lanes of a g read
// neighbouring words.
inline int staged(int dim, int channel) {
  const int t = channel / (dim / 4), c = channel % (dim / 4);
  return (c / 8 * 4 + t) * 8 + c % 8;
}

// Stages the queries of a block for page_scores; rows past `rows` become zero. A barrier must follow.
// q: [rows, D]; staged_q: [ROWS, D].
template <int D, int ROWS>
inline void stage_queries(const device float* q, int rows, threadgroup float* staged_q, int thread_index) {
  for (int i = thread_index; i < ROWS * D; i += 128)
    staged_q[i / D * D + staged(D, i % D)] = i < rows * D ? q[i] : 0.0f;
}

// Scores of the 64 tokens of a page for ROWS queries.
// q: [ROWS, D] float, channels in `staged` order, everything that multiplies a score folded in.
// s: [2, ROWS], scores of tokens owned_token(lane, h). They are garbage, but no trap, past the last token.
template <class P, int ROWS>
inline void page_scores(const device uchar* record, threadgroup const float* q, float levels, uint lane,
                        thread float (&s)[2][ROWS]) {
  const uint t = lane & 3;
  const device uchar* mean_row = record + P::MEAN;
  const uint header = page_header(mean_row, lane);
  float mean[ROWS];
  FORGE_UNROLL
  for (int r = 0; r < ROWS; ++r) mean[r] = 0.0f;
  if (mean_scale(header) != 0.0f) {
    for (int k = 0; k < P::STEPS; ++k) {
      const float m = float(char(mean_row[int(lane / 8) * (P::D / 4) + 8 * k + int(lane & 7)]));
      FORGE_UNROLL
      for (int r = 0; r < ROWS; ++r) mean[r] += m * q[r * P::D + 32 * k + int(lane)];
    }
    FORGE_UNROLL
    for (int r = 0; r < ROWS; ++r) mean[r] = mean_scale(header) * simd_sum(mean[r]);
  }
  FORGE_UNROLL
  for (int h = 0; h < 2; ++h) {
    uint nibbles[4 * P::STEPS];
    load_nibbles<P::D, P::K_BITS, P::K_CODE, P::STEPS>(record, lane, h * P::STEPS, nibbles);
    float sum[4][ROWS];
    FORGE_UNROLL
    for (int j = 0; j < 4; ++j) {
      FORGE_UNROLL
      for (int r = 0; r < ROWS; ++r) sum[j][r] = 0.0f;
    }
    FORGE_UNROLL
    for (int step = 0; step < P::STEPS; ++step) {
      float qs[ROWS][8];
      FORGE_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        threadgroup const float4* from = (threadgroup const float4*)(q + r * P::D + (step * 4 + int(t)) * 8);
        const float4 low = from[0], high = from[1];
        FORGE_UNROLL
        for (int e = 0; e < 4; ++e) qs[r][e] = low[e], qs[r][e + 4] = high[e];
      }
      FORGE_UNROLL
      for (int j = 0; j < 4; ++j) {
        float x[8];
        look_up(nibbles[j * P::STEPS + step], levels, x);
        FORGE_UNROLL
        for (int r = 0; r < ROWS; ++r) {
          FORGE_UNROLL
          for (int e = 0; e < 8; ++e) sum[j][r] = fma(x[e], qs[r][e], sum[j][r]);
        }
      }
    }
    // Lane t keeps token t of the four: two exchanges that halve what is left, instead of a full reduction of each.
    const float scale = token_scale<P::SCALES>(record + P::K_SCALES, owned_token(lane, h), k_base(header));
    FORGE_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const bool upper = t & 2, odd = t & 1;
      float a = upper ? sum[2][r] : sum[0][r], b = upper ? sum[3][r] : sum[1][r];
      a += simd_shuffle_xor(upper ? sum[0][r] : sum[2][r], 2);
      b += simd_shuffle_xor(upper ? sum[1][r] : sum[3][r], 2);
      const float own = (odd ? b : a) + simd_shuffle_xor(odd ? a : b, 1);
      s[h][r] = own * scale + mean[r];
    }
  }
}

// Adds a page's weighted values to a lane's sums.
// p: [ROWS, stride] float, from the page's first token on: weight times the token's scale, 0 for what is not attended.
// sum: [2 COUNT, ROWS]; sum[2 u + c] is channel v_channel(lane, first + u, 4 c), over the lane's 16 tokens.
// SKIP leaves out what has no weight before it is read (a page) or looked up (the 16 tokens of one n).
template <class P, int COUNT, int ROWS, bool SKIP>
inline void page_values(const device uchar* record, int first, threadgroup const float* p, int stride, float levels,
                        uint lane, thread float (&sum)[2 * COUNT][ROWS]) {
  bool used[4] = {true, true, true, true};
  if (SKIP) {
    bool any_used = false;
    FORGE_UNROLL
    for (int n = 0; n < 4; ++n) {
      bool mine = false;
      FORGE_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        const float4 weight = *(threadgroup const float4*)(p + r * stride + int(lane & 3) * 16 + 4 * n);
        mine |= any(weight != float4(0.0f));
      }
      used[n] = simd_any(mine);
      any_used |= used[n];
    }
    if (!any_used) return;
  }
  uint nibbles[4 * COUNT];
  load_nibbles<P::D, P::V_BITS, P::V_CODE, COUNT>(record + P::V_CODES, lane, first, nibbles);
  FORGE_UNROLL
  for (int n = 0; n < 4; ++n) {
    if (!used[n]) continue;
    float4 weight[ROWS];
    FORGE_UNROLL
    for (int r = 0; r < ROWS; ++r)
      weight[r] = *(threadgroup const float4*)(p + r * stride + int(lane & 3) * 16 + 4 * n);
    FORGE_UNROLL
    for (int u = 0; u < COUNT; ++u) {
      float x[8];
      look_up(nibbles[4 * u + n], levels, x);
      FORGE_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        FORGE_UNROLL
        for (int e = 0; e < 4; ++e) {
          sum[2 * u][r] = fma(x[e], weight[r][e], sum[2 * u][r]);
          sum[2 * u + 1][r] = fma(x[e + 4], weight[r][e], sum[2 * u + 1][r]);
        }
      }
    }
  }
}

constexpr int value_slices(int dim) { return dim >= 256 ? 4 : dim == 128 ? 2 : 1; }

// How the four simdgroups of a threadgroup share the values of a tile: SLICES slices of channels, and 4 / SLICES
// simdgroups to a slice, each with its own pages. Few sums to a lane, so that they stay in registers.
template <class P>
struct Share {
  enum {
    SLICES = value_slices(P::D),
    COUNT = P::UNITS / SLICES,    // units of a slice
    GROUPS = TILE_PAGES / SLICES  // simdgroups to a slice
  };
};

// Adds the values of a tile's pages that fall to this simdgroup. p: [ROWS, TILE].
template <class P, int ROWS, bool SKIP, class PageTable>
inline void tile_values(const device uchar* base, PageTable pages, int head, int first_page, int page_count,
                        threadgroup const float* p, float levels, uint simdgroup, uint lane,
                        thread float (&sum)[2 * Share<P>::COUNT][ROWS]) {
  const int slice = int(simdgroup) % Share<P>::SLICES, group = int(simdgroup) / Share<P>::SLICES;
  for (int k = group; k < TILE_PAGES; k += Share<P>::GROUPS) {
    if (first_page + k >= page_count) break;
    const device uchar* record = base + (pages[first_page + k] + long(head) * P::BYTES);
    page_values<P, Share<P>::COUNT, ROWS, SKIP>(record, slice * Share<P>::COUNT, p + k * PAGE, TILE, levels, lane, sum);
  }
}

// Joins the sums of all lanes and simdgroups. o: [GROUPS, ROWS, D] float of threadgroup memory; afterwards its first
// [ROWS, D] hold the result, for every thread to read.
template <class P, int ROWS>
inline void join_values(thread float (&sum)[2 * Share<P>::COUNT][ROWS], threadgroup float* o, uint simdgroup,
                        uint lane) {
  const int slice = int(simdgroup) % Share<P>::SLICES, group = int(simdgroup) / Share<P>::SLICES;
  FORGE_UNROLL
  for (int i = 0; i < 2 * Share<P>::COUNT; ++i) {
    const int channel = v_channel(int(lane), slice * Share<P>::COUNT + i / 2, 4 * (i % 2));
    FORGE_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      float x = sum[i][r];
      x += simd_shuffle_xor(x, 1);
      x += simd_shuffle_xor(x, 2);
      if ((lane & 3) == 0) o[(group * ROWS + r) * P::D + channel] = x;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = int(simdgroup * 32 + lane); i < ROWS * P::D; i += 128) {
    float x = o[i];
    for (int k = 1; k < Share<P>::GROUPS; ++k) x += o[k * ROWS * P::D + i];
    o[i] = x;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

constexpr int larger(int a, int b) { return a > b ? a : b; }
// Floats that join_values needs.
constexpr int join_scratch(int dim, int rows) { return TILE_PAGES * rows * dim / value_slices(dim); }

// Splits of a sequence's tiles over threadgroups; a function of its own length alone.
inline int split_count(int tiles) { return min((tiles + 1) / 2, 32); }

inline float finite_or_zero(float m) { return m == -INFINITY ? 0.0f : m; }

}  // namespace forge
