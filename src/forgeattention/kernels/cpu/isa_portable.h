// Vector abstraction in plain GNU vector extensions, for processors without a file of their own.
//
// An Isa struct gives: vectors of WORDS 32-bit words; `lookup`, a 16-entry byte table applied to bytes under 16;
// `widen` and two `dot`s, which multiply int8 levels with 16-bit numbers split over an Operand's two vectors and add
// groups of four neighbouring bytes into 32-bit words; `interleave_low/high`, 16-bit interleaving within 128 bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.h"

namespace fa {

struct Portable {
  static constexpr int WORDS = 4;
  static constexpr int KEY_BIAS = 0;       // added to key levels by `key_table`
  static constexpr int WEIGHT_MAX = 32512; // largest weight that `split_weights` takes

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

  static Table table(const int8_t* levels) {
    Table t;
    std::memcpy(&t, levels, 16);
    return t;
  }
  static U32 lookup(Table t, U32 index) {
    U32 out;
    const uint8_t* table = reinterpret_cast<const uint8_t*>(&t);
    const uint8_t* in = reinterpret_cast<const uint8_t*>(&index);
    for (int i = 0; i < 16; ++i) reinterpret_cast<uint8_t*>(&out)[i] = table[in[i]];
    return out;
  }
  static Codes widen(U32 bytes) { return bytes; }
  static Acc start(const U32& initial) { return {I32(initial)}; }
  static void dot_key(Acc& a, Codes codes, const Operand& q) { dot(a, codes, q); }
  static void dot_value(Acc& a, Codes codes, const Operand& p) { dot(a, codes, p); }
  static I32 join(Acc a) { return a.sum; }
  static U32 interleave_low(U32 a, U32 b) {
    return U32{(a[0] & 0xFFFF) | b[0] << 16, a[0] >> 16 | (b[0] & 0xFFFF0000u), (a[1] & 0xFFFF) | b[1] << 16,
               a[1] >> 16 | (b[1] & 0xFFFF0000u)};
  }
  static U32 interleave_high(U32 a, U32 b) {
    return U32{(a[2] & 0xFFFF) | b[2] << 16, a[2] >> 16 | (b[2] & 0xFFFF0000u), (a[3] & 0xFFFF) | b[3] << 16,
               a[3] >> 16 | (b[3] & 0xFFFF0000u)};
  }
  // Four 16-bit numbers for the bytes 0, 2, 1, 3 of a word of codes.
  static void split(const int16_t (&x)[4], uint32_t& first, uint32_t& second) {
    first = uint16_t(x[0]) | uint32_t(uint16_t(x[1])) << 16;
    second = uint16_t(x[2]) | uint32_t(uint16_t(x[3])) << 16;
  }
  static void split_weights(uint64_t x, uint32_t& first, uint32_t& second) {
    first = uint32_t(x);
    second = uint32_t(x >> 32);
  }
  static void prefetch(const void* p) { __builtin_prefetch(p); }
  static void load_half(const uint16_t* in, int count, float* out) {
    for (int i = 0; i < count; ++i) out[i] = half_to_float(in[i]);
  }

 private:
  static void dot(Acc& a, U32 codes, const Operand& q) {
    const I32 c = I32(codes), x = I32(q.first), y = I32(q.second);
    a.sum += (c << 24 >> 24) * (x << 16 >> 16) + (c << 8 >> 24) * (x >> 16) + (c << 16 >> 24) * (y << 16 >> 16) +
             (c >> 24) * (y >> 16);
  }
};

}  // namespace fa
