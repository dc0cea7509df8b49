// AVX2 (with FMA and F16C): levels are widened to 16 bits and multiplied by pmaddwd.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "half.h"

namespace forge {

struct Avx2 {
  static constexpr int WORDS = 8;
  static constexpr int KEY_BIAS = 0;
  static constexpr int WEIGHT_MAX = 32512;

  typedef uint32_t U32 __attribute__((vector_size(32)));
  typedef int32_t I32 __attribute__((vector_size(32)));
  typedef float F32 __attribute__((vector_size(32)));
  typedef U32 Table;
  struct Codes {
    __m256i even, odd;  // bytes 0, 2 and 1, 3 of each word as int16
  };
  struct Operand {
    U32 first, second;
  };
  struct Acc {
    I32 sum;
  };

  static FORGE_INLINE Table table(const int8_t* levels) {
    return (U32)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)levels));
  }
  static FORGE_INLINE U32 lookup(Table t, U32 index) { return (U32)_mm256_shuffle_epi8((__m256i)t, (__m256i)index); }
  static FORGE_INLINE U32 look_up_even(Table t, U32 nibbles) { return lookup(t, nibbles & 0x0F0F0F0Fu); }
  static FORGE_INLINE U32 look_up_odd(Table t, U32 nibbles) { return lookup(t, nibbles >> 4 & 0x0F0F0F0Fu); }
  static FORGE_INLINE Codes widen(U32 bytes) {
    const __m256i b = (__m256i)bytes;
    return {_mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), _mm256_srai_epi16(b, 8)};
  }
  static FORGE_INLINE Acc start(const U32& initial) { return {(I32)initial}; }
  static FORGE_INLINE void dot_key(Acc& a, Codes c, const Operand& q) { dot(a, c, q); }
  static FORGE_INLINE void dot_value(Acc& a, Codes c, const Operand& p) { dot(a, c, p); }
  static FORGE_INLINE I32 join(Acc a) { return a.sum; }
  static FORGE_INLINE U32 interleave_low(U32 a, U32 b) { return (U32)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b); }
  static FORGE_INLINE U32 interleave_high(U32 a, U32 b) { return (U32)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b); }
  static FORGE_INLINE void split(const int16_t (&x)[4], uint32_t& first, uint32_t& second) {
    first = uint16_t(x[0]) | uint32_t(uint16_t(x[1])) << 16;
    second = uint16_t(x[2]) | uint32_t(uint16_t(x[3])) << 16;
  }
  static FORGE_INLINE void split_weights(const float* w, float up, uint32_t* low, uint32_t* high) {
    const __m256 by = _mm256_set1_ps(up), half = _mm256_set1_ps(0.5f);
    for (int t = 0; t < 4; ++t) {
      const __m256i a = _mm256_cvttps_epi32(_mm256_fmadd_ps(_mm256_loadu_ps(w + 16 * t), by, half));
      const __m256i b = _mm256_cvttps_epi32(_mm256_fmadd_ps(_mm256_loadu_ps(w + 16 * t + 8), by, half));
      // 64 bits of n = 0, 2, 1, 3 to 0, 1, 2, 3
      const __m256i x = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8);
      _mm_storeu_si128((__m128i*)(low + 4 * t), _mm256_castsi256_si128(x));
      _mm_storeu_si128((__m128i*)(high + 4 * t), _mm256_extracti128_si256(x, 1));
    }
  }
  static FORGE_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
  static FORGE_INLINE void load_half(const uint16_t* in, int count, float* out) {
    for (int i = 0; i < count; i += 8)
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(in + i))));
  }

 private:
  static FORGE_INLINE void dot(Acc& a, Codes c, const Operand& q) {
    a.sum += (I32)_mm256_madd_epi16(c.even, (__m256i)q.first);
    a.sum += (I32)_mm256_madd_epi16(c.odd, (__m256i)q.second);
  }
};

}  // namespace forge
