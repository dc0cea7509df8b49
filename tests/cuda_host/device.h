// What the encode kernel needs of a GPU, on the CPU: one CTA of 256 threads, with barriers and exchanges within warps. It stands
// for common.cuh, transform.cuh (no rotation) and the constants of page.cuh.
#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
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
static thread_local Dim threadIdx;
static Dim blockIdx;
struct Block {
  std::barrier<> all{256};
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  u32 lanes[8][32];
  std::atomic<int> any = 0;
  Block() {
    for (int i = 0; i < 8; ++i) warps.push_back(std::make_unique<std::barrier<>>(32));
  }
};
static Block* block;

template <class To, class From>
inline To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline void __syncthreads() { block->all.arrive_and_wait(); }
inline int __syncthreads_or(int value) {
  if (value) block->any = 1;
  __syncthreads();
  return block->any;
}
template <class T>
inline T __shfl_xor_sync(u32, T x, int mask) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  block->lanes[warp][lane] = same_bits<u32>(x);
  block->warps[warp]->arrive_and_wait();
  const T y = same_bits<T>(block->lanes[warp][lane ^ mask]);
  block->warps[warp]->arrive_and_wait();
  return y;
}
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
inline int __popc(u32 x) { return __builtin_popcount(x); }
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
constexpr int K_COUNT = forge::level_count(FORGE_K_BITS, FORGE_K_CODE), V_COUNT = forge::level_count(FORGE_V_BITS, FORGE_V_CODE);
constexpr int K_LEVELS[K_COUNT] = {FORGE_K_LEVELS}, V_LEVELS[V_COUNT] = {FORGE_V_LEVELS};
