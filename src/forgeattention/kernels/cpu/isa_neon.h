// Armv8.2 NEON with dotprod: sdot on the high and the low byte of a 16-bit operand, both signed.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "half.h"

namespace forge {

struct Neon {
  static constexpr int WORDS = 4;
  static constexpr int KEY_BIAS = 0;
  static constexpr int WEIGHT_MAX = 32512;

  typedef uint32_t U32 __attribute__((vector_size(16)));
  typedef int32_t I32 __attribute__((vector_size(16)));
  typedef float F32 __attribute__((vector_size(16)));
  typedef U32 Table;
  typedef U32 Codes;
  struct Operand {
    U32 first, second;
  };
  struct Acc {
    I32 high, low;
  };

  static FORGE_INLINE Table table(const int8_t* levels) { return (U32)vld1q_s8(levels); }
  static FORGE_INLINE U32 lookup(Table t, U32 index) { return (U32)vqtbl1q_u8((uint8x16_t)t, (uint8x16_t)index); }
  static FORGE_INLINE U32 look_up_even(Table t, U32 nibbles) { return lookup(t, nibbles & 0x0F0F0F0Fu); }
  static FORGE_INLINE U32 look_up_odd(Table t, U32 nibbles) { return lookup(t, nibbles >> 4 & 0x0F0F0F0Fu); }
  static FORGE_INLINE Codes widen(U32 bytes) { return bytes; }
  static FORGE_INLINE Acc start(const U32& initial) { return {I32{}, (I32)initial}; }
  static FORGE_INLINE void dot_key(Acc& a, Codes c, const Operand& q) { dot(a, c, q); }
  static FORGE_INLINE void dot_value(Acc& a, Codes c, const Operand& p) { dot(a, c, p); }
  static FORGE_INLINE I32 join(Acc a) { return (I32)(((U32)a.high << 8) + (U32)a.low); }
  static FORGE_INLINE U32 interleave_low(U32 a, U32 b) { return (U32)vzip1q_u16((uint16x8_t)a, (uint16x8_t)b); }
  static FORGE_INLINE U32 interleave_high(U32 a, U32 b) { return (U32)vzip2q_u16((uint16x8_t)a, (uint16x8_t)b); }
  // Bytes of four 16-bit numbers in the order 0, 2, 1, 3; high * 256 + low with both signed.
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
    for (int i = 0; i < 16; ++i) {
      const uint32x4_t x = vcvtq_u32_f32(vfmaq_n_f32(vdupq_n_f32(0.5f), vld1q_f32(w + 4 * i), up));
      const uint64_t four = vget_lane_u64(vreinterpret_u64_u16(vmovn_u32(x)), 0);
      const uint64_t l = four & 0x00FF00FF00FF00FFu, h = (four + 0x0080008000800080u) >> 8 & 0x00FF00FF00FF00FFu;
      uint32_t* to = (i & 2 ? high : low) + 4 * (i >> 2) + 2 * (i & 1);
      to[0] = uint32_t(h | h >> 24);
      to[1] = uint32_t(l | l >> 24);
    }
  }
  static FORGE_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
  static FORGE_INLINE void load_half(const uint16_t* in, int count, float* out) {
    for (int i = 0; i < count; i += 4) vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(in + i))));
  }

 private:
  static FORGE_INLINE void dot(Acc& a, Codes c, const Operand& q) {
    a.high = (I32)vdotq_s32((int32x4_t)a.high, (int8x16_t)c, (int8x16_t)q.first);
    a.low = (I32)vdotq_s32((int32x4_t)a.low, (int8x16_t)c, (int8x16_t)q.second);
  }
};

}  // namespace forge
