// One token behind the exact ones of every row, whose lengths lie on the device, so that a graph can hold the step.
// A full row first gives up its oldest page, which was coded some steps before. One CTA per KV head and row.
//
//   before   [sinks | 64 tokens, coded | rest]      exact = capacity - 1
//   after    [sinks | rest | new token]             exact = capacity - 64, packed += 64
#include "common.cuh"

constexpr int THREADS = 256;

// Moves a head's tokens from sinks + 64 on to `sinks`. A thread's words depend on its own words alone, so that nothing
// waits for other threads.
__device__ void shift(u8* buffer, i64 token_stride, const Params& p, int held) {
  for (int i = threadIdx.x; i < 64 * p.words; i += THREADS) {
    const int token = i / p.words, word = i % p.words;
    for (int at = p.sinks + token; at + 64 < held; at += 64)
      *(u32*)(buffer + at * token_stride + 4 * word) = *(const u32*)(buffer + (at + 64) * token_stride + 4 * word);
  }
}

FORGE_KERNEL(THREADS) append_step(FORGE_PARAMS p) {
  const int head = blockIdx.x, row = blockIdx.y;
  int held = p.exact[row], packed = p.packed[row];
  u8* to_k = p.to_k + row * p.to_k_stride[0] + head * p.to_k_stride[1];
  u8* to_v = p.to_v + row * p.to_v_stride[0] + head * p.to_v_stride[1];
  if (held == p.capacity - 1) {
    shift(to_k, p.to_k_stride[2], p, held);
    shift(to_v, p.to_v_stride[2], p, held);
    held -= 64;
    packed += 64;
    __syncthreads();  // the new token's place was another thread's source
  }
  const u8* k = p.k + row * p.k_stride[0] + head * p.k_stride[1];
  const u8* v = p.v + row * p.v_stride[0] + head * p.v_stride[1];
  for (int word = threadIdx.x; word < p.words; word += THREADS) {
    *(u32*)(to_k + held * p.to_k_stride[2] + 4 * word) = *(const u32*)(k + 4 * word);
    *(u32*)(to_v + held * p.to_v_stride[2] + 4 * word) = *(const u32*)(v + 4 * word);
  }
  __syncthreads();
  // Every CTA of the row has read the lengths before the last one to come here changes them.
  if (threadIdx.x == 0 && atomicAdd(&p.tickets[row], 1) == p.heads - 1) {
    p.tickets[row] = 0;
    held += 1;
    const int page = packed / 64;
    p.exact[row] = held;
    p.packed[row] = packed;
    p.encode_offsets[row] =
        held == p.encode_at && page < p.max_pages ? p.page_table[(i64)row * p.max_pages + page] : -1;
  }
}
