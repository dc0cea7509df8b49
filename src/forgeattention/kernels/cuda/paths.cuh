// Which codes a run of 32 values gets: trellis paths of least squared error (Viterbi 1967), and keys with feedback
// (codec/shaping.py), where each code makes up for the errors of the codes before it.
//
// Two searches share a thread, one in each half of every register: numbers are pairs of fp16. All values are in units
// of sixteen levels, in which levels are exact and squares stay small.
#pragma once
#include "page.cuh"

namespace paths {
constexpr u32 ONE = 0x3C003C00u, SIXTEEN = 0x4C004C00u, SIXTEENTH = 0x2C002C00u;
constexpr u32 BIAS = 0x64806480u;    // 1152: an integer of +-127 beside it is the low byte, plus 128
constexpr u32 UNBIAS = 0xD480D480u;  // -72, a sixteenth of it
constexpr u32 FIRST_BIN = 0x64016401u, LAST_BIN = 0x64FF64FFu;  // 1025 and 1279
constexpr u32 REACH = 0x4B804B80u, MINUS_REACH = 0xCB80CB80u;   // +-15: what a metric sees of a value
constexpr u32 NEVER = 0x63D063D0u;                              // 1000, a cost that no path has
constexpr int BINS = 256;
constexpr int REACHED = 24;  // codes on either side of a seam that rank its states

__device__ __forceinline__ u32 pair_of(u32 half_bits) { return half_bits | half_bits << 16; }

// By integer value + 128: the nearest level of each of four subsets (byte c: level + 128), and its level bits, shifted
// by one for the path bit. Of a scalar code there is one subset, and the second word is the code.
template <int BITS, int CODE, int COUNT>
__device__ __forceinline__ uint2 bin(const int (&levels)[COUNT], int value) {
  constexpr int SUBSETS = CODE == forge::SCALAR ? 1 : 4;
  uint2 out = make_uint2(0, 0);
#pragma unroll
  for (int c = 0; c < SUBSETS; ++c) {
    int level = levels[c], w = 0;
#pragma unroll
    for (int i = 1; i < COUNT / SUBSETS; ++i) {
      const int next = levels[SUBSETS * i + c];
      if (2 * value > levels[SUBSETS * (i - 1) + c] + next) level = next, w = i;
    }
    out.x |= (u32)(level + 128) << (8 * c);
    out.y |= (u32)(SUBSETS == 1 ? w : 2 * w) << (8 * c);
  }
  return out;
}
// The bins of two values, as halves that hold them in their low bytes.
__device__ __forceinline__ u32 bins_of(u32 x) { return hmin2(hmax2(hfma2(x, SIXTEEN, BIAS), FIRST_BIN), LAST_BIN); }
__device__ __forceinline__ u32 level_of(u32 bytes) { return hfma2(bytes, SIXTEENTH, UNBIAS); }
// The nearest level of every subset.
__device__ __forceinline__ void nearest(const uint2* table, u32 x, u32 (&level)[4]) {
  const u32 at = bins_of(x), a = table[at & 255].x, b = table[at >> 16 & 255].x;
  const u32 low = prmt(a, b, 0x5140), high = prmt(a, b, 0x7362), magic = 0x64646464u;
  level[0] = level_of(prmt(low, magic, 0x4140));
  level[1] = level_of(prmt(low, magic, 0x4342));
  level[2] = level_of(prmt(high, magic, 0x4140));
  level[3] = level_of(prmt(high, magic, 0x4342));
}

template <int CODE>
struct Trellis {
  static constexpr int STATES = CODE == forge::TRELLIS4 ? 4 : 8, HALF_OF = STATES / 2;
  static constexpr FORGE_FN int subset(int path) {
    const int c1 = STATES == 4 ? path ^ path >> 2 : path ^ path >> 1 ^ path >> 3,
              c0 = STATES == 4 ? path >> 1 : path >> 2;
    return (c1 & 1) << 1 | (c0 & 1);
  }
  static __device__ __forceinline__ void squares(const uint2* table, u32 x, u32 (&best)[4]) {
    u32 level[4];
    nearest(table, x, level);
    const u32 seen = hmin2(hmax2(x, MINUS_REACH), REACH);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const u32 d = hsub2(seen, level[c]);
      best[c] = hmul2(d, d);
    }
  }
  // Subtracts the least cost, so that none grows.
  static __device__ __forceinline__ void settle(u32 (&cost)[STATES]) {
    u32 least = cost[0];
#pragma unroll
    for (int s = 1; s < STATES; ++s) least = hmin2(least, cost[s]);
#pragma unroll
    for (int s = 0; s < STATES; ++s) cost[s] = hsub2(cost[s], least);
  }
  // The state in which the best circle starts and ends, nearly: costs of the codes before and after the seam rank the
  // states. value(i): code i's two numbers. The result has a state in each half.
  template <class Value>
  static __device__ __forceinline__ u32 seam(const uint2* table, Value value) {
    u32 before[STATES], after[STATES];
#pragma unroll
    for (int s = 0; s < STATES; ++s) before[s] = after[s] = 0;
#pragma unroll 1
    for (int i = 32 - REACHED; i < 32; ++i) {
      u32 best[4], next[STATES];
      squares(table, value(i), best);
#pragma unroll
      for (int to = 0; to < STATES; ++to) {
        const int from = to >> 1, u = to & 1;
        next[to] = hmin2(hadd2(before[from], best[subset(from << 1 | u)]),
                         hadd2(before[from + HALF_OF], best[subset((from + HALF_OF) << 1 | u)]));
      }
#pragma unroll
      for (int s = 0; s < STATES; ++s) before[s] = next[s];
      squares(table, value(31 - i), best);
#pragma unroll
      for (int s = 0; s < STATES; ++s) {
        const int to = (s << 1) & (STATES - 1);
        next[s] = hmin2(hadd2(after[to], best[subset(s << 1)]), hadd2(after[to | 1], best[subset(s << 1 | 1)]));
      }
#pragma unroll
      for (int s = 0; s < STATES; ++s) after[s] = next[s];
      if ((i & 3) == 3) settle(before), settle(after);
    }
    u32 seam = 0, least = hadd2(before[0], after[0]);
#pragma unroll
    for (u32 s = 1; s < STATES; ++s) {
      const u32 cost = hadd2(before[s], after[s]), less = hlt2(cost, least);
      seam = (seam & ~less) | (pair_of(s) & less);
      least = hmin2(least, cost);
    }
    return seam;
  }
  // Viterbi search from `seam` back to it. choices[(i / 2) * stride]: bit s of code i in bits s (even i) or 8 + s (odd
  // i) of each half: whether state s after the code has its upper predecessor. value(i): code i's numbers. With SHAPED
  // the errors of the best path so far are fed back: plain(b, x) gives the numbers of codes 8 b .. 8 b + 7 without
  // feedback of earlier codes, weight(b, w) the weights of their squares, factor(i, b, f) what code i's error counts in
  // them, and errors[i * stride] keeps what was taken for it.
  template <bool SHAPED, class Value, class Plain, class Weight, class Factor>
  static __device__ __forceinline__ void search(const uint2* table, u32 seam, u32* choices, u32* errors, int stride,
                                                Value value, Plain plain, Weight weight, Factor factor) {
    u32 cost[STATES], least = 0;
#pragma unroll
    for (u32 s = 0; s < STATES; ++s)
      cost[s] = ((seam & 0xFFFFu) == s ? 0u : NEVER & 0xFFFFu) | (seam >> 16 == s ? 0u : NEVER & 0xFFFF0000u);
#pragma unroll 1
    for (int block = 0; block < 4; ++block) {
      u32 x[8], own[8], w[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = value(8 * block + i);
      if constexpr (SHAPED) {
        plain(block, own);
        weight(block, w);
#pragma unroll 2
        for (int j = 0; j < 8 * block; ++j) {
          u32 f[8];
          factor(j, block, f);
          const u32 e = errors[j * stride];
#pragma unroll
          for (int i = 0; i < 8; ++i) x[i] = hfma2(f[i], e, x[i]);
        }
      }
      u32 word = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        u32 level[4], d[4], best[4], next[STATES], most[4], taken = 0;
        nearest(table, x[i], level);
        const u32 seen = hmin2(hmax2(x[i], MINUS_REACH), REACH), down = least ^ 0x80008000u;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          d[c] = hsub2(seen, level[c]);
          best[c] = SHAPED ? hfma2(hmul2(d[c], w[i]), d[c], down) : hmul2(d[c], d[c]);
        }
#pragma unroll
        for (int to = 0; to < STATES; ++to) {
          const int from = to >> 1, u = to & 1, lower = subset(from << 1 | u),
                    upper = subset((from + HALF_OF) << 1 | u);
          const u32 a = hadd2(cost[from], best[lower]), b = hadd2(cost[from + HALF_OF], best[upper]);
          next[to] = hmin2(a, b);
          taken |= hlt2(b, a) & (0x00010001u << to);
          if constexpr (SHAPED) {
            const bool first = to % HALF_OF == 0;  // of the two subsets that these branches have
            most[lower] = first ? a : hmin2(most[lower], a);
            most[upper] = first ? b : hmin2(most[upper], b);
          }
        }
#pragma unroll
        for (int s = 0; s < STATES; ++s) cost[s] = next[s];
        if constexpr (SHAPED) {
          // The branch that is the cheapest now tells the error that is fed back, for good: following the best path's
          // past would gain less than a per cent.
          least = hmin2(hmin2(most[0], most[1]), hmin2(most[2], most[3]));
          u32 of = level[0];
#pragma unroll
          for (int c = 1; c < 4; ++c) {
            const u32 other = hlt2(least, most[c]);
            of = (of & other) | (level[c] & ~other);
          }
          const u32 e = hsub2(own[i], of);
          errors[(8 * block + i) * stride] = e;
          if (i < 7) {
            u32 f[8];
            factor(8 * block + i, block, f);
#pragma unroll
            for (int k = i + 1; k < 8; ++k) x[k] = hfma2(f[k], e, x[k]);
          }
        } else if ((i & 3) == 3) {
          settle(cost);
        }
        word |= taken << (i & 1 ? 8 : 0);
        if (i & 1) {
          choices[(4 * block + (i >> 1)) * stride] = word;
          word = 0;
        }
      }
    }
  }
  // Path bits of half h, code i's in bit i.
  static __device__ __forceinline__ u32 path(u32 seam, const u32* choices, int stride, int h) {
    u32 state = seam >> (16 * h) & 0xFFFFu, out = 0;
#pragma unroll 1
    for (int pair = 15; pair >= 0; --pair) {
      const u32 word = choices[pair * stride] >> (16 * h);
#pragma unroll
      for (int i = 1; i >= 0; --i) {
        out = out << 1 | (state & 1);
        state = state >> 1 | (word >> (8 * i + state) & 1) * HALF_OF;
      }
    }
    return out;
  }
  // Subset of code i on a path, from words of c1 and c0.
  static __device__ __forceinline__ void subsets(u32 u, u32& c1, u32& c0) {
    c1 = STATES == 4 ? u ^ forge::rotate_left(u, 2) : u ^ forge::rotate_left(u, 1) ^ forge::rotate_left(u, 3);
    c0 = forge::rotate_left(u, STATES == 4 ? 1 : 2);
  }
};
}  // namespace paths
