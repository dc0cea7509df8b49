#include "runtime.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <sys/mman.h>
#if defined(__x86_64__) && !defined(MSL_UCONTEXT)
#define MSL_OWN_SWITCH
#else
#include <ucontext.h>
#endif

namespace msl {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 16 * 1024;

#if defined(MSL_OWN_SWITCH)
struct Context {
  void* sp = nullptr;
};
extern "C" void msl_switch(void** save, void* load);
asm(R"(
.text
.globl msl_switch
.hidden msl_switch
.type msl_switch, @function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size msl_switch, .-msl_switch
)");
void switch_context(Context& from, Context& to) { msl_switch(&from.sp, to.sp); }
void make_context(Context& c, char* stack, size_t bytes, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // a return address keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;  // the saved registers
  c.sp = top;
}
#else
struct Context {
  ucontext_t u;
};
void switch_context(Context& from, Context& to) { swapcontext(&from.u, &to.u); }
void make_context(Context& c, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&c.u);
  c.u.uc_stack.ss_sp = stack;
  c.u.uc_stack.ss_size = bytes;
  c.u.uc_link = nullptr;
  makecontext(&c.u, entry, 0);
}
#endif

enum State { kRunnable, kAtSimd, kAtBarrier, kDone };

struct Thread {
  Context context;
  ThreadIds ids;
  State state;
  const char* op;
  int line;
  Combine combine;
  unsigned spaces;
};

struct Simdgroup {
  alignas(64) char in[kSimdWidth][kSlotBytes];
  alignas(64) char out[kSimdWidth][kSlotBytes];
  uint32_t epoch[3];
};

Launch* g_launch;
ThreadMain g_main;
Context g_scheduler;
Thread g_threads[kMaxThreads];
Simdgroup g_simdgroups[kMaxThreads / kSimdWidth];
Thread* g_self;
uint32_t g_group;  // counts threadgroups over all launches, from 1
uint32_t g_group_epoch[3];
bool g_failed;
char* g_stacks;
size_t g_declared_bytes;  // of threadgroup variables in this launch
uint32_t g_launch_number;

void format_failure(const char* kind, const char* format, va_list args) {
  std::snprintf(g_launch->error_kind, sizeof g_launch->error_kind, "%s", kind);
  int n = std::vsnprintf(g_launch->error, sizeof g_launch->error, format, args);
  if (g_self && n >= 0 && size_t(n) < sizeof g_launch->error) {
    const ThreadIds& t = g_self->ids;
    std::snprintf(g_launch->error + n, sizeof g_launch->error - n, " (thread %u of threadgroup [%u, %u, %u])",
                  t.thread_index_in_threadgroup, t.threadgroup_position_in_grid.x, t.threadgroup_position_in_grid.y,
                  t.threadgroup_position_in_grid.z);
  }
  g_failed = true;
}

void fail_in_scheduler(const char* kind, const char* format, ...) {
  va_list args;
  va_start(args, format);
  format_failure(kind, format, args);
  va_end(args);
}

void fiber_entry() {
  g_main(g_launch->regions, g_self->ids);
  g_self->state = kDone;
  switch_context(g_self->context, g_scheduler);
  std::abort();  // a finished thread is never resumed
}

void block(State state) {
  g_self->state = state;
  switch_context(g_self->context, g_scheduler);
}

bool allocate_stacks() {
  if (g_stacks) return true;
  size_t each = kStackBytes + kGuardBytes;
  void* p =
      mmap(nullptr, each * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return false;
  g_stacks = static_cast<char*>(p);
  for (unsigned i = 0; i < kMaxThreads; i++) mprotect(g_stacks + i * each, kGuardBytes, PROT_NONE);
  return true;
}

void describe_lane(char* text, size_t bytes, const Thread& t) {
  if (t.state == kDone)
    std::snprintf(text, bytes, "has returned");
  else
    std::snprintf(text, bytes, "is at %s, line %d", t.op, t.line);
}

// Runs a simdgroup until every lane has returned or waits at a threadgroup barrier.
void run_simdgroup(unsigned first, unsigned count) {
  Simdgroup& group = g_simdgroups[first / kSimdWidth];
  while (true) {
    for (unsigned i = first; i < first + count; i++) {
      if (g_threads[i].state != kRunnable) continue;
      g_self = &g_threads[i];
      switch_context(g_scheduler, g_self->context);
      if (g_failed) return;
    }
    g_self = nullptr;
    unsigned leader = first;
    while (leader < first + count && g_threads[leader].state != kAtSimd) leader++;
    if (leader == first + count) return;
    Thread& lead = g_threads[leader];
    for (unsigned i = first; i < first + count; i++) {
      Thread& t = g_threads[i];
      if (t.state == kAtSimd && t.op == lead.op && t.line == lead.line && t.combine == lead.combine) continue;
      char other[128];
      describe_lane(other, sizeof other, t);
      g_self = &t;
      fail_in_scheduler("simd_divergence", "%s, line %d, expected the whole simdgroup; lane %u waits there, lane %u %s",
                        lead.op, lead.line, leader - first, i - first, other);
      return;
    }
    if (lead.combine) lead.combine(group.in, group.out, count == 32 ? ~0u : (1u << count) - 1);
    for (unsigned s = 0; s < 3; s++) group.epoch[s] += (lead.spaces >> s) & 1;
    for (unsigned i = first; i < first + count; i++) g_threads[i].state = kRunnable;
  }
}

void run_threadgroup(unsigned threads) {
  while (true) {
    for (unsigned first = 0; first < threads; first += kSimdWidth) {
      run_simdgroup(first, threads - first < kSimdWidth ? threads - first : kSimdWidth);
      if (g_failed) return;
    }
    unsigned waiting = 0, leader = 0;
    for (unsigned i = 0; i < threads; i++) {
      if (g_threads[i].state == kAtBarrier && waiting++ == 0) leader = i;
    }
    if (waiting == 0) return;
    Thread& lead = g_threads[leader];
    for (unsigned i = 0; i < threads; i++) {
      Thread& t = g_threads[i];
      if (t.state == kAtBarrier && t.line == lead.line) continue;
      char other[128];
      describe_lane(other, sizeof other, t);
      g_self = &t;
      fail_in_scheduler("barrier_divergence",
                        "threadgroup_barrier, line %d, expected every thread of the threadgroup; "
                        "thread %u waits there, thread %u %s",
                        lead.line, leader, i, other);
      return;
    }
    for (unsigned s = 0; s < 3; s++) g_group_epoch[s] += (lead.spaces >> s) & 1;
    for (unsigned i = 0; i < threads; i++) g_threads[i].state = kRunnable;
  }
}

uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }
uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// Prepares the threads of one threadgroup; at the far edges of the grid it is smaller (non-uniform threadgroups).
unsigned set_up_threadgroup(Dim3 group, Dim3 groups, Dim3 full) {
  const Dim3 grid = g_launch->grid;
  const Dim3 size = {smaller(full.x, grid.x - group.x * full.x), smaller(full.y, grid.y - group.y * full.y),
                     smaller(full.z, grid.z - group.z * full.z)};
  const unsigned threads = size.x * size.y * size.z;
  for (unsigned i = 0; i < threads; i++) {
    Thread& t = g_threads[i];
    const Dim3 local = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    t.ids.thread_position_in_grid = {group.x * full.x + local.x, group.y * full.y + local.y,
                                     group.z * full.z + local.z};
    t.ids.threads_per_grid = grid;
    t.ids.grid_origin = {0, 0, 0};
    t.ids.thread_position_in_threadgroup = local;
    t.ids.threadgroup_position_in_grid = group;
    t.ids.threadgroups_per_grid = groups;
    t.ids.threads_per_threadgroup = size;
    t.ids.dispatch_threads_per_threadgroup = full;
    t.ids.thread_index_in_threadgroup = i;
    t.ids.thread_index_in_simdgroup = i % kSimdWidth;
    t.ids.simdgroup_index_in_threadgroup = i / kSimdWidth;
    t.ids.simdgroups_per_threadgroup = ceil_div(threads, kSimdWidth);
    t.ids.dispatch_simdgroups_per_threadgroup = ceil_div(full.x * full.y * full.z, kSimdWidth);
    t.state = kRunnable;
    make_context(t.context, g_stacks + i * (kStackBytes + kGuardBytes) + kGuardBytes, kStackBytes, fiber_entry);
  }
  return threads;
}

bool ordered(const Region* r, uint32_t group, uint32_t group_epoch, uint32_t simd_epoch, uint16_t thread) {
  const ThreadIds& me = g_self->ids;
  if (group != g_group) return r->space == kThreadgroup;  // an older threadgroup's cell is stale, not shared
  if (thread == me.thread_index_in_threadgroup || group_epoch != g_group_epoch[r->space]) return true;
  return thread / kSimdWidth == me.simdgroup_index_in_threadgroup &&
         simd_epoch != g_simdgroups[thread / kSimdWidth].epoch[r->space];
}

unsigned long long index_of(const Region* r, const void* address) {
  return static_cast<unsigned long long>(static_cast<const char*>(address) - r->begin) / r->granule;
}

void check_written(const Region& r) {
  for (size_t i = 0; i < r.bytes / r.granule; i++) {
    if (r.cells[i].written || r.initialised) continue;
    size_t missing = 0;
    for (size_t k = i; k < r.bytes / r.granule; k++) missing += !r.cells[k].written;
    fail_in_scheduler("unwritten_output",
                      "output %s expected every element written; got %zu of %zu left, first %zu "
                      "(does the grid, counted in threads, cover the work?)",
                      r.name, missing, r.bytes / r.granule, i);
    return;
  }
}

}  // namespace

void fail(const char* kind, const char* format, ...) {
  va_list args;
  va_start(args, format);
  format_failure(kind, format, args);
  va_end(args);
  switch_context(g_self->context, g_scheduler);
  std::abort();
}

void check_access(const Region* r, const void* address, size_t bytes, size_t alignment) {
  const char* a = static_cast<const char*>(address);
  if (!r) fail("out_of_bounds", "access through a null pointer");
  if (a < r->begin || a + bytes > r->begin + r->bytes) {
    fail("out_of_bounds", "%s: access of %zu bytes at byte %lld of %zu", r->name, bytes,
         static_cast<long long>(a - r->begin), r->bytes);
  }
  if (reinterpret_cast<uintptr_t>(a) % alignment) {
    fail("misaligned", "%s: access of %zu bytes at byte %lld, which is no multiple of %zu", r->name, bytes,
         static_cast<long long>(a - r->begin), alignment);
  }
}

void note_read(const Region* r, const void* address, size_t bytes) {
  const size_t first = index_of(r, address), last = index_of(r, static_cast<const char*>(address) + bytes - 1);
  const uint16_t me = g_self->ids.thread_index_in_threadgroup;
  const uint32_t simdgroup = me / kSimdWidth, simd_epoch = g_simdgroups[simdgroup].epoch[r->space];
  const uint32_t group_epoch = g_group_epoch[r->space];
  for (size_t i = first; i <= last; i++) {
    Cell& c = r->cells[i];
    const bool present = r->space == kThreadgroup ? c.written && c.write_group == g_group : c.written || r->initialised;
    if (!present) fail("uninitialised", "%s: element %zu is read before it is written", r->name, i);
    if (c.written && !ordered(r, c.write_group, c.write_group_epoch, c.write_simd_epoch, c.write_thread)) {
      fail("race", "%s: element %zu is read here and written by thread %u with no barrier between", r->name, i,
           unsigned(c.write_thread));
    }
    if (!c.read || c.read_group != g_group || c.read_group_epoch != group_epoch) {
      c.read = true;
      c.read_group = g_group;
      c.read_group_epoch = group_epoch;
      c.read_simdgroups = 0;
      c.read_by_many = false;
      c.read_simd_epoch = simd_epoch;
      c.read_thread = me;
    } else if (c.read_thread / kSimdWidth != simdgroup || c.read_simd_epoch != simd_epoch) {
      c.read_by_many = false;  // other simdgroups are remembered in read_simdgroups
      c.read_simd_epoch = simd_epoch;
      c.read_thread = me;
    } else if (c.read_thread != me) {
      c.read_by_many = true;
    }
    c.read_simdgroups |= 1u << simdgroup;
  }
}

void note_write(const Region* r, const void* address, size_t bytes) {
  const size_t first = index_of(r, address), last = index_of(r, static_cast<const char*>(address) + bytes - 1);
  const uint16_t me = g_self->ids.thread_index_in_threadgroup;
  const uint32_t simdgroup = me / kSimdWidth, simd_epoch = g_simdgroups[simdgroup].epoch[r->space];
  const uint32_t group_epoch = g_group_epoch[r->space];
  for (size_t i = first; i <= last; i++) {
    Cell& c = r->cells[i];
    if (c.written && !ordered(r, c.write_group, c.write_group_epoch, c.write_simd_epoch, c.write_thread)) {
      fail("race", "%s: element %zu is written here and by thread %u with no barrier between", r->name, i,
           unsigned(c.write_thread));
    }
    bool clash = false;
    if (c.read && c.read_group != g_group) {
      clash = r->space == kDevice;
    } else if (c.read && c.read_group_epoch == group_epoch) {
      clash = (c.read_simdgroups & ~(1u << simdgroup)) != 0;
      const bool same_phase = c.read_thread / kSimdWidth == simdgroup && c.read_simd_epoch == simd_epoch;
      clash |= same_phase && (c.read_by_many || c.read_thread != me);
    }
    if (clash)
      fail("race", "%s: element %zu is written here and read by another thread with no barrier between", r->name, i);
    c.written = true;
    c.write_group = g_group;
    c.write_group_epoch = group_epoch;
    c.write_simd_epoch = simd_epoch;
    c.write_thread = me;
  }
}

const char* simd_rendezvous(const char* op, int line, const void* in, size_t bytes, Combine combine) {
  Thread& t = *g_self;
  Simdgroup& group = g_simdgroups[t.ids.simdgroup_index_in_threadgroup];
  const unsigned lane = t.ids.thread_index_in_simdgroup;
  if (bytes) std::memcpy(group.in[lane], in, bytes);
  t.op = op;
  t.line = line;
  t.combine = combine;
  t.spaces = 0;
  block(kAtSimd);
  return group.out[lane];
}

void simd_fence(int line, unsigned spaces) {
  Thread& t = *g_self;
  t.op = "simdgroup_barrier";
  t.line = line;
  t.combine = nullptr;
  t.spaces = spaces;
  block(kAtSimd);
}

void threadgroup_fence(int line, unsigned spaces) {
  Thread& t = *g_self;
  t.op = "threadgroup_barrier";
  t.line = line;
  t.combine = nullptr;
  t.spaces = spaces;
  block(kAtBarrier);
}

void declare_threadgroup(Region* region) {
  g_declared_bytes += region->bytes;
  if (g_declared_bytes > kThreadgroupMemory) {
    fail("threadgroup_memory", "%s: %zu bytes of threadgroup memory declared, at most %zu", region->name,
         g_declared_bytes, kThreadgroupMemory);
  }
}

uint32_t launch_number() { return g_launch_number; }

int run(Launch* launch, ThreadMain thread_main) {
  g_launch_number++;
  g_declared_bytes = 0;
  g_launch = launch;
  g_main = thread_main;
  g_failed = false;
  g_self = nullptr;
  const Dim3 grid = launch->grid;
  // As MLX does before it dispatches.
  const Dim3 full = {smaller(launch->threadgroup.x, grid.x), smaller(launch->threadgroup.y, grid.y),
                     smaller(launch->threadgroup.z, grid.z)};
  const uint64_t threads = uint64_t(launch->threadgroup.x) * launch->threadgroup.y * launch->threadgroup.z;
  if (threads == 0 || threads > kMaxThreads || full.x == 0 || full.y == 0 || full.z == 0) {
    fail_in_scheduler("launch",
                      "expected a non-empty grid and 1 to %u threads per threadgroup; got grid [%u, %u, %u], "
                      "threadgroup [%u, %u, %u]",
                      kMaxThreads, grid.x, grid.y, grid.z, launch->threadgroup.x, launch->threadgroup.y,
                      launch->threadgroup.z);
    return 1;
  }
  if (!allocate_stacks()) {
    fail_in_scheduler("launch", "no memory for %u stacks", kMaxThreads);
    return 1;
  }
  const Dim3 groups = {ceil_div(grid.x, full.x), ceil_div(grid.y, full.y), ceil_div(grid.z, full.z)};
  for (uint32_t z = 0; z < groups.z; z++) {
    for (uint32_t y = 0; y < groups.y; y++) {
      for (uint32_t x = 0; x < groups.x; x++) {
        g_group++;
        run_threadgroup(set_up_threadgroup({x, y, z}, groups, full));
        if (g_failed) return 1;
      }
    }
  }
  g_self = nullptr;
  for (uint32_t i = 0; i < launch->region_count && !g_failed; i++) {
    if (launch->regions[i].cells) check_written(launch->regions[i]);
  }
  return g_failed;
}

}  // namespace msl

namespace metal {
namespace detail {
unsigned lane_index() { return msl::g_self->ids.thread_index_in_simdgroup; }
}  // namespace detail
}  // namespace metal

// The compiler's own checks of thread-private arrays and shifts (-fsanitize=bounds,shift-exponent,...) report here.
namespace {
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
[[noreturn]] void sanitizer(const void* data, const char* what) {
  const auto* at = static_cast<const SourceLocation*>(data);
  msl::fail("undefined", "%s at line %u, column %u", what, at->line, at->column);
}
}  // namespace
extern "C" {
void __ubsan_handle_out_of_bounds(void* data, void*) { sanitizer(data, "index outside a thread-private array"); }
void __ubsan_handle_shift_out_of_bounds(void* data, void*, void*) {
  sanitizer(data, "shift by more bits than there are");
}
void __ubsan_handle_divrem_overflow(void* data, void*, void*) { sanitizer(data, "division by zero"); }
}
