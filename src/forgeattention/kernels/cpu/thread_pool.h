// Threads kept alive between calls.
#pragma once

#include <cstdint>
#include <functional>

namespace fa {

// Calls body(item, thread) for every item in [0, items), spread over at most `threads` threads (the caller is thread 0);
// returns when all are done. Which thread takes an item is not fixed, so an item's result must not depend on it.
void parallel_for(int64_t items, int threads, const std::function<void(int64_t, int)>& body);

// 64-byte aligned memory of the calling thread, at least `bytes`, kept between calls; each slot is separate.
void* thread_scratch(int slot, size_t bytes);

}  // namespace fa
