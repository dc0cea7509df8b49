// PTX helpers and element types. No toolkit header is needed, so NVRTC alone compiles every kernel.
#pragma once
#include "shared/format.h"

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// How a kernel's function begins: one structure is all it takes. `struct Params` is made of the kernel's table in
// backends/cuda/params.py and stands before this text. MLX passes no structure: for it, the text before this one makes
// the kernel a function that an entry point calls (backends/cuda/structs.py).
#ifndef FORGE_KERNEL
#define FORGE_KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
#define FORGE_PARAMS const __grid_constant__ Params
#endif

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
#define NEG_INF __int_as_float(0xff800000)
// Stands for "no token yet" where -inf would make inf - inf.
constexpr float NO_MAX = -1e30f;

enum Type { HALF = 0, BFLOAT = 1, FLOAT = 2 };
enum Rotation { IDENTITY = 0, HADAMARD = 1, MATRIX = 2 };

__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The thread's number, read once: the compiler would read the slow special register again at every use.
__device__ __forceinline__ int thread_index() {
  int t;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
  return t;
}
__device__ __forceinline__ u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ float half_to_float(u32 bits) {
  float f;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(bits));
  return f;
}
__device__ __forceinline__ u32 float_to_half(float f) {
  u32 bits;
  asm("{.reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.u32.u16 %0, h;}" : "=r"(bits) : "f"(f));
  return bits;
}
__device__ __forceinline__ u32 float_to_bfloat(float f) {
  u32 bits;
  asm("{.reg .b16 h; cvt.rn.bf16.f32 h, %1; cvt.u32.u16 %0, h;}" : "=r"(bits) : "f"(f));
  return bits;
}
// Two floats to f16x2, a in the low half.
__device__ __forceinline__ u32 half2(float a, float b) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(b), "f"(a));
  return d;
}

// ---- pairs of fp16
#define FORGE_HALF2(name, instruction)                                \
  __device__ __forceinline__ u32 name(u32 a, u32 b) {                 \
    u32 d;                                                            \
    asm(instruction ".f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); \
    return d;                                                         \
  }
FORGE_HALF2(hadd2, "add.rn")
FORGE_HALF2(hsub2, "sub.rn")
FORGE_HALF2(hmul2, "mul.rn")
FORGE_HALF2(hmin2, "min")
FORGE_HALF2(hmax2, "max")
FORGE_HALF2(hlt2, "set.lt.u32")  // all bits of a half where a < b
#undef FORGE_HALF2
__device__ __forceinline__ u32 hfma2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ u32 bfloat2(float a, float b) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(b), "f"(a));
  return d;
}

template <int T>
constexpr FORGE_FN int type_bytes() {
  return T == FLOAT ? 4 : 2;
}
template <int T>
__device__ __forceinline__ float load_element(const void* p, i64 i) {
  if constexpr (T == FLOAT) return __ldg((const float*)p + i);
  const u32 bits = __ldg((const unsigned short*)p + i);
  return T == HALF ? half_to_float(bits) : __uint_as_float(bits << 16);
}
// Loads that begin where they stand in the program: the compiler would begin them where they are used, behind the flood
// of pages.
template <int T>
__device__ __forceinline__ float load_early(const void* p, i64 i) {
  if constexpr (T == FLOAT) {
    float x;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"((const float*)p + i));
    return x;
  } else {
    u32 bits;
    asm volatile("{.reg .b16 h; ld.global.nc.b16 h, [%1]; cvt.u32.u16 %0, h;}"
                 : "=r"(bits)
                 : "l"((const unsigned short*)p + i));
    return T == HALF ? half_to_float(bits) : __uint_as_float(bits << 16);
  }
}
__device__ __forceinline__ int load_early(const int* p) {
  int x;
  asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(x) : "l"(p));
  return x;
}
__device__ __forceinline__ i64 load_early(const i64* p) {
  i64 x;
  asm volatile("ld.global.nc.b64 %0, [%1];" : "=l"(x) : "l"(p));
  return x;
}
__device__ __forceinline__ void load_early(const void* p, u32 (&w)[4]) {
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));
}
template <int T>
__device__ __forceinline__ void store_element(void* p, i64 i, float x) {
  if constexpr (T == FLOAT) {
    ((float*)p)[i] = x;
  } else {
    ((unsigned short*)p)[i] = (unsigned short)(T == HALF ? float_to_half(x) : float_to_bfloat(x));
  }
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int i = 16; i; i >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

// Four words from shared memory: constants that the compiler must not know to be constants, as it would move them into
// new registers at every use.
__device__ __forceinline__ void load_constants(const u32* from, u32 (&r)[4]) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(from)));
}

// ---- int8 tensor cores. Sums start at MAGIC_BITS, so that an accumulator read as a float is MAGIC + sum, exactly,
// while |sum| < 2^22: 127 * 128 * 256 for the sums of one chain here.
constexpr float MAGIC = 12582912.f;  // 1.5 * 2^23
constexpr u32 MAGIC_BITS = 0x4B400000;

struct Sums {
  u32 c[4];  // starts at MAGIC_BITS
  __device__ __forceinline__ float operator[](int i) const { return __uint_as_float(c[i]); }
};
// d = a b + c, a and b signed. Volatile keeps the order in which chains are interleaved.
__device__ __forceinline__ void mma_ss(Sums& d, const u32* a, u32 b0, u32 b1, const Sums& c) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d.c[0]), "=r"(d.c[1]), "=r"(d.c[2]), "=r"(d.c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c.c[0]), "r"(c.c[1]), "r"(c.c[2]),
        "r"(c.c[3]));
}
// b unsigned.
__device__ __forceinline__ void mma_su(Sums& d, const u32* a, u32 b0, u32 b1, const Sums& c) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d.c[0]), "=r"(d.c[1]), "=r"(d.c[2]), "=r"(d.c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c.c[0]), "r"(c.c[1]), "r"(c.c[2]),
        "r"(c.c[3]));
}

// ---- 16-bit tensor cores. d += a b, a [16 x 16] and b [16 x 8] of half (HALF) or bfloat16 (else).
template <int T>
__device__ __forceinline__ void mma_16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (T == HALF) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}
// Two floats, a in the low half, as what is nearest in 16 bits, and as what is left.
template <int T>
__device__ __forceinline__ void split_16(float a, float b, u32& high, u32& low) {
  if constexpr (T == HALF) {
    high = half2(a, b);
    low = half2(a - half_to_float(high & 0xFFFF), b - half_to_float(high >> 16));
  } else {
    high = bfloat2(a, b);
    low = bfloat2(a - __uint_as_float(high << 16), b - __uint_as_float(high & 0xFFFF0000u));
  }
}

// ---- a warp's ring of stages of STAGE_PAGES records in shared memory, in halves (K parts, V parts), filled
// asynchronously
#if __CUDA_ARCH__ >= 900 && !defined(FORGE_NO_BULK)
// Bulk copies (PTX ISA, cp.async.bulk), one per part, that complete on a barrier of their half.
template <int STAGES, int STAGE_PAGES, int K_BYTES, int V_BYTES>
struct Ring {
  u8* data;      // [STAGES][STAGE_PAGES][K_BYTES + V_BYTES], 16-byte aligned
  u32 barriers;  // [STAGES][2] of 8 bytes, shared address

  __device__ __forceinline__ void init(u8* data_, u64* barriers_, int lane) {
    data = data_;
    barriers = smem_address(barriers_);
    if (lane == 0) {
      for (int i = 0; i < 2 * STAGES; ++i)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + 8 * i) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
  }
  // half 0: K, 1: V, of the first `count` records.
  __device__ __forceinline__ void fill(int stage, int half, int count, const u8* const (&records)[STAGE_PAGES],
                                       int lane) {
    if (lane != 0 || count <= 0) return;
    const u32 barrier = barriers + 16 * stage + 8 * half;
    const u32 to = smem_address(data) + stage * STAGE_PAGES * (K_BYTES + V_BYTES) + half * K_BYTES;
    const int bytes = half ? V_BYTES : K_BYTES;
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(min(count, STAGE_PAGES) * bytes)
                 : "memory");
#pragma unroll
    for (int i = 0; i < STAGE_PAGES; ++i)
      if (i < count)
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
                "r"(to + i * (K_BYTES + V_BYTES)),
            "l"(records[i] + half * K_BYTES), "r"(bytes), "r"(barrier), "l"(policy)
            : "memory");
  }
  __device__ __forceinline__ void wait(int stage, int half, u32 phase) {
    asm volatile(
        "{\n.reg .pred P1;\nW_%=:\nmbarrier.try_wait.parity.shared::cta.b64 P1, [%0], %1;\n@P1 bra D_%=;\nbra W_%=;\nD_%=:\n}" ::
            "r"(barriers + 16 * stage + 8 * half),
        "r"(phase)
        : "memory");
  }
};
#else
// 16-byte cp.async by every lane. Each fill commits one group, empty or not, so that a wait is for a fixed distance.
template <int STAGES, int STAGE_PAGES, int K_BYTES, int V_BYTES>
struct Ring {
  u8* data;
  __device__ __forceinline__ void init(u8* data_, u64*, int) { data = data_; }
  __device__ __forceinline__ void fill(int stage, int half, int count, const u8* const (&records)[STAGE_PAGES],
                                       int lane) {
    const int bytes = half ? V_BYTES : K_BYTES;
#pragma unroll
    for (int i = 0; i < STAGE_PAGES; ++i)
      if (i < count) {
        const u32 to = smem_address(data) + (stage * STAGE_PAGES + i) * (K_BYTES + V_BYTES) + half * K_BYTES;
        for (int at = lane * 16; at < bytes; at += 512)
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + at), "l"(records[i] + half * K_BYTES + at)
                       : "memory");
      }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  __device__ __forceinline__ void wait(int, int, u32) {
    asm volatile("cp.async.wait_group %0;" ::"n"(2 * STAGES - 1) : "memory");
    __syncwarp();
  }
};
#endif
