// New tokens behind the exact ones of every row, whose lengths lie on the device. One CTA per row.
#include "common.cuh"

constexpr int THREADS = 256;

FORGE_KERNEL(THREADS) append_tokens(FORGE_PARAMS p) {
  const int row = blockIdx.x, at = p.lengths[row];
  __syncthreads();
  if (at + p.n > p.capacity) return;  // the caller makes room; nothing else is overwritten if it did not
  for (int i = threadIdx.x; i < p.heads * p.n * p.words; i += THREADS) {
    const int word = i % p.words, token = i / p.words % p.n, head = i / p.words / p.n;
    const i64 k_from = row * p.k_stride[0] + head * p.k_stride[1] + token * p.k_stride[2] + 4 * word;
    const i64 v_from = row * p.v_stride[0] + head * p.v_stride[1] + token * p.v_stride[2] + 4 * word;
    const i64 k_to = row * p.to_k_stride[0] + head * p.to_k_stride[1] + (at + token) * p.to_k_stride[2] + 4 * word;
    const i64 v_to = row * p.to_v_stride[0] + head * p.to_v_stride[1] + (at + token) * p.to_v_stride[2] + 4 * word;
    *(u32*)(p.to_k + k_to) = *(const u32*)(p.k + k_from);
    *(u32*)(p.to_v + v_to) = *(const u32*)(p.v + v_from);
  }
  if (threadIdx.x == 0) p.lengths[row] = at + p.n;
}
