// IEEE half precision and bfloat16 in plain integers.
#pragma once

#include <cstdint>

namespace forge {

constexpr float INF = __builtin_huge_valf(), LOG2_E = 1.4426950408889634f;

#define FORGE_INLINE inline __attribute__((always_inline))

FORGE_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  float f;
  if (exponent == 0) {
    f = float(fraction) * 0x1p-24f;
    return sign ? -f : f;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even; beyond 65504 infinity.
FORGE_INLINE uint16_t float_to_half(float f) {
  uint32_t x;
  __builtin_memcpy(&x, &f, 4);
  const uint16_t sign = uint16_t(x >> 16 & 0x8000);
  x &= 0x7FFFFFFF;
  if (x >= 0x477FF000) return uint16_t(sign | (x > 0x7F800000 ? 0x7E00 : 0x7C00));
  if (x < 0x38800000) {  // subnormal: the float adder rounds
    float v;
    __builtin_memcpy(&v, &x, 4);
    v += 0.5f;
    __builtin_memcpy(&x, &v, 4);
    return uint16_t(sign | (x - 0x3F000000));
  }
  x += 0xC8000FFF + (x >> 13 & 1);
  return uint16_t(sign | x >> 13);
}

FORGE_INLINE uint16_t float_to_bfloat(float f) {
  uint32_t x;
  __builtin_memcpy(&x, &f, 4);
  if ((x & 0x7FFFFFFF) > 0x7F800000) return uint16_t(x >> 16 | 0x40);
  return uint16_t((x + 0x7FFF + (x >> 16 & 1)) >> 16);
}

}  // namespace forge
