// Weighted sums of the values of a tile of pages.
#pragma once

#include "numbers.h"

namespace forge {

// Operands of one row and page: [n][variant][half]. weights: 64 numbers up to Isa::WEIGHT_MAX in token order.
template <class Isa, int CHUNK>
struct WeightLayout {
  using L = Layout<Isa, CHUNK>;
  static constexpr int COUNT = 4 * L::VARIANTS * L::HALVES;
};

// Word N of each 128 bits, four times.
template <int N>
struct Spread {
  static constexpr int of(int i) { return (i & ~3) | N; }
};
// weights [64] times `up` are rounded.
template <class Isa, int CHUNK>
void prepare_weights(const float* weights, float up, typename Isa::Operand* out) {
  using L = Layout<Isa, CHUNK>;
  using U32 = typename Isa::U32;
  alignas(64) uint32_t split[2][16];  // [n / 2][t][n % 2][first, second] of the tokens 16 t + 4 n .. + 3
  Isa::split_weights(weights, up, split[0], split[1]);
  const auto spread = [&](const uint32_t* from, int variant, int half) {
    if (CHUNK == 4) return load<U32>(from + 4 * L::BLOCKS * variant);
    uint32_t w[Isa::WORDS];
    for (int block = 0; block < L::BLOCKS; ++block)
      __builtin_memcpy(w + 4 * block, from + 4 * (L::value_lane(variant, half, 4 * block) & 3), 16);
    return load<U32>(w);
  };
  constexpr int STEP = L::VARIANTS * L::HALVES;  // from n to n + 1
  for (int pair = 0; pair < 2; ++pair)
    for (int variant = 0; variant < L::VARIANTS; ++variant)
      for (int half = 0; half < L::HALVES; ++half) {
        const U32 w = spread(split[pair], variant, half);
        typename Isa::Operand* to = out + 2 * pair * STEP + variant * L::HALVES + half;
        to[0] = {permuted<Spread<0>>(w), permuted<Spread<1>>(w)};
        to[STEP] = {permuted<Spread<2>>(w), permuted<Spread<3>>(w)};
      }
}

// acc[r] [uc][lv][half][WORDS] = acc[r] * rescale[r] + step[r] * (integer sums over the pages).
template <class Isa, int CHUNK, class Source, int ROWS>
void value_tile(const uint8_t* const* codes, const uint8_t* const* ahead, int pages, int dim, const int8_t* levels,
                const typename Isa::Operand* weights, size_t acc_stride, float* acc, const float* rescale,
                const float* step) {
  using L = Layout<Isa, CHUNK>;
  using U32 = typename Isa::U32;
  using F32 = typename Isa::F32;
  constexpr int COUNT = WeightLayout<Isa, CHUNK>::COUNT;
  const Tables<Isa> tables = Source::template tables<Isa>(levels, 0);
  const int chunks = units(dim) / CHUNK;
  for (int uc = 0; uc < chunks; ++uc)
    for (int lv = 0; lv < L::LANE_VECTORS; ++lv) {
      typename Isa::Acc sum[2][ROWS];
      for (int half = 0; half < 2; ++half)
        for (int r = 0; r < ROWS; ++r) sum[half][r] = Isa::start(U32{});
      for (int page = 0; page < pages; ++page) {
        U32 b[8];
        Source::template values<Isa, CHUNK>(codes[page], ahead[page], uc, lv, tables, b);
        const typename Isa::Operand* w = weights + page * COUNT + lv % L::VARIANTS * L::HALVES;
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
          for (int n = 0; n < 4; ++n) {
            const typename Isa::Codes c = Isa::widen(b[2 * n + half]);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r)
              Isa::dot_value(sum[half][r], c,
                             w[r * TILE_PAGES * COUNT + n * L::VARIANTS * L::HALVES + (L::HALVES == 2 ? half : 0)]);
          }
      }
      for (int half = 0; half < 2; ++half)
        for (int r = 0; r < ROWS; ++r) {
          float* a = acc + r * acc_stride + ((uc * L::LANE_VECTORS + lv) * 2 + half) * Isa::WORDS;
          const F32 added = __builtin_convertvector(Isa::join(sum[half][r]), F32);
          put(a, load<F32>(a) * rescale[r] + added * step[r]);
        }
    }
}

// Sums acc over the four lanes of a group: o [dim].
template <class Isa, int CHUNK>
void gather_values(const float* acc, int dim, float scale, float* o) {
  using L = Layout<Isa, CHUNK>;
  const int chunks = units(dim) / CHUNK;
  for (int uc = 0; uc < chunks; ++uc)
    for (int g = 0; g < 8; ++g)
      for (int half = 0; half < (CHUNK == 4 ? 2 : 1); ++half) {
        float sum[4] = {};
        for (int t = 0; t < 4; ++t) {
          const int lane = 4 * g + t;
          const int block = CHUNK == 4 ? lane : lane >> 1, side = CHUNK == 4 ? half : lane & 1;
          const int lv = block / L::BLOCKS;
          const float* p = acc + ((uc * L::LANE_VECTORS + lv) * 2 + side) * Isa::WORDS + block % L::BLOCKS * 4;
          for (int i = 0; i < 4; ++i) sum[i] += p[i];
        }
        for (int i = 0; i < 4; ++i) {
          const int unit = CHUNK == 4 ? 4 * uc + 2 * half + (i >> 1) : 2 * uc + (i >> 1);
          o[16 * unit + g + 8 * (i & 1)] = scale * sum[i];
        }
      }
}

}  // namespace forge
