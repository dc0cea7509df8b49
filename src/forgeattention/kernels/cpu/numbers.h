// 2^x, reductions, and the numbers stored in a record.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <utility>

#include "codes.h"
#include "half.h"

namespace forge {

// 2^x to float precision for x < 127; 0 below -126. NaN gives NaN.
template <class F32, class I32>
FORGE_INLINE F32 exp2(F32 x) {
  const F32 shift = F32{} + 12582912.0f, low = F32{} - 126.0f;
  const F32 y = x < low ? low : x;
#if defined(__AVX512F__)
  const F32 n = (F32)_mm512_roundscale_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT);
#else
  const F32 n = (y + shift) - shift;
#endif
  const F32 f = y - n;
  F32 p = F32{} + 1.5403530393e-4f;  // ln(2)^k / k!
  p = p * f + 1.3333558146e-3f;
  p = p * f + 9.6181291076e-3f;
  p = p * f + 5.5504108665e-2f;
  p = p * f + 2.4022650696e-1f;
  p = p * f + 6.9314718056e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  if constexpr (sizeof(F32) == 64)
    return (F32)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ), (__m512)p, (__m512)n);
#endif
  const I32 power = (__builtin_convertvector(n, I32) + 127) << 23;
  F32 scale;
  __builtin_memcpy(&scale, &power, sizeof(scale));
  return x < low ? F32{} : p * scale;
}

// v[PLACE::of(0)], v[PLACE::of(1)], ...
template <class PLACE, class V, std::size_t... I>
FORGE_INLINE V permuted(V v, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, PLACE::of(int(I))...);
#else
  using Index = decltype(v < v);
  return __builtin_shuffle(v, Index{PLACE::of(int(I))...});
#endif
}
template <class PLACE, class V>
FORGE_INLINE V permuted(V v) {
  return permuted<PLACE>(v, std::make_index_sequence<sizeof(V) / 4>());
}
template <int WIDTH>
struct Exchanged {
  static constexpr int of(int i) { return i ^ WIDTH; }
};

template <int WIDTH, class F32>
FORGE_INLINE float sum_of(F32 v) {
  if constexpr (WIDTH == 0)
    return v[0];
  else
    return sum_of<WIDTH / 2>(v + permuted<Exchanged<WIDTH>>(v));
}
template <int WIDTH, class F32>
FORGE_INLINE float max_of(F32 v) {
  if constexpr (WIDTH == 0) {
    return v[0];
  } else {
    const F32 other = permuted<Exchanged<WIDTH>>(v);
    return max_of<WIDTH / 2>(v > other ? v : other);
  }
}
template <class F32>
FORGE_INLINE float sum_of(F32 v) {
  return sum_of<sizeof(F32) / 8>(v);
}
template <class F32>
FORGE_INLINE float max_of(F32 v) {
  return max_of<sizeof(F32) / 8>(v);
}

// The header in the low bits of a mean row (docs/format.md).
struct Header {
  float mean_step;
  int k_base, v_base;
};
FORGE_INLINE Header read_header(const uint8_t* row) {
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

FORGE_INLINE float power_of_two(int exponent) {
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
FORGE_INLINE void read_scales(const uint8_t* p, int format, int base, float* out) {
  if (format == FP16) {
    Isa::load_half(reinterpret_cast<const uint16_t*>(p), PAGE, out);
    return;
  }
  if (base >= -126 && base < 119) {  // all scales are normal numbers
    using F32 = typename Isa::F32;
    using I32 = typename Isa::I32;
    using U32 = typename Isa::U32;
    typedef uint8_t Bytes __attribute__((vector_size(Isa::WORDS)));
    for (int i = 0; i < PAGE; i += Isa::WORDS) {
      Bytes stored;
      __builtin_memcpy(&stored, p + i, Isa::WORDS);
      const I32 b = __builtin_convertvector(stored, I32);
#if defined(__AVX512F__)
      const I32 exponent = I32(U32(b - 1) >> 5) + base;
      const F32 step = (F32)_mm512_permutex2var_ps(_mm512_loadu_ps(OCTAVE.steps), (__m512i)(b - 1),
                                                   _mm512_loadu_ps(OCTAVE.steps + 16));
      const F32 x = (F32)((I32)step + (exponent << 23));
#else
      const F32 x = exp2<F32, I32>(__builtin_convertvector(b - 1, F32) * (1.0f / LOG8_STEPS) + float(base));
#endif
      put(out + i, b == 0 ? F32{} : x);
    }
    return;
  }
  float octaves[8];
  for (int i = 0; i < 8; ++i) octaves[i] = power_of_two(base + i);
  for (int i = 0; i < PAGE; ++i) {
    const int b = p[i] - 1;
    out[i] = b < 0 ? 0.0f : octaves[b >> 5] * OCTAVE.steps[b & 31];
  }
}

}  // namespace forge
