// 2^x, reductions, and the numbers stored in a record.
#pragma once

#include <cstdint>

#include "codes.h"
#include "half.h"

namespace fa {

// 2^x to float precision for x <= 0; 0 below -126. NaN gives NaN.
template <class F32, class I32>
FA_INLINE F32 exp2(F32 x) {
  const F32 shift = F32{} + 12582912.0f, low = F32{} - 126.0f;
  const F32 y = x < low ? low : x;
  const F32 n = (y + shift) - shift, f = y - n;
  F32 p = F32{} + 1.5403530393e-4f;  // ln(2)^k / k!
  p = p * f + 1.3333558146e-3f;
  p = p * f + 9.6181291076e-3f;
  p = p * f + 5.5504108665e-2f;
  p = p * f + 2.4022650696e-1f;
  p = p * f + 6.9314718056e-1f;
  p = p * f + 1.0f;
  const I32 power = (__builtin_convertvector(n, I32) + 127) << 23;
  F32 scale;
  __builtin_memcpy(&scale, &power, sizeof(scale));
  return x < low ? F32{} : p * scale;
}

template <class F32>
FA_INLINE float sum_of(F32 v) {
  float s[sizeof(F32) / 4];
  __builtin_memcpy(s, &v, sizeof(v));
  for (unsigned width = sizeof(F32) / 8; width; width /= 2)
    for (unsigned i = 0; i < width; ++i) s[i] += s[i + width];
  return s[0];
}
template <class F32>
FA_INLINE float max_of(F32 v) {
  float s[sizeof(F32) / 4];
  __builtin_memcpy(s, &v, sizeof(v));
  for (unsigned width = sizeof(F32) / 8; width; width /= 2)
    for (unsigned i = 0; i < width; ++i) s[i] = s[i] > s[i + width] ? s[i] : s[i + width];
  return s[0];
}

// The header in the low bits of a mean row (docs/format.md).
struct Header {
  float mean_step;
  int k_base, v_base;
};
FA_INLINE Header read_header(const uint8_t* row) {
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) {
    const uint64_t low = load<uint64_t>(row + 8 * i) & 0x0101010101010101u;
    bits |= uint32_t(low * 0x0102040810204080u >> 56) << 8 * i;
  }
  return {half_to_float(uint16_t(bits)), int8_t(bits >> 16), int8_t(bits >> 24)};
}

// 2^(i / 32), i = 0..31.
struct Octave {
  float steps[LOG8_STEPS];
};
extern const Octave OCTAVE;

FA_INLINE float power_of_two(int exponent) {
  // The base of a scale reaches from -128 to 127, its octave adds up to 7: beyond float's normal range in two factors.
  const auto normal = [](int e) {
    const uint32_t bits = uint32_t(e + 127) << 23;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
  };
  if (exponent < -126) return normal(-126) * normal(exponent + 126);
  return exponent > 127 ? INF : normal(exponent);
}

// Scales [64] of one side of a page.
template <class Isa>
FA_INLINE void read_scales(const uint8_t* p, int format, int base, float* out) {
  if (format == FP16) {
    Isa::load_half(reinterpret_cast<const uint16_t*>(p), PAGE, out);
    return;
  }
  float octaves[8];
  for (int i = 0; i < 8; ++i) octaves[i] = power_of_two(base + i);
  for (int i = 0; i < PAGE; ++i) {
    const int b = p[i] - 1;
    out[i] = b < 0 ? 0.0f : octaves[b >> 5] * OCTAVE.steps[b & 31];
  }
}

}  // namespace fa
