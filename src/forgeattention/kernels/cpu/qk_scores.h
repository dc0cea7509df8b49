// Integer scores of prepared queries against the keys of a page.
#pragma once

#include "codes.h"

namespace fa {

// Shapes that depend on padded_dim. A nibble word of keys belongs to one token; SEGMENTS is how many tokens the four words
// of a unit may belong to, PERIOD after how many chunks the channels of a word repeat.
constexpr int key_class(int dim) { return dim == 64 ? 0 : dim == 96 ? 1 : 2; }
template <int CLASS>
struct KeyClass {
  static constexpr int CHUNK = CLASS == 1 ? 2 : 4;
  static constexpr int SEGMENTS = CLASS == 0 ? 2 : CLASS == 1 ? 4 : 1;
  static constexpr int PERIOD = CLASS == 1 ? 3 : 1;
  static constexpr int segment(int n) { return n * SEGMENTS / 4; }
};

// A prepared query: head, then int16 q [dim], then per period and variant eight Operands and SEGMENTS initial vectors.
struct QueryHead {
  float factor;  // base-2 score of one unit of integer product and unit k scale
  float offset;  // added to every score
  float step;    // base-2 score of one unit of the product with a mean row of step 1
  float pad;
};
template <class Isa, int CLASS>
struct QueryLayout {
  using L = Layout<Isa, KeyClass<CLASS>::CHUNK>;
  using U32 = typename Isa::U32;
  static constexpr size_t GROUP = 8 * sizeof(typename Isa::Operand) + KeyClass<CLASS>::SEGMENTS * sizeof(U32);
  static size_t operands(int dim) { return (sizeof(QueryHead) + 2 * dim + 63) / 64 * 64; }
  static size_t bytes(int dim) {
    return (operands(dim) + KeyClass<CLASS>::PERIOD * L::VARIANTS * GROUP + 63) / 64 * 64;
  }
};

template <class Isa, int CLASS>
void prepare_query(const int16_t* q, int dim, uint8_t* out) {
  using C = KeyClass<CLASS>;
  using Q = QueryLayout<Isa, CLASS>;
  using L = typename Q::L;
  uint8_t* at = out + Q::operands(dim);
  for (int period = 0; period < C::PERIOD; ++period)
    for (int variant = 0; variant < L::VARIANTS; ++variant) {
      uint32_t initial[C::SEGMENTS][Isa::WORDS] = {};
      for (int n = 0; n < 4; ++n)
        for (int parity = 0; parity < 2; ++parity) {
          uint32_t words[2][Isa::WORDS];
          for (int pos = 0; pos < Isa::WORDS; ++pos) {
            const int lane = L::lane(variant, pos), unit = period * C::CHUNK + pos % C::CHUNK;
            int16_t x[4];
            const int order[4] = {0, 2, 1, 3};
            for (int i = 0; i < 4; ++i) {
              x[i] = q[k_channel(dim, lane, unit, n, 2 * order[i] + parity)];
              initial[C::segment(n)][pos] -= uint32_t(Isa::KEY_BIAS * x[i]);
            }
            Isa::split(x, words[0][pos], words[1][pos]);
          }
          for (int i = 0; i < 2; ++i, at += sizeof(typename Isa::U32)) __builtin_memcpy(at, words[i], sizeof(words[i]));
        }
      __builtin_memcpy(at, initial, sizeof(initial));
      at += sizeof(initial);
    }
}

// raw: per row [segment][uc][lane][CHUNK] products summed over the channels of the word's lane.
template <class Isa, int CLASS, class Source, int ROWS>
void qk_page(const uint8_t* codes, const uint8_t* ahead, int dim, const int8_t* levels, const uint8_t* queries,
             size_t query_bytes, int32_t* raw, size_t raw_stride) {
  using C = KeyClass<CLASS>;
  using Q = QueryLayout<Isa, CLASS>;
  using L = typename Q::L;
  using U32 = typename Isa::U32;
  const int chunks = units(dim) / C::CHUNK;
  const typename Isa::Table table = key_table<Isa>(levels);
  const uint8_t* operands = queries + Q::operands(dim);
  for (int uc = 0; uc < chunks; ++uc)
    for (int lv = 0; lv < L::LANE_VECTORS; ++lv) {
      U32 b[8];
      Source::template keys<Isa, C::CHUNK>(codes, ahead, uc, lv, table, b);
      const uint8_t* group = operands + (uc % C::PERIOD * L::VARIANTS + lv % L::VARIANTS) * Q::GROUP;
      const auto* initial = reinterpret_cast<const U32*>(group + 8 * sizeof(typename Isa::Operand));
      typename Isa::Acc acc[ROWS];
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        const int segment = C::segment(n);
        if (n == 0 || segment != C::segment(n - 1))
          for (int r = 0; r < ROWS; ++r)
            acc[r] = Isa::start(*reinterpret_cast<const U32*>(reinterpret_cast<const uint8_t*>(initial + segment) + r * query_bytes));
#pragma GCC unroll 2
        for (int parity = 0; parity < 2; ++parity) {
          const typename Isa::Codes c = Isa::widen(b[2 * n + parity]);
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r)
            Isa::dot_key(acc[r], c, reinterpret_cast<const typename Isa::Operand*>(group + r * query_bytes)[2 * n + parity]);
        }
        if (n == 3 || segment != C::segment(n + 1))
          for (int r = 0; r < ROWS; ++r)
            put(raw + r * raw_stride + ((segment * chunks + uc) * L::LANE_VECTORS + lv) * Isa::WORDS, Isa::join(acc[r]));
      }
    }
}

// Sums raw over lanes and words of a token: out [64] in token order.
template <int DIM>
void gather_scores(const int32_t* raw, int32_t* out) {
  using C = KeyClass<key_class(DIM)>;
  constexpr int CHUNKS = DIM / 16 / C::CHUNK;
  constexpr bool ONCE = DIM == 64 || DIM == 128;  // one word a token and lane
  if (!ONCE)
    for (int i = 0; i < PAGE; ++i) out[i] = 0;
  for (int segment = 0; segment < C::SEGMENTS; ++segment)
    for (int uc = 0; uc < CHUNKS; ++uc)
      for (int g = 0; g < 8; ++g) {
        const int32_t* p = raw + ((segment * CHUNKS + uc) * LANES + 4 * g) * C::CHUNK;
        int32_t sum[C::CHUNK];
        for (int i = 0; i < C::CHUNK; ++i) {
          const uint32_t s = uint32_t(p[i]) + uint32_t(p[C::CHUNK + i]) + uint32_t(p[2 * C::CHUNK + i]) + uint32_t(p[3 * C::CHUNK + i]);
          sum[i] = int32_t(s);
        }
        for (int i = 0; i < C::CHUNK; ++i) {
          const int token = k_token(DIM, 4 * g, uc * C::CHUNK + i, segment * 4 / C::SEGMENTS);
          out[token] = ONCE ? sum[i] : int32_t(uint32_t(out[token]) + uint32_t(sum[i]));
        }
      }
}

}  // namespace fa
