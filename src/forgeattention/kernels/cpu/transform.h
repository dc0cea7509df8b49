// Linear maps of whole vectors and conversions between dtypes.
#pragma once

#include "numbers.h"

namespace forge {

template <class Isa>
struct Transform {
  using F32 = typename Isa::F32;
  using I32 = typename Isa::I32;
  static constexpr int W = Isa::WORDS;

  // The butterflies of width H < W within a vector: a + b in the lower places, a - b in the upper ones.
  template <int H>
  static FORGE_INLINE F32 within(F32 x) {
    if constexpr (H < W) {
      F32 sign;
      for (int i = 0; i < W; ++i) sign[i] = i & H ? -1.0f : 1.0f;
      return within<2 * H>(x * sign + permuted<Exchanged<H>>(x));
    }
    return x;
  }
  // Butterflies of the Sylvester-Hadamard matrix on blocks of `size`, unnormalised; size is a multiple of W.
  static void butterflies(float* x, int dim, int size) {
    for (int i = 0; i < dim; i += W) put(x + i, within<1>(load<F32>(x + i)));
    int h = W;
    for (; 2 * h < size; h *= 4)  // two widths at a time, for half of the loads and stores
      for (int i = 0; i < dim; i += 4 * h)
        for (int j = i; j < i + h; j += W) {
          const F32 a = load<F32>(x + j), b = load<F32>(x + j + h), c = load<F32>(x + j + 2 * h),
                    d = load<F32>(x + j + 3 * h);
          const F32 ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
          put(x + j, ab + cd);
          put(x + j + h, a_b + c_d);
          put(x + j + 2 * h, ab - cd);
          put(x + j + 3 * h, a_b - c_d);
        }
    if (h < size)
      for (int i = 0; i < dim; i += 2 * h)
        for (int j = i; j < i + h; j += W) {
          const F32 a = load<F32>(x + j), b = load<F32>(x + j + h);
          put(x + j, a + b);
          put(x + j + h, a - b);
        }
  }

  static void hadamard(const LinearMap& m, int head, const float* x, int rows, float* y) {
    const int dim = m.dim, odd = dim % 3 ? 1 : 3, size = dim / odd;  // padded_dim is 2^n or 3 * 2^n
    const bool inverse = m.kind == LinearMap::HADAMARD_INVERSE;
    const float* signs = m.signs.data() + (m.heads == 1 ? 0 : size_t(head) * dim);
    const float norm = 1.0f / __builtin_sqrtf(float(size));
    // The orthonormal DCT-II of three points.
    const float dct[3][3] = {{0.577350269f, 0.577350269f, 0.577350269f},
                             {0.707106781f, 0.0f, -0.707106781f},
                             {0.408248290f, -0.816496581f, 0.408248290f}};
    for (int r = 0; r < rows; ++r, x += dim, y += dim) {
      for (int i = 0; i < dim; ++i) y[i] = x[i] * (inverse ? norm : norm * signs[i]);
      butterflies(y, dim, size);
      if (odd == 3)
        for (int i = 0; i < size; ++i) {
          const float a = y[i], b = y[size + i], c = y[2 * size + i];
          for (int o = 0; o < 3; ++o)
            y[o * size + i] =
                inverse ? dct[0][o] * a + dct[1][o] * b + dct[2][o] * c : dct[o][0] * a + dct[o][1] * b + dct[o][2] * c;
        }
      if (inverse)
        for (int i = 0; i < dim; ++i) y[i] *= signs[i];
    }
  }

  static void apply(const LinearMap& m, int head, const float* x, int rows, float* y) {
    if (m.kind != LinearMap::DENSE) return hadamard(m, head, x, rows, y);
    const int dim = m.dim;
    const float* columns = m.columns.data() + (m.heads == 1 ? 0 : size_t(head) * dim * dim);
    for (int r = 0; r < rows; r += 4) {
      const int n = rows - r < 4 ? rows - r : 4;
      for (int i = 0; i < dim; i += 2 * W) {
        F32 a[4][2] = {};
        for (int j = 0; j < dim; ++j) {
          const F32 c0 = load<F32>(columns + j * dim + i), c1 = load<F32>(columns + j * dim + i + W);
          for (int k = 0; k < 4; ++k) {
            const float f = k < n ? x[(r + k) * dim + j] : 0.0f;
            a[k][0] += c0 * f;
            a[k][1] += c1 * f;
          }
        }
        for (int k = 0; k < n; ++k) {
          put(y + (r + k) * dim + i, a[k][0]);
          put(y + (r + k) * dim + i + W, a[k][1]);
        }
      }
    }
  }

  static bool load_rows(const Vectors& v, int rows, int channels, int padded, float* out) {
    float worst = 0;
    for (int r = 0; r < rows; ++r, out += padded) {
      if (v.dtype == FLOAT32) {
        const float* in = static_cast<const float*>(v.base) + r * v.stride;
        for (int i = 0; i < channels; ++i) out[i] = in[i];
      } else {
        const uint16_t* in = static_cast<const uint16_t*>(v.base) + r * v.stride;
        if (v.dtype == BFLOAT16)
          for (int i = 0; i < channels; ++i) {
            const uint32_t bits = uint32_t(in[i]) << 16;
            __builtin_memcpy(out + i, &bits, 4);
          }
        else
          Isa::load_half(in, channels, out);
      }
      for (int i = channels; i < padded; ++i) out[i] = 0;
      F32 sum = F32{};
      for (int i = 0; i < channels; i += W) {
        const F32 x = load<F32>(out + i);
        sum += x * 0.0f;  // NaN exactly if some value is not finite
      }
      worst += sum_of(sum);
    }
    return worst == 0;
  }

  static void store(const float* x, int64_t count, int dtype, void* out) {
    if (dtype == FLOAT32) {
      __builtin_memcpy(out, x, count * sizeof(float));
    } else {
      uint16_t* o = static_cast<uint16_t*>(out);
      if (dtype == FLOAT16)
        for (int64_t i = 0; i < count; ++i) o[i] = float_to_half(x[i]);
      else
        for (int64_t i = 0; i < count; ++i) o[i] = float_to_bfloat(x[i]);
    }
  }
};

}  // namespace forge
