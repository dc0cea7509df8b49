// The part of the emulator that kernels never see: threads as fibers, rendezvous, and checked memory.
#pragma once
#include <cstddef>
#include <cstdint>

namespace msl {

constexpr unsigned kSimdWidth = 32;
constexpr unsigned kMaxThreads = 1024;        // per threadgroup, as on every Apple GPU
constexpr size_t kThreadgroupMemory = 32768;  // bytes per threadgroup
constexpr size_t kSlotBytes = 64;             // the largest value one lane brings to a simd operation

enum Space : uint8_t { kDevice = 0, kThreadgroup = 1, kConstant = 2 };

struct Dim3 {
  uint32_t x, y, z;
};

// Who touched one element last. An access is ordered after another one if a barrier for that address space lies
// between them: one of the threadgroup (group epoch), or, within a simdgroup, one of the simdgroup (simd epoch).
struct Cell {
  uint32_t write_group, write_group_epoch, write_simd_epoch;
  uint32_t read_group, read_group_epoch, read_simd_epoch;
  uint32_t read_simdgroups;  // bit per simdgroup that read in read_group_epoch
  uint16_t write_thread, read_thread;
  bool written, read, read_by_many;  // read_by_many: by two or more threads in read_simd_epoch
};
static_assert(sizeof(Cell) == 36, "emulator.py allocates the cells of outputs");

// One allocation: a buffer argument, or one threadgroup variable.
struct Region {
  char* begin;
  size_t bytes;
  const char* name;
  Cell* cells;       // null for memory that the kernel can only read
  uint32_t granule;  // bytes per cell: the element size of the declaration
  Space space;
  bool initialised;             // filled before the launch (MLX's init_value)
  mutable uint64_t bytes_read;  // by all threads of the launch
};

struct ThreadIds {
  Dim3 thread_position_in_grid, threads_per_grid, grid_origin, thread_position_in_threadgroup;
  Dim3 threadgroup_position_in_grid, threadgroups_per_grid, threads_per_threadgroup, dispatch_threads_per_threadgroup;
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup;
};

struct Launch {
  Region* regions;
  uint32_t region_count;
  Dim3 grid, threadgroup;
  char error_kind[32];
  char error[1024];
};

using ThreadMain = void (*)(Region* regions, const ThreadIds& ids);
// Computes every lane's result of a simd operation from what every lane brought. active: bit per present lane.
using Combine = void (*)(const char (*in)[kSlotBytes], char (*out)[kSlotBytes], uint32_t active);

int run(Launch* launch, ThreadMain thread_main);

// All of these may be called only from a kernel thread. fail() does not come back: it ends the launch.
[[noreturn]] void fail(const char* kind, const char* format, ...);
void check_access(const Region* region, const void* address, size_t bytes, size_t alignment);
void note_read(const Region* region, const void* address, size_t bytes);
void note_write(const Region* region, const void* address, size_t bytes);
const char* simd_rendezvous(const char* op, int line, const void* in, size_t bytes, Combine combine);
void simd_fence(int line, unsigned spaces);
void threadgroup_fence(int line, unsigned spaces);
void declare_threadgroup(Region* region);
uint32_t launch_number();

}  // namespace msl
