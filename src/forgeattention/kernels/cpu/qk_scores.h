// Integer scores of prepared queries against the keys of a page.
#pragma once

#include "codes.h"

namespace forge {

// Shapes that depend on padded_dim. A nibble word of keys belongs to one token; SEGMENTS is how many tokens the four
// words of a unit may belong to, PERIOD after how many chunks the channels of a word repeat.
constexpr int key_class(int dim) { return dim == 64 ? 0 : dim == 96 ? 1 : 2; }
template <int CLASS>
struct KeyClass {
  static constexpr int CHUNK = CLASS == 1 ? 2 : 4;
  static constexpr int SEGMENTS = CLASS == 0 ? 2 : CLASS == 1 ? 4 : 1;
  static constexpr int PERIOD = CLASS == 1 ? 3 : 1;
  static constexpr int segment(int n) { return n * SEGMENTS / 4; }
};

// Prepared queries lie in groups of MAX_ROWS: their heads, each followed by float q [dim]; then per period and variant
// eight Operands and SEGMENTS initial vectors, each for all rows of the group side by side.
enum { MAX_ROWS = 4 };
struct QueryHead {
  float factor;  // base-2 score of one unit of integer product and unit k scale
  float offset;  // added to every score
  float scale;   // from q times key to base-2 score
  float pad;
};
inline size_t query_head_bytes(int dim) { return (sizeof(QueryHead) + sizeof(float) * dim + 63) / 64 * 64; }
template <class Isa, int CLASS>
struct QueryLayout {
  using C = KeyClass<CLASS>;
  using L = Layout<Isa, C::CHUNK>;
  using Operand = typename Isa::Operand;
  struct Part {
    Operand operands[8][MAX_ROWS];
    typename Isa::U32 initial[C::SEGMENTS][MAX_ROWS];
  };
  static size_t bytes(int dim) {
    return (MAX_ROWS * query_head_bytes(dim) + C::PERIOD * L::VARIANTS * sizeof(Part) + 63) / 64 * 64;
  }
  static Part* parts(void* group, int dim) {
    return reinterpret_cast<Part*>(static_cast<uint8_t*>(group) + MAX_ROWS * query_head_bytes(dim));
  }
};

template <class Isa, int CLASS>
void prepare_query(const int16_t* q, int dim, int row, void* group) {
  using C = KeyClass<CLASS>;
  using Q = QueryLayout<Isa, CLASS>;
  using L = typename Q::L;
  typename Q::Part* part = Q::parts(group, dim);
  for (int period = 0; period < C::PERIOD; ++period)
    for (int variant = 0; variant < L::VARIANTS; ++variant, ++part) {
      uint32_t initial[C::SEGMENTS][Isa::WORDS] = {};
      for (int n = 0; n < 4; ++n)
        for (int parity = 0; parity < 2; ++parity) {
          uint32_t first[Isa::WORDS], second[Isa::WORDS];
          for (int pos = 0; pos < Isa::WORDS; ++pos) {
            const int lane = L::lane(variant, pos), unit = period * C::CHUNK + pos % C::CHUNK;
            int16_t x[4];
            const int order[4] = {0, 2, 1, 3};
            for (int i = 0; i < 4; ++i) {
              x[i] = q[k_channel(dim, lane, unit, n, 2 * order[i] + parity)];
              initial[C::segment(n)][pos] -= uint32_t(Isa::KEY_BIAS * x[i]);
            }
            Isa::split(x, first[pos], second[pos]);
          }
          __builtin_memcpy(&part->operands[2 * n + parity][row].first, first, sizeof(first));
          __builtin_memcpy(&part->operands[2 * n + parity][row].second, second, sizeof(second));
        }
      for (int segment = 0; segment < C::SEGMENTS; ++segment)
        __builtin_memcpy(&part->initial[segment][row], initial[segment], sizeof(initial[segment]));
    }
}

// raw: per row [segment][uc][lane][CHUNK] products summed over the channels of the word's lane.
template <class Isa, int CLASS, class Source, int ROWS>
void qk_page(const uint8_t* codes, const uint8_t* ahead, int dim, const int8_t* levels, void* group, int32_t* raw,
             size_t raw_stride) {
  using C = KeyClass<CLASS>;
  using Q = QueryLayout<Isa, CLASS>;
  using L = typename Q::L;
  using U32 = typename Isa::U32;
  const int chunks = units(dim) / C::CHUNK;
  const Tables<Isa> tables = Source::template tables<Isa>(levels, Isa::KEY_BIAS);
  const typename Q::Part* parts = Q::parts(group, dim);
  // With 32 registers, an operand that is loaded serves two vectors of codes.
  constexpr int TOGETHER = Isa::WORDS == 16 && L::VARIANTS == 1 && L::LANE_VECTORS % 2 == 0 ? 2 : 1;
  for (int uc = 0; uc < chunks; ++uc)
    for (int lv = 0; lv < L::LANE_VECTORS; lv += TOGETHER) {
      U32 words[TOGETHER][Source::WORDS];
      typename Isa::Acc acc[TOGETHER][ROWS];
      for (int v = 0; v < TOGETHER; ++v) Source::template words<Isa, C::CHUNK>(codes, ahead, uc, lv + v, words[v]);
      const typename Q::Part& part = parts[uc % C::PERIOD * L::VARIANTS + lv % L::VARIANTS];
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        const int segment = C::segment(n);
        if (n == 0 || segment != C::segment(n - 1))
          for (int v = 0; v < TOGETHER; ++v)
            for (int r = 0; r < ROWS; ++r) acc[v][r] = Isa::start(part.initial[segment][r]);
#pragma GCC unroll 2
        for (int parity = 0; parity < 2; ++parity) {
          typename Isa::Codes c[TOGETHER];
          for (int v = 0; v < TOGETHER; ++v)
            c[v] = Isa::widen(Source::template look_up<Isa>(tables, words[v], n, parity));
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r) {
            const typename Isa::Operand q = part.operands[2 * n + parity][r];
            for (int v = 0; v < TOGETHER; ++v) Isa::dot_key(acc[v][r], c[v], q);
          }
        }
        if (n == 3 || segment != C::segment(n + 1))
          for (int v = 0; v < TOGETHER; ++v)
            for (int r = 0; r < ROWS; ++r)
              put(raw + r * raw_stride + ((segment * chunks + uc) * L::LANE_VECTORS + lv + v) * Isa::WORDS,
                  Isa::join(acc[v][r]));
      }
    }
}

typedef uint32_t Four __attribute__((vector_size(16)));
FORGE_INLINE Four interleave_low(Four a, Four b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#else
  return __builtin_shuffle(a, b, Four{0, 4, 1, 5});
#endif
}
FORGE_INLINE Four interleave_high(Four a, Four b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
  return __builtin_shuffle(a, b, Four{2, 6, 3, 7});
#endif
}

// Sums raw over the four lanes of a group and the words of a token: out [64] in token order.
template <class Isa, int DIM>
void gather_scores(const int32_t* raw, int32_t* out) {
#if defined(__AVX512F__)
  if constexpr (DIM == 128) {
    // Three times: sums of pairs of quarters, then the words of two groups in turns.
    const __m512i places = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 16, 20, 17, 21, 18, 22, 19, 23);
    const __m512i later = _mm512_add_epi32(places, _mm512_set1_epi32(8));
    for (int half = 0; half < 2; ++half) {
      __m512i sum[2];
      for (int uc = 0; uc < 2; ++uc) {
        __m512i x[4];
        for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_si512(raw + (uc * 8 + half * 4 + i) * 16);
        const __m512i a =
            _mm512_add_epi32(_mm512_shuffle_i32x4(x[0], x[1], 0x44), _mm512_shuffle_i32x4(x[0], x[1], 0xEE));
        const __m512i b =
            _mm512_add_epi32(_mm512_shuffle_i32x4(x[2], x[3], 0x44), _mm512_shuffle_i32x4(x[2], x[3], 0xEE));
        sum[uc] = _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
      }
      _mm512_storeu_si512(out + 32 * half, _mm512_permutex2var_epi32(sum[0], places, sum[1]));
      _mm512_storeu_si512(out + 32 * half + 16, _mm512_permutex2var_epi32(sum[0], later, sum[1]));
    }
    return;
  }
#endif
  using C = KeyClass<key_class(DIM)>;
  constexpr int CHUNKS = DIM / 16 / C::CHUNK, GROUP = 4 * C::CHUNK;
  const auto group = [&](int segment, int uc, int g) {
    const int32_t* p = raw + (segment * CHUNKS + uc) * LANES * C::CHUNK + g * GROUP;
    if constexpr (C::CHUNK == 4)
      return load<Four>(p) + load<Four>(p + 4) + load<Four>(p + 8) + load<Four>(p + 12);
    else
      return load<Four>(p) + load<Four>(p + 4);  // two lanes of two units each
  };
  if constexpr (DIM == 128) {  // tokens 16 (g / 2) + 2 j + g % 2, j = 4 uc + word
    for (int g = 0; g < 8; g += 2)
      for (int uc = 0; uc < 2; ++uc) {
        const Four even = group(0, uc, g), odd = group(0, uc, g + 1);
        put(out + 8 * g + 8 * uc, interleave_low(even, odd));
        put(out + 8 * g + 8 * uc + 4, interleave_high(even, odd));
      }
  } else if constexpr (DIM == 64) {  // the same with j = 2 word + segment
    typedef uint64_t Two __attribute__((vector_size(16)));
    for (int g = 0; g < 8; g += 2) {
      const Four even[2] = {group(0, 0, g), group(1, 0, g)}, odd[2] = {group(0, 0, g + 1), group(1, 0, g + 1)};
      for (int high = 0; high < 2; ++high) {
        const Two a = Two(high ? interleave_high(even[0], odd[0]) : interleave_low(even[0], odd[0]));
        const Two b = Two(high ? interleave_high(even[1], odd[1]) : interleave_low(even[1], odd[1]));
        put(out + 8 * g + 8 * high, Two{a[0], b[0]});
        put(out + 8 * g + 8 * high + 4, Two{a[1], b[1]});
      }
    }
  } else {
    uint32_t sum[PAGE] = {};
    for (int segment = 0; segment < C::SEGMENTS; ++segment)
      for (int uc = 0; uc < CHUNKS; ++uc)
        for (int g = 0; g < 8; ++g) {
          const Four s = group(segment, uc, g);
          for (int i = 0; i < 4; ++i)
            sum[k_token(DIM, 4 * g, uc * C::CHUNK + i % C::CHUNK, segment * 4 / C::SEGMENTS)] += s[i];
        }
    __builtin_memcpy(out, sum, sizeof(sum));
  }
}

}  // namespace forge
