#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace fa {
namespace {

// Waiting threads look for work this long before they sleep: longer than the gap between two phases of a call, shorter than
// what another library's threads would notice.
constexpr std::chrono::microseconds SPIN{30};

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// A call opens a gate; workers that pass it in time take items, and the caller closes it when no item is left. So a worker
// that the scheduler wakes late, or not at all, delays nobody.
class Pool {
 public:
  void run(int64_t items, int threads, const std::function<void(int64_t, int)>& body) {
    std::lock_guard<std::mutex> one_call(call_);
    while (int(workers_.size()) < threads - 1) {
      const int index = int(workers_.size()) + 1;
      workers_.emplace_back([this, index] { work(index); });
      workers_.back().detach();
    }
    body_ = &body;
    items_ = items;
    threads_ = threads;
    next_.store(0, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      gate_.store(((gate_.load(std::memory_order_relaxed) & ~uint64_t(CALL - 1)) + CALL) | OPEN, std::memory_order_release);
    }
    wake_.notify_all();
    take(0);
    gate_.fetch_and(~uint64_t(OPEN), std::memory_order_acq_rel);
    // A worker inside may have lost its processor to another process: after a while let the scheduler give it back.
    for (int i = 0; gate_.load(std::memory_order_acquire) & INSIDE; ++i) i < 2000 ? relax() : std::this_thread::yield();
  }

 private:
  enum : uint64_t { INSIDE = 0xFFFF, OPEN = 1 << 16, CALL = 1 << 17 };  // workers inside, open, number of the call

  void take(int thread) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < items_;) (*body_)(i, thread);
  }

  void work(int index) {
    uint64_t seen = 0;
    for (;;) {
      const auto changed = [&] { return gate_.load(std::memory_order_acquire) / CALL != seen; };
      const auto limit = std::chrono::steady_clock::now() + SPIN;
      while (!changed() && std::chrono::steady_clock::now() < limit) relax();
      if (!changed()) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, changed);
      }
      uint64_t gate = gate_.load(std::memory_order_acquire);
      seen = gate / CALL;
      while (gate & OPEN && gate / CALL == seen) {
        if (!gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) continue;
        if (index < threads_) take(index);
        gate_.fetch_sub(1, std::memory_order_release);
        break;
      }
    }
  }

  std::mutex call_, mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  std::atomic<uint64_t> gate_{0};
  std::atomic<int64_t> next_{0};
  const std::function<void(int64_t, int)>* body_ = nullptr;
  int64_t items_ = 0;
  int threads_ = 1;
};

// Never destroyed: workers may outlive static destruction. A forked child has no workers and starts a pool of its own.
std::atomic<Pool*> pool{nullptr};
std::once_flag once;

Pool& shared_pool() {
  std::call_once(once, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  return *pool;
}

struct Scratch {
  void* memory = nullptr;
  size_t bytes = 0;
  ~Scratch() { std::free(memory); }
};
thread_local Scratch scratch[4];

}  // namespace

void parallel_for(int64_t items, int threads, const std::function<void(int64_t, int)>& body) {
  if (threads > items) threads = int(items);
  if (threads > 1) {
    shared_pool().run(items, threads, body);
  } else {
    for (int64_t i = 0; i < items; ++i) body(i, 0);
  }
}

void* thread_scratch(int slot, size_t bytes) {
  Scratch& s = scratch[slot];
  if (s.bytes < bytes) {
    std::free(s.memory);
    s.bytes = 0;
    bytes = (bytes + 4095) / 4096 * 4096;
    s.memory = std::aligned_alloc(64, bytes);
    if (!s.memory) throw std::bad_alloc();
    s.bytes = bytes;
  }
  return s.memory;
}

}  // namespace fa
