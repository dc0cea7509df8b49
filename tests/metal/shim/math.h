// metal_math, metal_integer, metal_relational and metal_geometric, as far as kernels use them. The overloads for plain
// types are no templates, so that elements of writable memory convert.
#pragma once
#include <cmath>
#include <limits>

#include "vectors.h"

namespace metal {

#define MSL_UNARY(name, expression)                 \
  inline float name(float x) { return expression; } \
  inline half name(half h) {                        \
    const float x = h;                              \
    return half(expression);                        \
  }                                                 \
  template <int N>                                  \
  vec<float, N> name(const vec<float, N>& v) {      \
    vec<float, N> r;                                \
    for (int i = 0; i < N; i++) r[i] = name(v[i]);  \
    return r;                                       \
  }
MSL_UNARY(exp, std::exp(x))
MSL_UNARY(exp2, std::exp2(x))
MSL_UNARY(log, std::log(x))
MSL_UNARY(log2, std::log2(x))
MSL_UNARY(sqrt, std::sqrt(x))
MSL_UNARY(rsqrt, 1.0f / std::sqrt(x))
MSL_UNARY(floor, std::floor(x))
MSL_UNARY(ceil, std::ceil(x))
MSL_UNARY(trunc, std::trunc(x))
MSL_UNARY(round, std::round(x))
MSL_UNARY(rint, std::nearbyint(x))
MSL_UNARY(fabs, std::fabs(x))
#undef MSL_UNARY

inline bool isnan(float x) { return std::isnan(x); }
inline bool isinf(float x) { return std::isinf(x); }
inline bool isfinite(float x) { return std::isfinite(x); }
inline float pow(float x, float y) { return std::pow(x, y); }
inline float ldexp(float x, int e) { return std::ldexp(x, e); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline half fma(half a, half b, half c) { return half(std::fma(float(a), float(b), float(c))); }
template <class T, int N>
vec<T, N> fma(const vec<T, N>& a, const vec<T, N>& b, const vec<T, N>& c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = fma(a[i], b[i], c[i]);
  return r;
}

#define MSL_ORDER(T)                                                    \
  inline T max(T a, T b) { return a > b ? a : b; }                      \
  inline T min(T a, T b) { return a < b ? a : b; }                      \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); } \
  inline T max3(T a, T b, T c) { return max(max(a, b), c); }            \
  inline T select(T a, T b, bool c) { return c ? b : a; }
MSL_ORDER(char)
MSL_ORDER(uchar)
MSL_ORDER(short)
MSL_ORDER(ushort)
MSL_ORDER(int)
MSL_ORDER(uint)
MSL_ORDER(long)
MSL_ORDER(ulong)
#undef MSL_ORDER
#define MSL_ORDER(T)                                                         \
  inline T max(T a, T b) { return a != a ? b : b != b ? a : a > b ? a : b; } \
  inline T min(T a, T b) { return a != a ? b : b != b ? a : a < b ? a : b; } \
  inline T fmax(T a, T b) { return max(a, b); }                              \
  inline T fmin(T a, T b) { return min(a, b); }                              \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); }      \
  inline T max3(T a, T b, T c) { return max(max(a, b), c); }                 \
  inline T select(T a, T b, bool c) { return c ? b : a; }                    \
  inline T abs(T x) { return x < 0 ? -x : x == 0 ? T(0) : x; }
MSL_ORDER(half)
MSL_ORDER(float)
#undef MSL_ORDER
inline int abs(int x) { return x < 0 ? -x : x; }

#define MSL_VECTOR(name)                                   \
  template <class T, int N>                                \
  vec<T, N> name(const vec<T, N>& a, const vec<T, N>& b) { \
    vec<T, N> r;                                           \
    for (int i = 0; i < N; i++) r[i] = name(a[i], b[i]);   \
    return r;                                              \
  }
MSL_VECTOR(max)
MSL_VECTOR(min)
#undef MSL_VECTOR
template <class T, int N>
vec<T, N> abs(const vec<T, N>& a) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = abs(a[i]);
  return r;
}
template <class T, int N>
vec<T, N> select(const vec<T, N>& a, const vec<T, N>& b, const vec<bool, N>& c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
template <class T, int N>
T dot(const vec<T, N>& a, const vec<T, N>& b) {
  T r = a[0] * b[0];
  for (int i = 1; i < N; i++) r += a[i] * b[i];
  return r;
}
template <int N>
bool any(const vec<bool, N>& v) {
  bool r = false;
  for (int i = 0; i < N; i++) r |= v[i];
  return r;
}
template <int N>
bool all(const vec<bool, N>& v) {
  bool r = true;
  for (int i = 0; i < N; i++) r &= v[i];
  return r;
}

inline uint popcount(uint x) { return __builtin_popcount(x); }
inline uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
inline uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
inline uint extract_bits(uint x, uint offset, uint bits) {
  return bits == 0 ? 0 : x << (32 - offset - bits) >> (32 - bits);
}
inline int extract_bits(int x, uint offset, uint bits) {
  return bits == 0 ? 0 : int(uint(x) << (32 - offset - bits)) >> (32 - bits);
}

template <class T>
struct numeric_limits : std::numeric_limits<T> {};

namespace fast {
using metal::exp;
using metal::exp2;
using metal::log;
using metal::log2;
using metal::rsqrt;
using metal::sqrt;
}  // namespace fast
namespace precise {
using metal::exp;
using metal::exp2;
using metal::log;
using metal::log2;
using metal::rsqrt;
using metal::sqrt;
}  // namespace precise

}  // namespace metal

#undef INFINITY
#undef NAN
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#undef M_LOG2E_F
#undef M_LN2_F
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
