// From a side's code words to int8 levels in registers.
#pragma once

#include "half.h"
#include "kernels.h"

namespace fa {

template <class V>
FA_INLINE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
FA_INLINE void put(void* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// How the WORDS words of a vector lie among lanes and units. `uc` counts chunks of units, `lv` vectors of lanes. A vector of
// values, once interleaved, holds one channel's four neighbouring tokens in a word.
template <class Isa, int CHUNK>
struct Layout {
  static constexpr int LANE_VECTORS = LANES * CHUNK / Isa::WORDS;
  static constexpr int BLOCKS = Isa::WORDS / 4;
  // Vectors of operands for the four lanes t of a group.
  static constexpr int VARIANTS = 4 * CHUNK > Isa::WORDS ? 4 * CHUNK / Isa::WORDS : 1;
  static constexpr int HALVES = CHUNK == 4 ? 1 : 2;  // value operands that differ between interleaved halves

  static int lane(int lv, int pos) { return (lv * Isa::WORDS + pos) / CHUNK; }
  static int value_lane(int lv, int half, int pos) {
    return CHUNK == 4 ? lv * Isa::WORDS / 4 + pos / 4 : lv * Isa::WORDS / 2 + pos / 4 * 2 + half;
  }
  static int value_unit(int uc, int half, int pos) {
    return CHUNK == 4 ? 4 * uc + 2 * half + (pos >> 1 & 1) : 2 * uc + (pos >> 1 & 1);
  }
};

// Sources of codes. `bytes` gives level indices looked up: out[2 n + parity] has the even or odd nibbles of word n.
template <int BITS, int CODE>
struct Packed {
  static constexpr bool PACKED = true;
  template <class Isa, int CHUNK>
  static FA_INLINE void bytes(const uint8_t* codes, const uint8_t* ahead, int uc, int lv,
                                                          typename Isa::Table table, typename Isa::U32 (&out)[8]) {
    using U32 = typename Isa::U32;
    U32 w[BITS], n[4];
    for (int k = 0; k < BITS; ++k) {
      const int at = 4 * ((uc * BITS + k) * LANES * CHUNK + lv * Isa::WORDS);
      w[k] = load<U32>(codes + at);
      if (at % 64 == 0) Isa::prefetch(ahead + at);
    }
    unit_nibbles<BITS, CODE>(w, n);
    for (int k = 0; k < 4; ++k) {
      out[2 * k] = Isa::lookup(table, n[k] & 0x0F0F0F0Fu);
      out[2 * k + 1] = Isa::lookup(table, n[k] >> 4 & 0x0F0F0F0Fu);
    }
  }
  template <class Isa, int CHUNK>
  static FA_INLINE void keys(const uint8_t* codes, const uint8_t* ahead, int uc, int lv,
                                                         typename Isa::Table table, typename Isa::U32 (&out)[8]) {
    bytes<Isa, CHUNK>(codes, ahead, uc, lv, table, out);
  }
  // out[2 n + half]: the bytes of a word are the tokens 0, 2, 1, 3 of four.
  template <class Isa, int CHUNK>
  static FA_INLINE void values(const uint8_t* codes, const uint8_t* ahead, int uc, int lv,
                                                           typename Isa::Table table, typename Isa::U32 (&out)[8]) {
    typename Isa::U32 b[8];
    bytes<Isa, CHUNK>(codes, ahead, uc, lv, table, b);
    for (int n = 0; n < 4; ++n) {
      out[2 * n] = Isa::interleave_low(b[2 * n], b[2 * n + 1]);
      out[2 * n + 1] = Isa::interleave_high(b[2 * n], b[2 * n + 1]);
    }
  }
};

// Levels that `unpack` stored: the eight vectors of (uc, lv) one after the other.
struct Unpacked {
  static constexpr bool PACKED = false;
  template <class Isa, int CHUNK>
  static FA_INLINE void keys(const uint8_t* codes, const uint8_t*, int uc, int lv,
                                                         typename Isa::Table, typename Isa::U32 (&out)[8]) {
    using U32 = typename Isa::U32;
    const uint8_t* p = codes + size_t(uc * Layout<Isa, CHUNK>::LANE_VECTORS + lv) * 8 * sizeof(U32);
    for (int i = 0; i < 8; ++i) out[i] = load<U32>(p + i * sizeof(U32));
  }
  template <class Isa, int CHUNK>
  static FA_INLINE void values(const uint8_t* codes, const uint8_t* ahead, int uc, int lv,
                                                           typename Isa::Table table, typename Isa::U32 (&out)[8]) {
    keys<Isa, CHUNK>(codes, ahead, uc, lv, table, out);
  }
};

template <class Isa>
inline typename Isa::Table key_table(const int8_t* levels) {
  int8_t biased[16];
  for (int i = 0; i < 16; ++i) biased[i] = int8_t(levels[i] + Isa::KEY_BIAS);
  return Isa::table(biased);
}

// All codes of one side of a page to levels, [uc][lv][8] vectors (64 * dim bytes); keys keep their bias.
template <class Isa, int CHUNK, class Source, bool KEYS>
void unpack(const uint8_t* codes, int chunks, const int8_t* levels, uint8_t* out) {
  using U32 = typename Isa::U32;
  const typename Isa::Table table = KEYS ? key_table<Isa>(levels) : Isa::table(levels);
  for (int uc = 0; uc < chunks; ++uc)
    for (int lv = 0; lv < Layout<Isa, CHUNK>::LANE_VECTORS; ++lv, out += 8 * sizeof(U32)) {
      U32 b[8];
      if (KEYS)
        Source::template keys<Isa, CHUNK>(codes, codes, uc, lv, table, b);
      else
        Source::template values<Isa, CHUNK>(codes, codes, uc, lv, table, b);
      for (int i = 0; i < 8; ++i) put(out + i * sizeof(U32), b[i]);
    }
}

// Index of a code in tables of functions; UNPACKED comes last.
enum { UNPACKED = 7, SOURCES = 8 };
inline int source_index(const Side& s) {
  return s.code == SCALAR ? s.bits - 2 : (s.code == TRELLIS4 ? 3 : 5) + s.bits - 2;
}

}  // namespace fa
