// Threads kept alive between calls: PyTorch's own where it is loaded (Linux), else this library's.
#pragma once

#include <cstdint>
#include <functional>

namespace forge {

// Calls body(item) for every item in [0, items), spread over at most `threads` threads; returns when all are done.
// Which thread takes an item is not fixed, so an item's result must not depend on it.
void parallel_for(int64_t items, int threads, const std::function<void(int64_t)>& body);

// Of `heads` neighbouring heads with `runs` pieces of work each, how many one piece takes together: as many as leave
// every thread four pieces.
inline int together(int heads, int64_t runs, int threads) {
  int taken = heads;
  while (taken > 1 && runs * ((heads + taken - 1) / taken) < 4 * int64_t(threads)) taken = (taken + 1) / 2;
  return taken;
}

// Whether parallel_for runs on PyTorch's threads as of now.
bool shares_torch_threads();

// 64-byte aligned memory of the calling thread, at least `bytes`, kept between calls; each slot is separate.
void* thread_scratch(int slot, size_t bytes);

}  // namespace forge
