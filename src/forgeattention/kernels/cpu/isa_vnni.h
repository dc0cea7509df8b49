// AVX-VNNI (256 bits) and AVX-512 VNNI: vpdpbusd on the high and the low byte of a 16-bit operand. Its unsigned side is
// the biased levels for keys and the weights for values.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "half.h"

namespace forge {

// Bytes of four 16-bit numbers in the order 0, 2, 1, 3.
struct VnniSplit {
  static constexpr int KEY_BIAS = 128;
  static constexpr int WEIGHT_MAX = 65535;

  static FORGE_INLINE void split(const int16_t (&x)[4], uint32_t& first, uint32_t& second) {
    const int order[4] = {0, 2, 1, 3};
    first = second = 0;
    for (int i = 0; i < 4; ++i) {
      const int value = x[order[i]];
      first |= uint32_t(uint8_t((value + 128) >> 8)) << 8 * i;
      second |= uint32_t(uint8_t(value)) << 8 * i;
    }
  }
  static FORGE_INLINE void split_weights(const float* w, float up, uint32_t* low, uint32_t* high) {
    const __m256 by = _mm256_set1_ps(up), half = _mm256_set1_ps(0.5f);
    // Of eight 16-bit numbers the upper bytes of the first four, their lower bytes, and so on.
    const __m256i bytes =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(1, 5, 3, 7, 0, 4, 2, 6, 9, 13, 11, 15, 8, 12, 10, 14));
    for (int t = 0; t < 4; ++t) {
      const __m256i a = _mm256_cvttps_epi32(_mm256_fmadd_ps(_mm256_loadu_ps(w + 16 * t), by, half));
      const __m256i b = _mm256_cvttps_epi32(_mm256_fmadd_ps(_mm256_loadu_ps(w + 16 * t + 8), by, half));
      // 64 bits of n = 0, 2, 1, 3 to 0, 1, 2, 3
      const __m256i x = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8), bytes);
      _mm_storeu_si128((__m128i*)(low + 4 * t), _mm256_castsi256_si128(x));
      _mm_storeu_si128((__m128i*)(high + 4 * t), _mm256_extracti128_si256(x, 1));
    }
  }
  static FORGE_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
  static FORGE_INLINE void load_half(const uint16_t* in, int count, float* out) {
    for (int i = 0; i < count; i += 8)
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(in + i))));
  }
};

#if defined(__AVXVNNI__) && !defined(__AVX512F__)
struct AvxVnni : VnniSplit {
  static constexpr int WORDS = 8;
  typedef uint32_t U32 __attribute__((vector_size(32)));
  typedef int32_t I32 __attribute__((vector_size(32)));
  typedef float F32 __attribute__((vector_size(32)));
  typedef U32 Table;
  typedef U32 Codes;
  struct Operand {
    U32 first, second;
  };
  struct Acc {
    I32 high, low;
  };

  static FORGE_INLINE Table table(const int8_t* levels) {
    return (U32)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)levels));
  }
  static FORGE_INLINE U32 lookup(Table t, U32 index) { return (U32)_mm256_shuffle_epi8((__m256i)t, (__m256i)index); }
  static FORGE_INLINE U32 look_up_even(Table t, U32 nibbles) { return lookup(t, nibbles & 0x0F0F0F0Fu); }
  static FORGE_INLINE U32 look_up_odd(Table t, U32 nibbles) { return lookup(t, nibbles >> 4 & 0x0F0F0F0Fu); }
  static FORGE_INLINE Codes widen(U32 bytes) { return bytes; }
  static FORGE_INLINE Acc start(const U32& initial) { return {I32{}, (I32)initial}; }
  static FORGE_INLINE void dot_key(Acc& a, Codes c, const Operand& q) {
    a.high = (I32)_mm256_dpbusd_avx_epi32((__m256i)a.high, (__m256i)c, (__m256i)q.first);
    a.low = (I32)_mm256_dpbusd_avx_epi32((__m256i)a.low, (__m256i)c, (__m256i)q.second);
  }
  static FORGE_INLINE void dot_value(Acc& a, Codes c, const Operand& p) {
    a.high = (I32)_mm256_dpbusd_avx_epi32((__m256i)a.high, (__m256i)p.first, (__m256i)c);
    a.low = (I32)_mm256_dpbusd_avx_epi32((__m256i)a.low, (__m256i)p.second, (__m256i)c);
  }
  static FORGE_INLINE I32 join(Acc a) { return (I32)(((U32)a.high << 8) + (U32)a.low); }
  static FORGE_INLINE U32 interleave_low(U32 a, U32 b) { return (U32)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b); }
  static FORGE_INLINE U32 interleave_high(U32 a, U32 b) { return (U32)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b); }
};
#endif

#if defined(__AVX512VNNI__)
struct Avx512 : VnniSplit {
  static constexpr int WORDS = 16;
  typedef uint32_t U32 __attribute__((vector_size(64)));
  typedef int32_t I32 __attribute__((vector_size(64)));
  typedef float F32 __attribute__((vector_size(64)));
  typedef U32 Table;
  typedef U32 Codes;
  struct Operand {
    U32 first, second;
  };
  struct Acc {
    I32 high, low;
  };

  static FORGE_INLINE Table table(const int8_t* levels) {
    return (U32)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)levels));
  }
  static FORGE_INLINE U32 lookup(Table t, U32 index) { return (U32)_mm512_shuffle_epi8((__m512i)t, (__m512i)index); }
  static FORGE_INLINE U32 look_up_even(Table t, U32 nibbles) { return lookup(t, nibbles & 0x0F0F0F0Fu); }
  static FORGE_INLINE U32 look_up_odd(Table t, U32 nibbles) { return lookup(t, nibbles >> 4 & 0x0F0F0F0Fu); }
  static FORGE_INLINE Codes widen(U32 bytes) { return bytes; }
  static FORGE_INLINE Acc start(const U32& initial) { return {I32{}, (I32)initial}; }
  static FORGE_INLINE void dot_key(Acc& a, Codes c, const Operand& q) {
    a.high = (I32)_mm512_dpbusd_epi32((__m512i)a.high, (__m512i)c, (__m512i)q.first);
    a.low = (I32)_mm512_dpbusd_epi32((__m512i)a.low, (__m512i)c, (__m512i)q.second);
  }
  static FORGE_INLINE void dot_value(Acc& a, Codes c, const Operand& p) {
    a.high = (I32)_mm512_dpbusd_epi32((__m512i)a.high, (__m512i)p.first, (__m512i)c);
    a.low = (I32)_mm512_dpbusd_epi32((__m512i)a.low, (__m512i)p.second, (__m512i)c);
  }
  static FORGE_INLINE void split_weights(const float* w, float up, uint32_t* low, uint32_t* high) {
    const __m512i bytes =
        _mm512_broadcast_i32x4(_mm_setr_epi8(1, 9, 5, 13, 0, 8, 4, 12, -1, -1, -1, -1, -1, -1, -1, -1));
    const __m512i pairs = _mm512_setr_epi64(0, 2, 8, 10, 4, 6, 12, 14);
    __m512i x[4];
    for (int t = 0; t < 4; ++t) {
      const __m512 scaled = _mm512_fmadd_ps(_mm512_loadu_ps(w + 16 * t), _mm512_set1_ps(up), _mm512_set1_ps(0.5f));
      x[t] = _mm512_shuffle_epi8(_mm512_cvttps_epi32(scaled), bytes);
    }
    const __m512i a = _mm512_permutex2var_epi64(x[0], pairs, x[1]), b = _mm512_permutex2var_epi64(x[2], pairs, x[3]);
    _mm512_storeu_si512(low, _mm512_shuffle_i64x2(a, b, 0x44));
    _mm512_storeu_si512(high, _mm512_shuffle_i64x2(a, b, 0xEE));
  }
  static FORGE_INLINE I32 join(Acc a) { return (I32)(((U32)a.high << 8) + (U32)a.low); }
  static FORGE_INLINE U32 interleave_low(U32 a, U32 b) { return (U32)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b); }
  static FORGE_INLINE U32 interleave_high(U32 a, U32 b) { return (U32)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b); }
};
#endif

}  // namespace forge
