// Weighted sums of the values of a tile of pages.
#pragma once

#include "codes.h"

namespace fa {

// Operands of one row and page: [n][variant][half]. weights: 64 numbers up to Isa::WEIGHT_MAX in token order.
template <class Isa, int CHUNK>
struct WeightLayout {
  using L = Layout<Isa, CHUNK>;
  static constexpr int COUNT = 4 * L::VARIANTS * L::HALVES;
};

template <class Isa, int CHUNK>
void prepare_weights(const uint16_t* weights, typename Isa::Operand* out) {
  using L = Layout<Isa, CHUNK>;
  uint32_t first[16], second[16];  // of tokens 4 i .. 4 i + 3
  for (int i = 0; i < 16; ++i) Isa::split_weights(load<uint64_t>(weights + 4 * i), first[i], second[i]);
  for (int n = 0; n < 4; ++n)
    for (int variant = 0; variant < L::VARIANTS; ++variant)
      for (int half = 0; half < L::HALVES; ++half, ++out) {
        uint32_t w[2][Isa::WORDS];
        for (int block = 0; block < L::BLOCKS; ++block) {
          const int t = L::value_lane(variant, half, 4 * block) & 3;
          for (int i = 0; i < 4; ++i) {
            w[0][4 * block + i] = first[4 * t + n];
            w[1][4 * block + i] = second[4 * t + n];
          }
        }
        __builtin_memcpy(&out->first, w[0], sizeof(w[0]));
        __builtin_memcpy(&out->second, w[1], sizeof(w[1]));
      }
}

// acc[r] [uc][lv][half][WORDS] = acc[r] * keep[r] + back[r] * (integer sums over the pages).
template <class Isa, int CHUNK, class Source, int ROWS>
void value_tile(const uint8_t* const* codes, const uint8_t* const* ahead, int pages, int dim, const int8_t* levels,
                const typename Isa::Operand* weights, size_t acc_stride, float* acc, const float* keep, const float* back) {
  using L = Layout<Isa, CHUNK>;
  using U32 = typename Isa::U32;
  using F32 = typename Isa::F32;
  constexpr int COUNT = WeightLayout<Isa, CHUNK>::COUNT;
  const typename Isa::Table table = Isa::table(levels);
  const int chunks = units(dim) / CHUNK;
  for (int uc = 0; uc < chunks; ++uc)
    for (int lv = 0; lv < L::LANE_VECTORS; ++lv) {
      typename Isa::Acc sum[2][ROWS];
      for (int half = 0; half < 2; ++half)
        for (int r = 0; r < ROWS; ++r) sum[half][r] = Isa::start(U32{});
      for (int page = 0; page < pages; ++page) {
        U32 b[8];
        Source::template values<Isa, CHUNK>(codes[page], ahead[page], uc, lv, table, b);
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
          put(a, load<F32>(a) * keep[r] + added * back[r]);
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

}  // namespace fa
