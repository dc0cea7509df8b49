// A step's new keys and values to their places in exact blocks, and the tokens of the pages that fill to where `encode`
// reads them.
//
// Grid: tokens by TOKENS first, then one CTA per page that may fill (page_tables.cu) and head, which returns where none
// does.
#include "common.cuh"

constexpr int THREADS = 256, TOKENS = 4;

FORGE_KERNEL(THREADS) paged_append(FORGE_PARAMS p) {
  const int per_token = 2 * p.heads * p.words, writers = (p.tokens + TOKENS - 1) / TOKENS;
  const auto new_token = [&](int token, int head, int side, int word) {
    const i64* stride = side ? p.v_stride : p.k_stride;
    return (side ? p.v : p.k) + token * stride[0] + head * stride[1] + 16 * word;
  };
  const auto exact_token = [&](i64 slot, int head, int side, int word) {
    return p.cache + slot / p.exact_block * p.cache_stride[0] + slot % p.exact_block * p.cache_stride[1] +
           head * p.cache_stride[2] + 16 * (side * p.words + word);
  };
  if ((int)blockIdx.x < writers) {
    for (int i = threadIdx.x; i < TOKENS * per_token; i += THREADS) {
      const int token = blockIdx.x * TOKENS + i / per_token, rest = i % per_token;
      const int head = rest / (2 * p.words), side = rest / p.words % 2, word = rest % p.words;
      if (token >= p.tokens) break;
      const i64 slot = p.slots[token];
      if (slot >= p.exact_block)
        *(uint4*)exact_token(slot, head, side, word) = *(const uint4*)new_token(token, head, side, word);
    }
    return;
  }
  const int item = blockIdx.x - writers, fill = item / p.heads, head = item % p.heads;
  if (p.fill_offsets[fill] < 0) return;
  for (int i = threadIdx.x; i < 2 * forge::PAGE * p.words; i += THREADS) {
    const int word = i % p.words, at = i / p.words % forge::PAGE, side = i / p.words / forge::PAGE;
    const int token = p.fill_tokens[(i64)fill * forge::PAGE + at];
    const u8* from = token >= 0 ? new_token(token, head, side, word) : exact_token(-1 - token, head, side, word);
    *(uint4*)((side ? p.fill_v : p.fill_k) + head * p.fill_stride +
              16 * (((i64)fill * forge::PAGE + at) * p.words + word)) = *(const uint4*)from;
  }
}
