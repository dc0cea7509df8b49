// Queries as packed keys are scored with them.
#pragma once

#include "ops.h"
#include "thread_pool.h"

namespace forge {

// Row `row` (head of the group, query) of a KV head's queries, rotated to `rotated` [dim], x [dim] being scratch.
// Returns what the keys' mean adds to its scores, before any scale.
inline double rotate_query(const Codec& codec, Shape shape, const Array4& q, int b, int head, int row, float* x,
                           float* rotated) {
  const Kernels& kernel = kernels();
  const int group = shape.q_heads / codec.kv_heads;
  kernel.load(q.rows(b, head * group + row / shape.n, row % shape.n), 1, codec.head_dim, codec.dim, x);
  kernel.apply(codec.query, head, x, 1, rotated);
  const float* mu = codec.mu(codec.k_mu, head);
  double offset = 0;
  for (int i = 0; mu && i < codec.dim; ++i) offset += double(x[i]) * mu[i];
  return offset;
}

// Prepares `rows` of them from `first` on for Kernels::scores, in units of `scale`.
inline void prepare_queries(const Codec& codec, Shape shape, const Array4& q, int b, int head, int first, int rows,
                            float scale, uint8_t* prepared) {
  float* x = static_cast<float*>(thread_scratch(0, 2 * size_t(codec.dim) * sizeof(float)));
  for (int r = 0; r < rows; ++r) {
    const double offset = rotate_query(codec, shape, q, b, head, first + r, x, x + codec.dim);
    kernels().prepare_query(codec, x + codec.dim, float(offset * scale), scale, prepared, r);
  }
}

}  // namespace forge
