// Where the tokens of a paged engine's step lie, from its block tables: page offsets, exact blocks and the pages that
// fill. One CTA per row; ops/page_tables.py says the same in NumPy and is its oracle.
//
// A row has `past` tokens before the step and `length` after it. Packed are its pages before page `whole`: those that
// lie `window` tokens back, and those whose exact blocks are gone (block 0). All later tokens are exact. The first
// sink_blocks exact blocks stay exact: page 0 holds them last, and is the last of a row's packed pages, cut before
// them.
#include "common.cuh"

constexpr int THREADS = 128;

FORGE_KERNEL(THREADS) page_tables(FORGE_PARAMS p) {
  constexpr int PAGE = forge::PAGE;
  const int row = blockIdx.x, start = p.starts[row], end = p.starts[row + 1];
  const int length = p.lengths[row], past = max(length - (end - start), 0);
  const int* packed_table = p.packed_table + row * p.packed_stride;
  const int* exact_table = p.exact_table + row * p.exact_stride;
  const int block = p.exact_block, sinks = p.sink_blocks * block;
  const auto offset = [&](int page) {
    return packed_table[page / p.pages_per_block] * p.block_bytes + page % p.pages_per_block * p.page_bytes;
  };
  int whole = max(past - p.window, 0) / PAGE;
  for (int page = whole; page < past / PAGE; ++page)
    if (exact_table[(page * PAGE + PAGE - 1) / block] == 0) whole = page + 1;
  for (int i = threadIdx.x; i < whole; i += THREADS)
    p.page_table[row * p.max_pages + i] = offset(p.sink_blocks == 0 ? i : i + 1 < whole ? i + 1 : 0);

  const int lead = whole ? p.sink_blocks : 0, first = whole * PAGE / block;
  const int last = row < p.decode_rows ? length : past;
  const int count = min(lead + (last + block - 1) / block - first, (int)p.max_blocks);
  for (int i = threadIdx.x; i < count; i += THREADS)
    p.blocks[row * p.max_blocks + i] = exact_table[i < lead ? i : i - lead + first];
  if (threadIdx.x == 0) {
    p.packed[row] = max(whole * PAGE - sinks, 0);
    p.exact[row] = lead * block + last - whole * PAGE;
  }

  const int fill = row + start / PAGE, next = row + 1 + end / PAGE, fills = length / PAGE - past / PAGE;
  for (int i = threadIdx.x; i < (next - fill) * PAGE; i += THREADS) {
    const int page = past / PAGE + i / PAGE, at = i % PAGE;
    const bool any = i / PAGE < fills && packed_table[page / p.pages_per_block] != 0;
    if (at == 0) {
      p.fill_offsets[fill + i / PAGE] = any ? offset(page) : -1;
      if (any) p.filled[atomicAdd(p.fills, 1)] = fill + i / PAGE;
    }
    if (!any) continue;
    int token = at;  // page 0: the sinks' places, its last ones, hold copies of its last block
    if (page == 0 && sinks) token = at < PAGE - sinks ? at + sinks : PAGE - block + at % block;
    token += page * PAGE;
    p.fill_tokens[(i64)(fill + i / PAGE) * PAGE + at] =
        token < past || p.fill_exact ? -1 - (exact_table[token / block] * block + token % block) : start + token - past;
  }
}
