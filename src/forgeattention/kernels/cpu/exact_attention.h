// Attention over exact tokens in float32.
#pragma once

#include "transform.h"

namespace forge {

enum { EXACT_TILE = 32 };  // tokens converted to float32 at a time

template <class Isa>
struct ExactAttention {
  using F32 = typename Isa::F32;
  using I32 = typename Isa::I32;
  static constexpr int W = Isa::WORDS;

  // Scratch: keys and values of a tile, [2][EXACT_TILE][head_dim] floats.
  static void attend(int head_dim, int dim, const float* q, int rows, Vectors k, Vectors v, int tokens,
                     const int* visible, float scale, Partial out, void* scratch) {
    float* keys = static_cast<float*>(scratch);
    float* values = keys + EXACT_TILE * head_dim;
    for (int r = 0; r < rows; ++r) {
      out.max[r] = -INF;
      out.sum[r] = 0;
      for (int i = 0; i < dim; ++i) out.o[r * dim + i] = 0;
    }
    for (int first = 0; first < tokens; first += EXACT_TILE) {
      const int n = tokens - first < EXACT_TILE ? tokens - first : int(EXACT_TILE);
      const auto part = [&](const Vectors& x) {
        const size_t size = x.dtype == FLOAT32 ? 4 : 2;
        return Vectors{static_cast<const uint8_t*>(x.base) + int64_t(first) * x.stride * int64_t(size), x.stride,
                       x.dtype};
      };
      Transform<Isa>::load_rows(part(k), n, head_dim, head_dim, keys);
      Transform<Isa>::load_rows(part(v), n, head_dim, head_dim, values);
      for (int r = 0; r < rows; ++r) {
        const int seen = visible[r] - first < n ? visible[r] - first : n;
        if (seen > 0) row(head_dim, q + r * dim, keys, values, seen, scale, out.o + r * dim, out.max[r], out.sum[r]);
      }
    }
  }

  static void row(int head_dim, const float* q, const float* keys, const float* values, int tokens, float scale,
                  float* o, float& max, float& sum) {
    alignas(64) float p[EXACT_TILE];
    for (int t = 0; t < EXACT_TILE; ++t) p[t] = -INF;
    float top = max;
    for (int t = 0; t < tokens; ++t) {
      F32 a = F32{};
      for (int i = 0; i < head_dim; i += W) a += load<F32>(q + i) * load<F32>(keys + t * head_dim + i);
      p[t] = scale * sum_of(a);
      top = p[t] > top ? p[t] : top;
    }
    const float rescale = max == -INF ? 0.0f : exp2<F32, I32>(F32{} + (max - top))[0];
    F32 added = F32{};
    for (int t = 0; t < EXACT_TILE; t += W) {
      const F32 e = exp2<F32, I32>(load<F32>(p + t) - top);
      put(p + t, e);
      added += e;
    }
    max = top;
    sum = sum * rescale + sum_of(added);
    for (int i = 0; i < head_dim; i += W) {
      F32 a = load<F32>(o + i) * rescale;
      for (int t = 0; t < tokens; ++t) a += load<F32>(values + t * head_dim + i) * p[t];
      put(o + i, a);
    }
  }
};

}  // namespace forge
