// The byte layout of a page record (docs/format.md), for C++17, CUDA and Metal. Its NumPy twin is codec/packing.py.
#pragma once

#if defined(__METAL_VERSION__)
#define FA_FN inline
#define FA_LOCAL thread
typedef uint fa_u32;
#else
#if defined(__CUDACC__)
#define FA_FN __host__ __device__ __forceinline__
#else
// Always inlined: one binary holds files compiled for different instruction sets, which must not share a function body.
#define FA_FN inline __attribute__((always_inline))
#endif
#define FA_LOCAL
typedef unsigned int fa_u32;
#endif

#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define FA_UNROLL _Pragma("GCC unroll 4")
#else
#define FA_UNROLL _Pragma("unroll")
#endif

namespace fa {

enum { PAGE = 64, LANES = 32, HEADER_BYTES = 32, LOG8_STEPS = 32 };
enum Code { SCALAR = 0, TRELLIS4 = 1, TRELLIS8 = 2 };
enum ScaleFormat { FP16 = 0, LOG8 = 1 };

// Sizes and offsets in bytes; dim is padded_dim, a multiple of 32.
constexpr FA_FN int code_bytes(int dim, int bits) { return PAGE * dim * bits / 8; }
constexpr FA_FN int scale_bytes(int scales) { return scales == FP16 ? 2 * PAGE : PAGE; }
constexpr FA_FN int k_scale_offset(int dim, int k_bits) { return code_bytes(dim, k_bits); }
constexpr FA_FN int mean_offset(int dim, int k_bits, int scales) { return code_bytes(dim, k_bits) + scale_bytes(scales); }
constexpr FA_FN int v_offset(int dim, int k_bits, int scales) { return mean_offset(dim, k_bits, scales) + dim; }
constexpr FA_FN int v_scale_offset(int dim, int k_bits, int v_bits, int scales) {
  return v_offset(dim, k_bits, scales) + code_bytes(dim, v_bits);
}
constexpr FA_FN int record_bytes(int dim, int k_bits, int v_bits, int scales) {
  return v_scale_offset(dim, k_bits, v_bits, scales) + scale_bytes(scales);
}

// A lane's codes: `units` units of 32 codes, a unit being `bits` words; units lie side by side in chunks of `chunk`.
constexpr FA_FN int units(int dim) { return dim / 16; }
constexpr FA_FN int chunk(int dim) { return units(dim) % 4 == 0 ? 4 : 2; }
// Index of a 32-bit word among a side's codes.
constexpr FA_FN int word_index(int dim, int bits, int lane, int unit, int word) {
  return ((unit / chunk(dim) * bits + word) * LANES + lane) * chunk(dim) + unit % chunk(dim);
}

// Where the code e (0..7) of nibble word n (0..3) of a unit belongs; lane = 4 g + t.
constexpr FA_FN int k_token(int dim, int lane, int unit, int n) {
  return (lane >> 3) * 16 + 2 * ((4 * unit + n) / (dim / 32)) + (lane >> 2 & 1);
}
constexpr FA_FN int k_channel(int dim, int lane, int unit, int n, int e) {
  return (lane & 3) * (dim / 4) + 8 * ((4 * unit + n) % (dim / 32)) + e;
}
constexpr FA_FN int v_token(int lane, int n, int e) { return (lane & 3) * 16 + 4 * n + (e & 3); }
constexpr FA_FN int v_channel(int lane, int unit, int e) { return 16 * unit + (lane >> 2) + 8 * (e >> 2); }

// Words of a unit to four nibble words of level indices, eight to a word, first code in the low nibble. W is a 32-bit
// unsigned word or a vector of them: the same shifts serve scalars, SIMD registers and GPU threads.
template <class W>
FA_FN void trellis_bits(int code, const FA_LOCAL W (&u)[4], FA_LOCAL W (&c)[4]) {
  W one_back, two_back, three_back;
  FA_UNROLL
  for (int k = 0; k < 4; ++k) {
    const W last = u[(k + 3) & 3];  // the path is a circle: before the first code come the last ones
    one_back = (u[k] << 4) | (last >> 28);
    two_back = (u[k] << 8) | (last >> 24);
    three_back = (u[k] << 12) | (last >> 20);
    // c1 c0 of the Ungerboeck codes with 4 and 8 states (codec/codebook.py, TRELLIS_TAPS)
    c[k] = code == TRELLIS4 ? ((u[k] ^ two_back) << 1) | one_back : ((u[k] ^ one_back ^ three_back) << 1) | two_back;
  }
}

template <int BITS, int CODE, class W>
FA_FN void unit_nibbles(const FA_LOCAL W (&w)[BITS], FA_LOCAL W (&n)[4]) {
  if constexpr (BITS == 4) {
    for (int k = 0; k < 4; ++k) n[k] = w[k];
  } else if constexpr (BITS == 3 && CODE == SCALAR) {
    n[0] = w[0] & 0x77777777u;
    n[1] = w[1] & 0x77777777u;
    n[2] = w[2] & 0x77777777u;
    n[3] = ((w[0] >> 3) & 0x11111111u) | ((w[1] >> 2) & 0x22222222u) | ((w[2] >> 1) & 0x44444444u);
  } else if constexpr (BITS == 3) {
    W u[4], c[4];
    u[0] = w[0] & 0x11111111u;
    u[1] = w[1] & 0x11111111u;
    u[2] = w[2] & 0x11111111u;
    u[3] = (w[2] >> 1) & 0x11111111u;
    trellis_bits(CODE, u, c);
    n[0] = (w[0] & 0xCCCCCCCCu) | c[0];
    n[1] = (w[1] & 0xCCCCCCCCu) | c[1];
    n[2] = (w[2] & 0xCCCCCCCCu) | c[2];
    n[3] = ((w[0] << 2) & 0x88888888u) | ((w[1] << 1) & 0x44444444u) | c[3];
  } else {
    W f[4];
    f[0] = w[0] & 0x33333333u;
    f[1] = (w[0] >> 2) & 0x33333333u;
    f[2] = w[1] & 0x33333333u;
    f[3] = (w[1] >> 2) & 0x33333333u;
    if constexpr (CODE == SCALAR) {
      for (int k = 0; k < 4; ++k) n[k] = f[k];
    } else {
      W u[4], c[4];
      for (int k = 0; k < 4; ++k) u[k] = f[k] & 0x11111111u;
      trellis_bits(CODE, u, c);
      for (int k = 0; k < 4; ++k) n[k] = ((f[k] << 1) & 0x44444444u) | c[k];
    }
  }
}

}  // namespace fa
