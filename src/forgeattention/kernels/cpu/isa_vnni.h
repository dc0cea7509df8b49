// AVX-VNNI (256 bits) and AVX-512 VNNI: vpdpbusd on the high and the low byte of a 16-bit operand. Its unsigned side is
// the biased levels for keys and the weights for values.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fa {

// Bytes of four 16-bit numbers in the order 0, 2, 1, 3.
struct VnniSplit {
  static constexpr int KEY_BIAS = 128;
  static constexpr int WEIGHT_MAX = 65535;

  static void split(const int16_t (&x)[4], uint32_t& first, uint32_t& second) {
    const int order[4] = {0, 2, 1, 3};
    first = second = 0;
    for (int i = 0; i < 4; ++i) {
      const int value = x[order[i]];
      first |= uint32_t(uint8_t((value + 128) >> 8)) << 8 * i;
      second |= uint32_t(uint8_t(value)) << 8 * i;
    }
  }
  static void split_weights(uint64_t x, uint32_t& first, uint32_t& second) {
    const uint64_t low = x & 0x00FF00FF00FF00FFu, high = x >> 8 & 0x00FF00FF00FF00FFu;
    first = uint32_t(high | high >> 24);
    second = uint32_t(low | low >> 24);
  }
  static void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
  static void load_half(const uint16_t* in, int count, float* out) {
    for (int i = 0; i < count; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(in + i))));
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

  static Table table(const int8_t* levels) {
    return (U32)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)levels));
  }
  static U32 lookup(Table t, U32 index) { return (U32)_mm256_shuffle_epi8((__m256i)t, (__m256i)index); }
  static Codes widen(U32 bytes) { return bytes; }
  static Acc start(const U32& initial) { return {I32{}, (I32)initial}; }
  static void dot_key(Acc& a, Codes c, const Operand& q) {
    a.high = (I32)_mm256_dpbusd_avx_epi32((__m256i)a.high, (__m256i)c, (__m256i)q.first);
    a.low = (I32)_mm256_dpbusd_avx_epi32((__m256i)a.low, (__m256i)c, (__m256i)q.second);
  }
  static void dot_value(Acc& a, Codes c, const Operand& p) {
    a.high = (I32)_mm256_dpbusd_avx_epi32((__m256i)a.high, (__m256i)p.first, (__m256i)c);
    a.low = (I32)_mm256_dpbusd_avx_epi32((__m256i)a.low, (__m256i)p.second, (__m256i)c);
  }
  static I32 join(Acc a) { return (I32)(((U32)a.high << 8) + (U32)a.low); }
  static U32 interleave_low(U32 a, U32 b) { return (U32)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b); }
  static U32 interleave_high(U32 a, U32 b) { return (U32)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b); }
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

  static Table table(const int8_t* levels) {
    return (U32)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)levels));
  }
  static U32 lookup(Table t, U32 index) { return (U32)_mm512_shuffle_epi8((__m512i)t, (__m512i)index); }
  static Codes widen(U32 bytes) { return bytes; }
  static Acc start(const U32& initial) { return {I32{}, (I32)initial}; }
  static void dot_key(Acc& a, Codes c, const Operand& q) {
    a.high = (I32)_mm512_dpbusd_epi32((__m512i)a.high, (__m512i)c, (__m512i)q.first);
    a.low = (I32)_mm512_dpbusd_epi32((__m512i)a.low, (__m512i)c, (__m512i)q.second);
  }
  static void dot_value(Acc& a, Codes c, const Operand& p) {
    a.high = (I32)_mm512_dpbusd_epi32((__m512i)a.high, (__m512i)p.first, (__m512i)c);
    a.low = (I32)_mm512_dpbusd_epi32((__m512i)a.low, (__m512i)p.second, (__m512i)c);
  }
  static I32 join(Acc a) { return (I32)(((U32)a.high << 8) + (U32)a.low); }
  static U32 interleave_low(U32 a, U32 b) { return (U32)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b); }
  static U32 interleave_high(U32 a, U32 b) { return (U32)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b); }
};
#endif

}  // namespace fa
