#include "thread_pool.h"

#include <dlfcn.h>
#include <pthread.h>
#if defined(__linux__)
#include <link.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace forge {
namespace {

// Waiting threads look for work this long before they sleep: longer than the gap between two phases of a call, shorter
// than what another library's threads would notice.
constexpr std::chrono::microseconds SPIN{30};

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// A call opens a gate; workers that pass it in time take items, and the caller closes it when no item is left. So a
// worker that the scheduler wakes late, or not at all, delays nobody.
class Pool {
 public:
  void run(int64_t items, int threads, const std::function<void(int64_t)>& body) {
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
      gate_.store(((gate_.load(std::memory_order_relaxed) & ~uint64_t(CALL - 1)) + CALL) | OPEN,
                  std::memory_order_release);
    }
    wake_.notify_all();
    take();
    gate_.fetch_and(~uint64_t(OPEN), std::memory_order_acq_rel);
    // A worker inside may have lost its processor to another process: after a while let the scheduler give it back.
    for (int i = 0; gate_.load(std::memory_order_acquire) & INSIDE; ++i) i < 2000 ? relax() : std::this_thread::yield();
  }

 private:
  enum : uint64_t { INSIDE = 0xFFFF, OPEN = 1 << 16, CALL = 1 << 17 };  // workers inside, open, number of the call

  void take() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < items_;) (*body_)(i);
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
        if (index < threads_) take();
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
  const std::function<void(int64_t)>* body_ = nullptr;
  int64_t items_ = 0;
  int threads_ = 1;
};

// Never destroyed: workers may outlive static destruction. A forked child has no workers and starts a pool of its own.
std::atomic<Pool*> pool{nullptr};
std::atomic<bool> forked{false};
std::once_flag once;

Pool& shared_pool() {
  std::call_once(once, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] {
      pool = new Pool;
      forked = true;
    });
  });
  return *pool;
}

// The OpenMP runtime that PyTorch runs on, once PyTorch is loaded. Its threads spin for milliseconds after each of
// PyTorch's operations, and threads of another pool would fight with them for the processors.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*max_threads)() = nullptr;
};

const OpenMP* torch_openmp() {
#if defined(__linux__)
  static std::mutex mutex;
  static OpenMP found;
  static std::atomic<const OpenMP*> usable{nullptr};
  static unsigned long long searched = 0;
  if (const OpenMP* known = usable.load(std::memory_order_acquire)) return known;
  std::lock_guard<std::mutex> lock(mutex);
  unsigned long long loaded = 0;  // libraries loaded so far: without a new one there is nothing new to find
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) { return *static_cast<unsigned long long*>(out) = info->dlpi_adds, 1; },
      &loaded);
  if (loaded == searched) return nullptr;
  searched = loaded;
  void* torch =
      dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);  // symbols of what it depends on are found through it
  if (!torch) return nullptr;
  found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(torch, "GOMP_parallel"));
  found.max_threads = reinterpret_cast<decltype(found.max_threads)>(dlsym(torch, "omp_get_max_threads"));
  if (!found.parallel || !found.max_threads) return nullptr;
  usable.store(&found, std::memory_order_release);
  return &found;
#else
  return nullptr;
#endif
}

struct Job {
  const std::function<void(int64_t)>& body;
  int64_t items;
  int threads;
  std::atomic<int64_t> next{0};
  std::atomic<int> came{0};

  void take() {
    if (came.fetch_add(1, std::memory_order_relaxed) >= threads) return;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(i);
  }
};

struct Scratch {
  void* memory = nullptr;
  size_t bytes = 0;
  ~Scratch() { std::free(memory); }
};
thread_local Scratch scratch[4];

}  // namespace

void parallel_for(int64_t items, int threads, const std::function<void(int64_t)>& body) {
  Pool& own = shared_pool();
  if (threads > items) threads = int(items);
  // A forked child has none of its parent's threads, and the runtime would wait for them.
  const OpenMP* openmp = threads > 1 && !forked ? torch_openmp() : nullptr;
  const int team = openmp ? openmp->max_threads() : 0;
  if (threads > 1 && threads <= team) {
    // All of them, though some may have nothing to do: for a smaller team the runtime would end threads and start them
    // again.
    Job job{body, items, threads};
    openmp->parallel([](void* data) { static_cast<Job*>(data)->take(); }, &job, unsigned(team), 0);
    return;
  }
  if (threads > 1) {
    own.run(items, threads, body);
  } else {
    for (int64_t i = 0; i < items; ++i) body(i);
  }
}

bool shares_torch_threads() { return !forked && torch_openmp(); }

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

}  // namespace forge
