// Words of a unit to level indices, eight to a word, and level tables for byte permutes.
#pragma once
#include "shared/format.h"

namespace forge {

// At 3 bits a trellis index has four bits; every other one of 2 or 3 bits has bit 3 clear.
template <int BITS, int CODE>
FORGE_FN void unit_indices(const forge_u32 (&w)[BITS], forge_u32 (&n)[4]) {
  unit_nibbles<BITS, CODE>(w, n);
}

// Level tables as byte-permute operands. Sixteen levels are two tables, of the negative half (index bit 3 clear) and of
// the positive half. A selector nibble with bit 3 set gives the sign of the byte it points to in all bits: 0 in the
// positive table, -1 in the negative one. So the negative table holds (level - 1), and the sum of what both give is
// (level - 1) for all sixteen; who sums products adds the sum of the other factors once (`low` is used with the index,
// `high` with bit 3 flipped).
template <int N>
struct LevelTable {
  static constexpr bool PAIR = N == 16;
  forge_u32 low[2], high[2];
  constexpr FORGE_FN LevelTable(const int (&levels)[N]) : low{}, high{} {
    for (int i = 0; i < N; ++i) {
      const int value = PAIR && i < 8 ? levels[i] - 1 : levels[i];
      const forge_u32 byte = (forge_u32)(value & 255) << (8 * (i & 3));
      (i >= 8 ? high : low)[i >> 2 & 1] |= byte;
    }
  }
};

constexpr FORGE_FN int level_count(int bits, int code) { return 1 << (code == SCALAR ? bits : bits + 1); }

}  // namespace forge
