// What the encode kernel needs of a GPU, on the CPU: one CTA of 256 threads, with barriers and exchanges within warps.
// It stands for common.cuh, transform.cuh (no rotation) and the constants of page.cuh.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __forceinline__ inline
#define FORGE_KERNEL(...) static void
#define FORGE_PARAMS const Params

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
using std::max;
using std::min;

struct Dim {
  int x, y, z;
};
static Dim threadIdx, blockIdx;

// A CTA's threads take turns: each runs until it must wait for others, so that nothing depends on the machine's load.
struct Block {
  static constexpr int THREADS = 256;
  struct Barrier {
    int size, arrived = 0, passed = 0;
  };
  Barrier all{THREADS}, warps[THREADS / 32];
  u32 lanes[THREADS / 32][32], fragments[THREADS / 32][32][6];
  bool any = false;
  ucontext_t scheduler, contexts[THREADS];
  std::vector<char> stacks[THREADS];
  bool done[THREADS] = {};
  int running = 0;
  void (*body)() = nullptr;

  void wait(Barrier& barrier) {
    if (++barrier.arrived == barrier.size) {
      barrier.arrived = 0;
      ++barrier.passed;
      return;
    }
    for (const int passed = barrier.passed; passed == barrier.passed;) swapcontext(&contexts[running], &scheduler);
  }
  static void begin();
  void run(void (*kernel)());
};
static Block* block;
void Block::begin() {
  block->body();
  block->done[block->running] = true;
}
void Block::run(void (*kernel)()) {
  body = kernel;
  for (Barrier& barrier : warps) barrier.size = 32;
  for (int i = 0; i < THREADS; ++i) {
    stacks[i].resize(1 << 18);
    getcontext(&contexts[i]);
    contexts[i].uc_stack.ss_sp = stacks[i].data();
    contexts[i].uc_stack.ss_size = stacks[i].size();
    contexts[i].uc_link = &scheduler;
    makecontext(&contexts[i], begin, 0);
  }
  for (int left = THREADS; left;) {
    left = 0;
    for (int i = 0; i < THREADS; ++i) {
      if (done[i]) continue;
      running = i, threadIdx = {i, 0, 0};
      swapcontext(&scheduler, &contexts[i]);
      left += !done[i];
    }
  }
}

template <class To, class From>
inline To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline void __syncthreads() { block->wait(block->all); }
inline int __syncthreads_or(int value) {
  if (value) block->any = true;
  __syncthreads();
  return block->any;
}
template <class T>
inline T __shfl_xor_sync(u32, T x, int mask) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  block->lanes[warp][lane] = same_bits<u32>(x);
  block->wait(block->warps[warp]);
  const T y = same_bits<T>(block->lanes[warp][lane ^ mask]);
  block->wait(block->warps[warp]);
  return y;
}
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
inline void __syncwarp() { block->wait(block->warps[threadIdx.x >> 5]); }
struct uint2 {
  u32 x, y;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
// PTX ISA, prmt without a mode, of selectors whose nibbles have bit 3 clear.
inline u32 prmt(u32 a, u32 b, u32 selector) {
  const u64 bytes = (u64)b << 32 | a;
  u32 out = 0;
  for (int i = 0; i < 4; ++i) out |= (u32)(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return out;
}
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __float_as_int(float x) { return same_bits<int>(x); }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline float half_to_float(u32 bits) { return (float)same_bits<_Float16>((unsigned short)bits); }
inline u32 float_to_half(float x) { return same_bits<unsigned short>((_Float16)x); }
inline float warp_max(float x) {
  for (int i = 16; i; i >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}
inline float warp_sum(float x) {
  for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
  return x;
}
inline float half_of(u32 x, int i) { return half_to_float(x >> (16 * i) & 0xFFFF); }
template <class F>
inline u32 halves(F f) {
  return float_to_half(f(0)) | float_to_half(f(1)) << 16;
}
inline u32 half2(float a, float b) { return float_to_half(a) | float_to_half(b) << 16; }
inline u32 hadd2(u32 a, u32 b) {
  return halves([&](int i) { return half_of(a, i) + half_of(b, i); });
}
inline u32 hsub2(u32 a, u32 b) {
  return halves([&](int i) { return half_of(a, i) - half_of(b, i); });
}
inline u32 hmul2(u32 a, u32 b) {
  return halves([&](int i) { return half_of(a, i) * half_of(b, i); });
}
inline u32 hmin2(u32 a, u32 b) {
  return halves([&](int i) { return fminf(half_of(a, i), half_of(b, i)); });
}
inline u32 hmax2(u32 a, u32 b) {
  return halves([&](int i) { return fmaxf(half_of(a, i), half_of(b, i)); });
}
inline u32 hlt2(u32 a, u32 b) {
  return (half_of(a, 0) < half_of(b, 0) ? 0xFFFFu : 0u) | (half_of(a, 1) < half_of(b, 1) ? 0xFFFF0000u : 0u);
}
inline u32 hfma2(u32 a, u32 b, u32 c) {
  const auto one = [&](int i) {
    return (unsigned short)same_bits<unsigned short>((_Float16)((double)half_of(a, i) * half_of(b, i) + half_of(c, i)));
  };
  return one(0) | (u32)one(1) << 16;
}
// mma.m16n8k16 of halves, by the fragments of the PTX ISA.
template <int T>
inline void mma_16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  u32(&all)[32][6] = block->fragments[warp];
  for (int i = 0; i < 4; ++i) all[lane][i] = a[i];
  all[lane][4] = b0, all[lane][5] = b1;
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i >> 1), column = 2 * t + (i & 1);
    for (int k = 0; k < 16; ++k)
      d[i] += half_of(all[(row & 7) * 4 + k % 8 / 2][(row >> 3) + 2 * (k >> 3)], k & 1) *
              half_of(all[column * 4 + k % 8 / 2][4 + (k >> 3)], k & 1);
  }
  __syncwarp();
}
enum Type { HALF = 0, BFLOAT = 1, FLOAT = 2 };
template <int T>
inline float load_element(const void* p, i64 i) {
  static_assert(T == FLOAT);
  return ((const float*)p)[i];
}

#include "params.inc"  // the kernel's structures, of their table
template <int DIM, int ROTATION>
inline void transform_in(float*, const TransformArgs&, int, int) {
  static_assert(ROTATION == 0);
}

#include "cuda/codes.cuh"

constexpr int DIM = FORGE_DIM, HEAD_DIM = FORGE_HEAD_DIM;
constexpr int UNITS = forge::units(DIM), STEPS = DIM / 32;
constexpr int SCALE_OFFSET_K = forge::k_scale_offset(DIM, FORGE_K_BITS);
constexpr int MEAN_OFFSET = forge::mean_offset(DIM, FORGE_K_BITS, FORGE_SCALES);
constexpr int K_BYTES = forge::v_offset(DIM, FORGE_K_BITS, FORGE_SCALES);
constexpr int RECORD = forge::record_bytes(DIM, FORGE_K_BITS, FORGE_V_BITS, FORGE_SCALES);
constexpr int SCALE_OFFSET_V = forge::code_bytes(DIM, FORGE_V_BITS);
constexpr int K_COUNT = forge::level_count(FORGE_K_BITS, FORGE_K_CODE),
              V_COUNT = forge::level_count(FORGE_V_BITS, FORGE_V_CODE);
constexpr int K_LEVELS[K_COUNT] = {FORGE_K_LEVELS}, V_LEVELS[V_COUNT] = {FORGE_V_LEVELS};
