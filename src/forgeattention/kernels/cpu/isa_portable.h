// Vector abstraction in plain GNU vector extensions, for processors without a file of their own.
//
// An Isa struct gives: vectors of WORDS 32-bit words; `look_up_even/odd`, a 16-entry byte table applied to the low or
// high nibbles of bytes; `widen` and two `dot`s, which multiply int8 levels with 16-bit numbers split over an Operand's
// two vectors and add groups of four neighbouring bytes into 32-bit words; `interleave_low/high`, 16-bit interleaving
// within 128 bits; `prefetch`, always inlined, because GCC takes a call of a function that only prefetches for one
// without effect.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.h"

namespace forge {

struct Portable {
  static constexpr int WORDS = 4;
  static constexpr int KEY_BIAS = 0;        // added to key levels by `key_table`
  static constexpr int WEIGHT_MAX = 32512;  // largest weight that `split_weights` takes

  typedef uint32_t U32 __attribute__((vector_size(16)));
  typedef int32_t I32 __attribute__((vector_size(16)));
  typedef float F32 __attribute__((vector_size(16)));
  typedef U32 Table;
  typedef U32 Codes;
  struct Operand {
    U32 first, second;
  };
  struct Acc {
    I32 sum;
  };

  static FORGE_INLINE Table table(const int8_t* levels) {
    Table t;
    std::memcpy(&t, levels, 16);
    return t;
  }
  static FORGE_INLINE U32 lookup(Table t, U32 index) {
    U32 out;
    const uint8_t* table = reinterpret_cast<const uint8_t*>(&t);
    const uint8_t* in = reinterpret_cast<const uint8_t*>(&index);
    for (int i = 0; i < 16; ++i) reinterpret_cast<uint8_t*>(&out)[i] = table[in[i]];
    return out;
  }
  static FORGE_INLINE U32 look_up_even(Table t, U32 nibbles) { return lookup(t, nibbles & 0x0F0F0F0Fu); }
  static FORGE_INLINE U32 look_up_odd(Table t, U32 nibbles) { return lookup(t, nibbles >> 4 & 0x0F0F0F0Fu); }
  static FORGE_INLINE Codes widen(U32 bytes) { return bytes; }
  static FORGE_INLINE Acc start(const U32& initial) { return {I32(initial)}; }
  static FORGE_INLINE void dot_key(Acc& a, Codes codes, const Operand& q) { dot(a, codes, q); }
  static FORGE_INLINE void dot_value(Acc& a, Codes codes, const Operand& p) { dot(a, codes, p); }
  static FORGE_INLINE I32 join(Acc a) { return a.sum; }
  static FORGE_INLINE U32 interleave_low(U32 a, U32 b) {
    return U32{(a[0] & 0xFFFF) | b[0] << 16, a[0] >> 16 | (b[0] & 0xFFFF0000u), (a[1] & 0xFFFF) | b[1] << 16,
               a[1] >> 16 | (b[1] & 0xFFFF0000u)};
  }
  static FORGE_INLINE U32 interleave_high(U32 a, U32 b) {
    return U32{(a[2] & 0xFFFF) | b[2] << 16, a[2] >> 16 | (b[2] & 0xFFFF0000u), (a[3] & 0xFFFF) | b[3] << 16,
               a[3] >> 16 | (b[3] & 0xFFFF0000u)};
  }
  // Four 16-bit numbers for the bytes 0, 2, 1, 3 of a word of codes.
  static FORGE_INLINE void split(const int16_t (&x)[4], uint32_t& first, uint32_t& second) {
    first = uint16_t(x[0]) | uint32_t(uint16_t(x[1])) << 16;
    second = uint16_t(x[2]) | uint32_t(uint16_t(x[3])) << 16;
  }
  // Rounded weights [64] of a page times `up`, split likewise: the pair of the tokens 16 t + 4 n .. + 3 to words
  // 4 t + 2 (n & 1) of low (n < 2) or high.
  static FORGE_INLINE void split_weights(const float* w, float up, uint32_t* low, uint32_t* high) {
    for (int i = 0; i < 16; ++i) {
      uint32_t x[4];
      for (int k = 0; k < 4; ++k) x[k] = uint32_t(int32_t(w[4 * i + k] * up + 0.5f));
      uint32_t* to = (i & 2 ? high : low) + 4 * (i >> 2) + 2 * (i & 1);
      to[0] = x[0] | x[1] << 16;
      to[1] = x[2] | x[3] << 16;
    }
  }
  static FORGE_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
  static FORGE_INLINE void load_half(const uint16_t* in, int count, float* out) {
    for (int i = 0; i < count; ++i) out[i] = half_to_float(in[i]);
  }

 private:
  static FORGE_INLINE void dot(Acc& a, U32 codes, const Operand& q) {
    const I32 c = I32(codes), x = I32(q.first), y = I32(q.second);
    a.sum += (c << 24 >> 24) * (x << 16 >> 16) + (c << 8 >> 24) * (x >> 16) + (c << 16 >> 24) * (y << 16 >> 16) +
             (c >> 24) * (y >> 16);
  }
};

}  // namespace forge
