// compact: scattered pages side by side. Limited by memory: a page is read once and written once.
//
// Grid: (blocks of a page, pages). Macro: FORGE_PARAMS_BYTES.
#include "common.cuh"

constexpr int THREADS = 256;

struct Params {
  const u8* base;      // added to offsets; null if they are addresses
  const i64* offsets;  // [pages] bytes, multiples of 16
  u8* out;             // [pages, 16 words]
  i64 words;           // of 16 bytes in a page
};
static_assert(sizeof(Params) == FORGE_PARAMS_BYTES, "the launcher's structure differs");

struct alignas(16) Word {
  u32 x, y, z, w;
};

FORGE_KERNEL(THREADS) compact(FORGE_PARAMS p) {
  const Word* from = reinterpret_cast<const Word*>(p.base + p.offsets[blockIdx.y]);
  Word* to = reinterpret_cast<Word*>(p.out) + blockIdx.y * p.words;
  for (i64 i = i64(blockIdx.x) * THREADS + threadIdx.x; i < p.words; i += i64(gridDim.x) * THREADS) to[i] = from[i];
}
