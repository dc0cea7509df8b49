// The byte layout of a page record (docs/format.md), for C++17, CUDA and Metal. Its NumPy twin is codec/packing.py.
#pragma once

#if defined(__METAL_VERSION__)
#define FORGE_FN inline
#define FORGE_LOCAL thread
typedef uint forge_u32;
#else
#if defined(__CUDACC__)
#define FORGE_FN __host__ __device__ __forceinline__
#else
// Always inlined: one binary holds files compiled for different instruction sets, which must not share a function body.
#define FORGE_FN inline __attribute__((always_inline))
#endif
#define FORGE_LOCAL
typedef unsigned int forge_u32;
#endif

#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define FORGE_UNROLL _Pragma("GCC unroll 4")
#else
#define FORGE_UNROLL _Pragma("unroll")
#endif

namespace forge {

enum { PAGE = 64, LANES = 32, HEADER_BYTES = 32, LOG8_STEPS = 32 };
enum Code { SCALAR = 0, TRELLIS4 = 1, TRELLIS8 = 2 };
enum ScaleFormat { FP16 = 0, LOG8 = 1 };

// Sizes and offsets in bytes; dim is padded_dim, a multiple of 32.
constexpr FORGE_FN int code_bytes(int dim, int bits) { return PAGE * dim * bits / 8; }
constexpr FORGE_FN int scale_bytes(int scales) { return scales == FP16 ? 2 * PAGE : PAGE; }
constexpr FORGE_FN int k_scale_offset(int dim, int k_bits) { return code_bytes(dim, k_bits); }
constexpr FORGE_FN int mean_offset(int dim, int k_bits, int scales) {
  return code_bytes(dim, k_bits) + scale_bytes(scales);
}
constexpr FORGE_FN int v_offset(int dim, int k_bits, int scales) { return mean_offset(dim, k_bits, scales) + dim; }
constexpr FORGE_FN int v_scale_offset(int dim, int k_bits, int v_bits, int scales) {
  return v_offset(dim, k_bits, scales) + code_bytes(dim, v_bits);
}
constexpr FORGE_FN int record_bytes(int dim, int k_bits, int v_bits, int scales) {
  return v_scale_offset(dim, k_bits, v_bits, scales) + scale_bytes(scales);
}

// A lane's codes: `units` units of 32 codes, a unit being `bits` words; units lie side by side in chunks of `chunk`.
constexpr FORGE_FN int units(int dim) { return dim / 16; }
constexpr FORGE_FN int chunk(int dim) { return units(dim) % 4 == 0 ? 4 : 2; }
// Index of a 32-bit word among a side's codes.
constexpr FORGE_FN int word_index(int dim, int bits, int lane, int unit, int word) {
  return ((unit / chunk(dim) * bits + word) * LANES + lane) * chunk(dim) + unit % chunk(dim);
}

// Where the code e (0..7) of nibble word n (0..3) of a unit belongs; lane = 4 g + t. It is the unit's code 4 e + n.
constexpr FORGE_FN int k_token(int dim, int lane, int unit, int n) {
  return (lane >> 3) * 16 + 2 * ((4 * unit + n) / (dim / 32)) + (lane >> 2 & 1);
}
constexpr FORGE_FN int k_channel(int dim, int lane, int unit, int n, int e) {
  return (lane & 3) * (dim / 4) + 8 * ((4 * unit + n) % (dim / 32)) + e;
}
constexpr FORGE_FN int v_token(int lane, int n, int e) { return (lane & 3) * 16 + 4 * n + (e & 3); }
constexpr FORGE_FN int v_channel(int lane, int unit, int e) { return 16 * unit + (lane >> 2) + 8 * (e >> 2); }

// Bits of `a` where the mask is set, of `b` elsewhere: one instruction of three inputs where there is one.
template <class W>
FORGE_FN W choose(forge_u32 mask, W a, W b) {
#if defined(__CUDA_ARCH__)
  W out;  // nvcc makes it two by itself
  asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(out) : "r"(a), "r"(b), "r"(mask));
  return out;
#else
  return ((a ^ b) & mask) ^ b;
#endif
}
template <class W>
FORGE_FN W rotate_left(W x, int by) {
  return (x << by) | (x >> (32 - by));
}

// Path bits of a unit, code t in bit t -> c1 c0 of the codes 0, 2, 4.. and 1, 3, 5.. in pairs of bits: code t's in the
// bits t + 1, t of `even` or t, t - 1 of `odd`. Shifting a circle is rotating its word. Ungerboeck's codes with 4 and 8
// states (codec/codebook.py, TRELLIS_TAPS).
template <int CODE, class W>
FORGE_FN void path_pairs(const W u, FORGE_LOCAL W& even, FORGE_LOCAL W& odd) {
  const W one_back = rotate_left(u, 1), two_back = rotate_left(u, 2);
  if constexpr (CODE == TRELLIS4) {
    const W c1 = u ^ two_back;
    even = choose(0xAAAAAAAAu, W(c1 << 1), one_back);
    odd = choose(0xAAAAAAAAu, c1, u);
  } else {
    const W c1 = u ^ one_back ^ rotate_left(u, 3);
    even = choose(0xAAAAAAAAu, W(c1 << 1), two_back);
    odd = choose(0xAAAAAAAAu, c1, one_back);
  }
}

// Words of a unit to four nibble words of level indices, eight to a word, first code in the low nibble. W is a 32-bit
// unsigned word or a vector of them: the same shifts serve scalars, SIMD registers and GPU threads.
template <int BITS, int CODE, class W>
FORGE_FN void unit_nibbles(const FORGE_LOCAL W (&w)[BITS], FORGE_LOCAL W (&n)[4]) {
  if constexpr (BITS == 4) {
    for (int k = 0; k < 4; ++k) n[k] = w[k];
  } else if constexpr (BITS == 3 && CODE == SCALAR) {
    n[0] = w[0] & 0x77777777u;
    n[1] = w[1] & 0x77777777u;
    n[2] = w[2] & 0x77777777u;
    n[3] = ((w[0] >> 3) & 0x11111111u) | ((w[1] >> 2) & 0x22222222u) | ((w[2] >> 1) & 0x44444444u);
  } else if constexpr (CODE == SCALAR) {
    n[0] = w[0] & 0x33333333u;
    n[1] = (w[0] >> 2) & 0x33333333u;
    n[2] = w[1] & 0x33333333u;
    n[3] = (w[1] >> 2) & 0x33333333u;
  } else {
    W even, odd;
    path_pairs<CODE>(w[0], even, odd);
    if constexpr (BITS == 3) {
      n[0] = choose(0xCCCCCCCCu, w[1], even);
      n[1] = choose(0xCCCCCCCCu, w[2], odd);
      n[2] = choose(0xCCCCCCCCu, W(w[1] << 2), W(even >> 2));
      n[3] = choose(0xCCCCCCCCu, W(w[2] << 2), W(odd >> 2));
    } else {
      n[0] = ((w[1] << 2) & 0x44444444u) | (even & 0x33333333u);
      n[1] = ((w[1] << 1) & 0x44444444u) | (odd & 0x33333333u);
      n[2] = (w[1] & 0x44444444u) | ((even >> 2) & 0x33333333u);
      n[3] = ((w[1] >> 1) & 0x44444444u) | ((odd >> 2) & 0x33333333u);
    }
  }
}

}  // namespace forge
