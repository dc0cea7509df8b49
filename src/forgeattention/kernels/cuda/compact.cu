// compact: scattered pages side by side. Limited by memory: a page is read once and written once.
//
// Grid: (blocks of a page, pages).
#include "common.cuh"

constexpr int THREADS = 256;

struct alignas(16) Word {
  u32 x, y, z, w;
};

FORGE_KERNEL(THREADS) compact(FORGE_PARAMS p) {
  const Word* from = reinterpret_cast<const Word*>(p.base + p.offsets[blockIdx.y]);
  Word* to = reinterpret_cast<Word*>(p.out) + blockIdx.y * p.words;
  for (i64 i = i64(blockIdx.x) * THREADS + threadIdx.x; i < p.words; i += i64(gridDim.x) * THREADS) to[i] = from[i];
}
