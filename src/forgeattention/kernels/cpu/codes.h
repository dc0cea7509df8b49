// From a side's code words to int8 levels in registers.
#pragma once

#include "half.h"
#include "kernels.h"

namespace forge {

template <class V>
FORGE_INLINE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
FORGE_INLINE void put(void* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// How the WORDS words of a vector lie among lanes and units. `uc` counts chunks of units, `lv` vectors of lanes. A
// vector of values, once interleaved, holds one channel's four neighbouring tokens in a word.
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

// Levels by index, and by the index with its two halves exchanged.
template <class Isa>
struct Tables {
  typename Isa::Table plain, exchanged;
};

// Sources of codes: for keys `words`, of which `look_up` makes levels when they are needed, for values all levels at
// once.
template <int BITS, int CODE>
struct Packed {
  static constexpr int WORDS = 4;
  template <class Isa>
  static FORGE_INLINE Tables<Isa> tables(const int8_t* levels, int bias) {
    constexpr int COUNT = CODE == SCALAR ? 1 << BITS : 2 << BITS;
    int8_t plain[16], exchanged[16];
    for (int i = 0; i < 16; ++i) plain[i] = int8_t(levels[i % COUNT] + bias);
    for (int i = 0; i < 16; ++i) exchanged[i] = plain[i >> 2 | (i & 3) << 2];
    return {Isa::table(plain), Isa::table(exchanged)};
  }
  // Nibble words of level indices; those of EXCHANGED words have their halves exchanged, which saves shifts.
  static constexpr bool EXCHANGED = BITS == 3 && CODE != SCALAR;
  template <class Isa, int CHUNK>
  static FORGE_INLINE void words(const uint8_t* codes, const uint8_t* ahead, int uc, int lv,
                                 typename Isa::U32 (&n)[4]) {
    using U32 = typename Isa::U32;
    U32 w[BITS];
    for (int k = 0; k < BITS; ++k) {
      const int at = 4 * ((uc * BITS + k) * LANES * CHUNK + lv * Isa::WORDS);
      w[k] = load<U32>(codes + at);
      if (at % 64 == 0) Isa::prefetch(ahead + at);
    }
    if constexpr (EXCHANGED) {
      U32 even, odd;
      path_pairs<CODE>(w[0], even, odd);
      n[0] = choose(0xCCCCCCCCu, w[1], even);
      n[1] = choose(0xCCCCCCCCu, w[2], odd);
      n[2] = choose(0xCCCCCCCCu, even, w[1]);
      n[3] = choose(0xCCCCCCCCu, odd, w[2]);
    } else if constexpr (BITS == 3) {  // eight levels stand twice in the table, so that bit 3 is free
      for (int k = 0; k < 3; ++k) n[k] = w[k];
      n[3] = choose(0x44444444u, U32(w[2] >> 1), choose(0x22222222u, U32(w[1] >> 2), U32(w[0] >> 3)));
    } else {
      unit_nibbles<BITS, CODE>(w, n);
    }
  }
  // Levels of the even or odd nibbles of word k.
  template <class Isa>
  static FORGE_INLINE typename Isa::U32 look_up(const Tables<Isa>& tables, const typename Isa::U32 (&n)[4], int k,
                                                bool odd) {
    const typename Isa::Table& table = EXCHANGED && k >= 2 ? tables.exchanged : tables.plain;
    return odd ? Isa::look_up_odd(table, n[k]) : Isa::look_up_even(table, n[k]);
  }

  // out[2 n + half]: the bytes of a word are the tokens 0, 2, 1, 3 of four.
  template <class Isa, int CHUNK>
  static FORGE_INLINE void values(const uint8_t* codes, const uint8_t* ahead, int uc, int lv, const Tables<Isa>& tables,
                                  typename Isa::U32 (&out)[8]) {
    typename Isa::U32 n[4];
    words<Isa, CHUNK>(codes, ahead, uc, lv, n);
    for (int k = 0; k < 4; ++k) {
      const typename Isa::U32 even = look_up<Isa>(tables, n, k, false), odd = look_up<Isa>(tables, n, k, true);
      out[2 * k] = Isa::interleave_low(even, odd);
      out[2 * k + 1] = Isa::interleave_high(even, odd);
    }
  }
};

// Levels that `unpack` stored: the eight vectors of (uc, lv) one after the other.
struct Unpacked {
  static constexpr int WORDS = 8;
  template <class Isa>
  static FORGE_INLINE Tables<Isa> tables(const int8_t*, int) {
    return Tables<Isa>();
  }
  // `words` are the stored vectors themselves.
  template <class Isa, int CHUNK>
  static FORGE_INLINE void words(const uint8_t* codes, const uint8_t*, int uc, int lv, typename Isa::U32 (&out)[8]) {
    using U32 = typename Isa::U32;
    const uint8_t* p = codes + size_t(uc * Layout<Isa, CHUNK>::LANE_VECTORS + lv) * 8 * sizeof(U32);
    for (int i = 0; i < 8; ++i) out[i] = load<U32>(p + i * sizeof(U32));
  }
  template <class Isa>
  static FORGE_INLINE typename Isa::U32 look_up(const Tables<Isa>&, const typename Isa::U32 (&n)[8], int k, bool odd) {
    return n[2 * k + odd];
  }
  template <class Isa, int CHUNK>
  static FORGE_INLINE void values(const uint8_t* codes, const uint8_t* ahead, int uc, int lv, const Tables<Isa>&,
                                  typename Isa::U32 (&out)[8]) {
    words<Isa, CHUNK>(codes, ahead, uc, lv, out);
  }
};

// All codes of one side of a page to levels, [uc][lv][8] vectors (64 * dim bytes); keys keep their bias.
template <class Isa, int CHUNK, class Source, bool KEYS>
void unpack(const uint8_t* codes, int chunks, const int8_t* levels, uint8_t* out) {
  using U32 = typename Isa::U32;
  const Tables<Isa> tables = Source::template tables<Isa>(levels, KEYS ? Isa::KEY_BIAS : 0);
  for (int uc = 0; uc < chunks; ++uc)
    for (int lv = 0; lv < Layout<Isa, CHUNK>::LANE_VECTORS; ++lv, out += 8 * sizeof(U32)) {
      U32 b[8];
      if (KEYS) {
        U32 n[Source::WORDS];
        Source::template words<Isa, CHUNK>(codes, codes, uc, lv, n);
        for (int i = 0; i < 8; ++i) b[i] = Source::template look_up<Isa>(tables, n, i >> 1, i & 1);
      } else {
        Source::template values<Isa, CHUNK>(codes, codes, uc, lv, tables, b);
      }
      for (int i = 0; i < 8; ++i) put(out + i * sizeof(U32), b[i]);
    }
}

// Index of a code in tables of functions; UNPACKED comes last.
enum { UNPACKED = 7, SOURCES = 8 };
inline int source_index(const Side& s) {
  return s.code == SCALAR ? s.bits - 2 : (s.code == TRELLIS4 ? 3 : 5) + s.bits - 2;
}

}  // namespace forge
