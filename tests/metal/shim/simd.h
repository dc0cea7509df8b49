// Barriers, simdgroup operations and simdgroup matrices. A simd operation blocks its thread until all lanes of the
// simdgroup have come to the same one.
#pragma once
#include "memory.h"
#include "vectors.h"

namespace metal {

enum class mem_flags : unsigned { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_device_and_threadgroup = 3 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return static_cast<mem_flags>(unsigned(a) | unsigned(b)); }

inline void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  msl::threadgroup_fence(line, static_cast<unsigned>(flags));
}
inline void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  msl::simd_fence(line, static_cast<unsigned>(flags));
}

namespace detail {

// Type erasure of one lane's value: T in a slot.
template <class T>
T get(const char* slot) {
  T x;
  std::memcpy(static_cast<void*>(&x), slot, sizeof x);
  return x;
}
template <class T>
void put(char* slot, const T& x) {
  std::memcpy(slot, static_cast<const void*>(&x), sizeof x);
}

// Reduces pairwise, as a butterfly of shuffles would.
template <class T, class Op>
void reduce(const char (*in)[msl::kSlotBytes], char (*out)[msl::kSlotBytes], uint32_t active) {
  T v[msl::kSimdWidth];
  unsigned n = 0;
  for (unsigned i = 0; i < msl::kSimdWidth; i++) {
    if (active >> i & 1) v[n++] = get<T>(in[i]);
  }
  for (unsigned step = 1; step < n; step *= 2) {
    for (unsigned i = 0; i + step < n; i += 2 * step) v[i] = Op::apply(v[i], v[i + step]);
  }
  for (unsigned i = 0; i < msl::kSimdWidth; i++) put(out[i], v[0]);
}

template <class T, bool Inclusive>
void prefix_sum(const char (*in)[msl::kSlotBytes], char (*out)[msl::kSlotBytes], uint32_t active) {
  T total = T(0);
  for (unsigned i = 0; i < msl::kSimdWidth && (active >> i & 1); i++) {
    const T x = get<T>(in[i]);
    put(out[i], Inclusive ? T(total + x) : total);
    total = T(total + x);
  }
}

// Each lane brings a value and the lane it wants; a lane that is not there yields a value that is wrong on sight.
template <class T>
struct Wanted {
  T value;
  uint lane;
};
template <class T>
void gather(const char (*in)[msl::kSlotBytes], char (*out)[msl::kSlotBytes], uint32_t active) {
  for (unsigned i = 0; i < msl::kSimdWidth; i++) {
    if (!(active >> i & 1)) continue;
    const uint from = get<Wanted<T>>(in[i]).lane;
    if (from < msl::kSimdWidth && (active >> from & 1))
      put(out[i], get<Wanted<T>>(in[from]).value);
    else
      std::memset(out[i], 0xff, sizeof(T));
  }
}

template <class T>
T shuffle(const char* op, int line, T value, uint lane) {
  static_assert(sizeof(Wanted<T>) <= msl::kSlotBytes, "value too large for a shuffle");
  const Wanted<T> wanted = {value, lane};
  return get<T>(msl::simd_rendezvous(op, line, &wanted, sizeof wanted, gather<T>));
}

uint lane_index();

struct Sum {
  template <class T>
  static T apply(T a, T b) {
    return T(a + b);
  }
};
struct Product {
  template <class T>
  static T apply(T a, T b) {
    return T(a * b);
  }
};
struct Max {
  template <class T>
  static T apply(T a, T b) {
    return max(a, b);
  }
};
struct Min {
  template <class T>
  static T apply(T a, T b) {
    return min(a, b);
  }
};
struct And {
  template <class T>
  static T apply(T a, T b) {
    return T(a & b);
  }
};
struct Or {
  template <class T>
  static T apply(T a, T b) {
    return T(a | b);
  }
};
struct Xor {
  template <class T>
  static T apply(T a, T b) {
    return T(a ^ b);
  }
};

}  // namespace detail

#define MSL_REDUCE(name, Op)                                                                               \
  template <class T>                                                                                       \
  T name(T x, int line = __builtin_LINE()) {                                                               \
    return detail::get<T>(msl::simd_rendezvous(#name, line, &x, sizeof x, detail::reduce<T, detail::Op>)); \
  }
MSL_REDUCE(simd_sum, Sum)
MSL_REDUCE(simd_product, Product)
MSL_REDUCE(simd_max, Max)
MSL_REDUCE(simd_min, Min)
MSL_REDUCE(simd_and, And)
MSL_REDUCE(simd_or, Or)
MSL_REDUCE(simd_xor, Xor)
#undef MSL_REDUCE

inline bool simd_any(bool x, int line = __builtin_LINE()) {
  const uint v = x;
  return detail::get<uint>(msl::simd_rendezvous("simd_any", line, &v, sizeof v, detail::reduce<uint, detail::Or>));
}
inline bool simd_all(bool x, int line = __builtin_LINE()) {
  const uint v = x;
  return detail::get<uint>(msl::simd_rendezvous("simd_all", line, &v, sizeof v, detail::reduce<uint, detail::And>));
}
template <class T>
T simd_prefix_inclusive_sum(T x, int line = __builtin_LINE()) {
  return detail::get<T>(
      msl::simd_rendezvous("simd_prefix_inclusive_sum", line, &x, sizeof x, detail::prefix_sum<T, true>));
}
template <class T>
T simd_prefix_exclusive_sum(T x, int line = __builtin_LINE()) {
  return detail::get<T>(
      msl::simd_rendezvous("simd_prefix_exclusive_sum", line, &x, sizeof x, detail::prefix_sum<T, false>));
}
template <class T>
T simd_shuffle(T x, uint lane, int line = __builtin_LINE()) {
  return detail::shuffle("simd_shuffle", line, x, lane);
}
template <class T>
T simd_broadcast(T x, uint lane, int line = __builtin_LINE()) {
  return detail::shuffle("simd_broadcast", line, x, lane);
}
template <class T>
T simd_broadcast_first(T x, int line = __builtin_LINE()) {
  return detail::shuffle("simd_broadcast_first", line, x, 0u);
}
template <class T>
T simd_shuffle_xor(T x, uint mask, int line = __builtin_LINE()) {
  return detail::shuffle("simd_shuffle_xor", line, x, detail::lane_index() ^ mask);
}
template <class T>
T simd_shuffle_down(T x, uint delta, int line = __builtin_LINE()) {
  return detail::shuffle("simd_shuffle_down", line, x, detail::lane_index() + delta);
}
template <class T>
T simd_shuffle_up(T x, uint delta, int line = __builtin_LINE()) {
  return detail::shuffle("simd_shuffle_up", line, x, detail::lane_index() - delta);
}

// An 8 x 8 matrix of which every lane holds two neighbours of one row. Which two is the layout that
// MLX's own kernels rely on (steel/gemm/mma.h).
template <class T, int Columns = 8, int Rows = 8>
class simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "simdgroup matrices are 8 x 8");

 public:
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    for (int i = 0; i < 2; i++) elements_[i] = row() == column() + i ? diagonal : T(0);
  }
  vec<T, 2>& thread_elements() { return elements_; }
  const vec<T, 2>& thread_elements() const { return elements_; }
  static int row(uint lane) { return int(lane / 4 & 4) + int(lane / 2 % 4); }
  static int column(uint lane) { return int(lane / 4 & 2) * 2 + int(lane % 2) * 2; }
  static int row() { return row(detail::lane_index()); }
  static int column() { return column(detail::lane_index()); }

 private:
  vec<T, 2> elements_;
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <class T, int Columns, int Rows>
simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> m;
  m.thread_elements() = vec<T, 2>(value);
  return m;
}

namespace detail {
template <class D, class A, class B, class C>
struct Operands {
  vec<A, 2> a;
  vec<B, 2> b;
  vec<C, 2> c;
};
// d = a b + c in float, rounded to D.
template <class D, class A, class B, class C>
void multiply(const char (*in)[msl::kSlotBytes], char (*out)[msl::kSlotBytes], uint32_t) {
  using M = simdgroup_matrix<float, 8, 8>;
  float a[8][8], b[8][8], c[8][8];
  for (unsigned lane = 0; lane < msl::kSimdWidth; lane++) {
    const auto o = get<Operands<D, A, B, C>>(in[lane]);
    for (int i = 0; i < 2; i++) {
      a[M::row(lane)][M::column(lane) + i] = o.a[i];
      b[M::row(lane)][M::column(lane) + i] = o.b[i];
      c[M::row(lane)][M::column(lane) + i] = o.c[i];
    }
  }
  for (unsigned lane = 0; lane < msl::kSimdWidth; lane++) {
    vec<D, 2> d;
    for (int i = 0; i < 2; i++) {
      float sum = c[M::row(lane)][M::column(lane) + i];
      for (int k = 0; k < 8; k++) sum += a[M::row(lane)][k] * b[k][M::column(lane) + i];
      d[i] = D(sum);
    }
    put(out[lane], d);
  }
}
}  // namespace detail

template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                   const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c,
                                   int line = __builtin_LINE()) {
  const detail::Operands<D, A, B, C> operands = {a.thread_elements(), b.thread_elements(), c.thread_elements()};
  d.thread_elements() = detail::get<vec<D, 2>>(msl::simd_rendezvous("simdgroup_multiply_accumulate", line, &operands,
                                                                    sizeof operands, detail::multiply<D, A, B, C>));
}
template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                        const simdgroup_matrix<B, 8, 8>& b, int line = __builtin_LINE()) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)), line);
}
template <class T, class U, msl::Space S>
void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, msl::ptr<U, S> source, ulong elements_per_row = 8,
                    ulong2 origin = ulong2(0ul), bool transpose = false, int line = __builtin_LINE()) {
  static_assert(std::is_same<std::remove_const_t<U>, T>::value, "a matrix loads elements of its own type");
  msl::simd_rendezvous("simdgroup_load", line, nullptr, 0, nullptr);
  for (int i = 0; i < 2; i++) {
    const ulong r = m.row(), c = m.column() + i;
    m.thread_elements()[i] =
        (source + ((origin.y + (transpose ? c : r)) * elements_per_row + origin.x + (transpose ? r : c))).load();
  }
}
template <class T, msl::Space S>
void simdgroup_store(const simdgroup_matrix<T, 8, 8>& m, msl::ptr<T, S> target, ulong elements_per_row = 8,
                     ulong2 origin = ulong2(0ul), bool transpose = false, int line = __builtin_LINE()) {
  msl::simd_rendezvous("simdgroup_store", line, nullptr, 0, nullptr);
  for (int i = 0; i < 2; i++) {
    const ulong r = m.row(), c = m.column() + i;
    (target + ((origin.y + (transpose ? c : r)) * elements_per_row + origin.x + (transpose ? r : c)))
        .store(m.thread_elements()[i]);
  }
}

}  // namespace metal
