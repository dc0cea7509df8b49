// Words of a unit to level indices, eight to a word, tuned for CUDA; the meaning is `unit_nibbles` in shared/format.h.
//
// A trellis index is a linear function of the path bits, so multiplication forms it: with u in bit 0 of
// every nibble, u * taps adds the delayed copies, the low bit of each two-bit sum is their XOR, and the upper half of the
// product is what the word's last codes give to the next word. A nibble's sum is at most 7, so nothing runs over.
#pragma once
#include "shared/format.h"

namespace fa {

// c1 in bit 1 (its carry in bit 2 is masked off), c0 in bit 0.
constexpr FA_FN fa_u32 path_taps(int code) { return code == TRELLIS4 ? 2 * 0x101 + 0x10 : 2 * 0x1011 + 0x100; }

// Two multiplications of one word are cheaper than a wide one, whose 64-bit addend has to be put together.
FA_FN fa_u32 upper_product(fa_u32 a, fa_u32 b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return (fa_u32)((unsigned long long)a * b >> 32);
#endif
}

// Path bits of a unit's four words -> c1 c0 in bits 1, 0 of every nibble; other bits are not cleared. The path is a circle:
// before the first word comes the last one.
template <int CODE>
FA_FN void path_words(const fa_u32 (&u)[4], fa_u32 (&c)[4]) {
  FA_UNROLL
  for (int k = 0; k < 4; ++k) c[k] = u[k] * path_taps(CODE) + upper_product(u[(k + 3) & 3], path_taps(CODE));
}

// At 3 bits a trellis index has four bits; every other one of 2 or 3 bits has bit 3 clear.
template <int BITS, int CODE>
FA_FN void unit_indices(const fa_u32 (&w)[BITS], fa_u32 (&n)[4]) {
  if constexpr (CODE == SCALAR) {
    unit_nibbles<BITS, CODE>(w, n);
  } else if constexpr (BITS == 3) {
    const fa_u32 u[4] = {w[0] & 0x11111111u, w[1] & 0x11111111u, w[2] & 0x11111111u, w[2] >> 1 & 0x11111111u};
    fa_u32 c[4];
    path_words<CODE>(u, c);
    FA_UNROLL
    for (int k = 0; k < 3; ++k) n[k] = (w[k] & 0xCCCCCCCCu) | (c[k] & 0x33333333u);
    n[3] = (w[0] << 2 & 0x88888888u) | (w[1] << 1 & 0x44444444u) | (c[3] & 0x33333333u);
  } else {
    const fa_u32 f[4] = {w[0], w[0] >> 2, w[1], w[1] >> 2};
    const fa_u32 u[4] = {f[0] & 0x11111111u, f[1] & 0x11111111u, f[2] & 0x11111111u, f[3] & 0x11111111u};
    fa_u32 c[4];
    path_words<CODE>(u, c);
    FA_UNROLL
    for (int k = 0; k < 4; ++k) n[k] = (f[k] << 1 & 0x44444444u) | (c[k] & 0x33333333u);
  }
}

// Level tables as byte-permute operands. Sixteen levels are two tables of magnitudes, of the negative half (index bit 3
// clear) and of the positive half: a selector nibble with bit 3 set gives the sign of the byte, which is 0 for a
// magnitude, so each table yields zeros where the other one holds, and a level is positive minus negative.
template <int N>
struct LevelTable {
  static constexpr bool PAIR = N == 16;
  fa_u32 low[2], high[2];
  constexpr FA_FN LevelTable(const int (&levels)[N]) : low{}, high{} {
    for (int i = 0; i < N; ++i) {
      const int value = PAIR && i < 8 ? -levels[i] : levels[i];
      const fa_u32 byte = (fa_u32)(value & 255) << (8 * (i & 3));
      (i >= 8 ? high : low)[i >> 2 & 1] |= byte;
    }
  }
};

constexpr FA_FN int level_count(int bits, int code) { return 1 << (code == SCALAR ? bits : bits + 1); }

}  // namespace fa
