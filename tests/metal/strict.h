// Declarations of the part of the Metal standard library that kernels use, for clang's front end: no bodies, nothing
// runs. Signatures are those of the Metal Shading Language specification (4.0; sections 2.2, 2.4, 5.4, 6.1 to 6.9) with
// the additions of the text that MLX puts before every custom kernel (mlx/backend/metal/kernels/utils.h).
//
// Two readings of the same text (strict.py):
//   STRICT_SPACES  C++ for OpenCL 2021, clang's language nearest to Metal, whose front end is a fork of clang: device,
//                  threadgroup, constant and thread are four address spaces. What has no qualifier becomes __generic,
//                  which strict.py reports, since Metal has no such space.
//   otherwise      C++14 with pedantic warnings, the base of MSL 2.0 to 3.2 (macOS 14 and 15). Address spaces are
//                  attributes, and thread is the default one.
#pragma once

#define METAL_FUNC inline
#define __METAL__ 1
#ifndef __METAL_VERSION__
#define __METAL_VERSION__ 310
#endif

#ifdef STRICT_SPACES
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define thread __private
#define device __global
#define threadgroup __local
#define STRICT_THREAD_THIS __private
// Words of OpenCL's that Metal does not reserve.
#define local strict_local
#define global strict_global
#define private strict_private
#define generic strict_generic
#define event_t strict_event_t
#else
#define thread
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define STRICT_THREAD_THIS
#define kernel
typedef _Float16 half;
#endif

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned long size_t;
typedef signed char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;
typedef half float16_t;
// bfloat converts to float by itself, and back only on request (MSL 2.1). clang converts both ways; -Wconversion of the
// second reading says where.
typedef __bf16 bfloat;
typedef bfloat bfloat16_t;

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

#define STRICT_VECTORS(T) \
  typedef vec<T, 2> T##2; \
  typedef vec<T, 3> T##3; \
  typedef vec<T, 4> T##4;
STRICT_VECTORS(char)
STRICT_VECTORS(uchar)
STRICT_VECTORS(short)
STRICT_VECTORS(ushort)
STRICT_VECTORS(int)
STRICT_VECTORS(uint)
STRICT_VECTORS(long)
STRICT_VECTORS(ulong)
STRICT_VECTORS(half)
STRICT_VECTORS(bfloat)
STRICT_VECTORS(float)
#undef STRICT_VECTORS

// Constructors of vectors: `float4(x)` with a scalar, with four scalars, with a vector of as many components of another
// type. clang has them for OpenCL and HLSL only, so each call goes to an overload.
template <class T, int N>
struct strict_of {
  static vec<T, N> make(T);
  template <class U>
  static vec<T, N> make(vec<U, N>);
};
template <class T>
struct strict_make2 : strict_of<T, 2> {
  using strict_of<T, 2>::make;
  static vec<T, 2> make(T, T);
};
template <class T>
struct strict_make4 : strict_of<T, 4> {
  using strict_of<T, 4>::make;
  static vec<T, 4> make(T, T, T, T);
  static vec<T, 4> make(vec<T, 2>, vec<T, 2>);
  static vec<T, 4> make(vec<T, 3>, T);
};
#define float2(...) strict_make2<float>::make(__VA_ARGS__)
#define float4(...) strict_make4<float>::make(__VA_ARGS__)
#define half2(...) strict_make2<half>::make(__VA_ARGS__)
#define half4(...) strict_make4<half>::make(__VA_ARGS__)
#define char4(...) strict_make4<char>::make(__VA_ARGS__)
#define uchar4(...) strict_make4<uchar>::make(__VA_ARGS__)
#define uint2(...) strict_make2<uint>::make(__VA_ARGS__)
#define uint4(...) strict_make4<uint>::make(__VA_ARGS__)

#undef INFINITY
#define INFINITY __builtin_inff()
#undef M_LOG2E_F
#undef M_LN2_F
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f

namespace metal {

template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

// Which scalars a family of functions takes.
template <class T>
struct strict_scalar {
  enum { integer = 0, floating = 0, shuffles = 0, bytes = 0 };
};
#define STRICT_SCALAR(T, INTEGER, FLOATING, SHUFFLES)                     \
  template <>                                                             \
  struct strict_scalar<T> {                                               \
    enum { integer = INTEGER, floating = FLOATING, shuffles = SHUFFLES }; \
  };
STRICT_SCALAR(char, 1, 0, 1)
STRICT_SCALAR(uchar, 1, 0, 1)
STRICT_SCALAR(short, 1, 0, 1)
STRICT_SCALAR(ushort, 1, 0, 1)
STRICT_SCALAR(int, 1, 0, 1)
STRICT_SCALAR(uint, 1, 0, 1)
STRICT_SCALAR(long, 1, 0, 0)  // integer functions take it, simdgroup functions do not
STRICT_SCALAR(ulong, 1, 0, 0)
STRICT_SCALAR(half, 0, 1, 1)
STRICT_SCALAR(float, 0, 1, 1)
STRICT_SCALAR(bfloat, 0, 1, 1)  // by MLX's text
#undef STRICT_SCALAR

// 6.2 common, 6.5 math: overloads of half and float. MLX's text adds bfloat, to which nothing converts by itself.
#define STRICT_UNARY(name) \
  half name(half);         \
  float name(float);       \
  template <int N>         \
  vec<float, N> name(vec<float, N>);
STRICT_UNARY(abs)
STRICT_UNARY(ceil)
STRICT_UNARY(exp)
STRICT_UNARY(exp2)
STRICT_UNARY(fabs)
STRICT_UNARY(floor)
STRICT_UNARY(log)
STRICT_UNARY(log2)
STRICT_UNARY(rint)
STRICT_UNARY(round)
STRICT_UNARY(rsqrt)
STRICT_UNARY(sqrt)
STRICT_UNARY(trunc)
// The two forms that a call without a namespace may mean; which one it does depends on MLX and macOS.
#define STRICT_FORMS(space) \
  namespace space {         \
  STRICT_UNARY(exp)         \
  STRICT_UNARY(exp2)        \
  STRICT_UNARY(log)         \
  STRICT_UNARY(log2)        \
  STRICT_UNARY(rsqrt)       \
  STRICT_UNARY(sqrt)        \
  }
STRICT_FORMS(fast)
STRICT_FORMS(precise)
#undef STRICT_FORMS
#undef STRICT_UNARY
#define STRICT_BINARY(name) \
  half name(half, half);    \
  float name(float, float); \
  template <int N>          \
  vec<float, N> name(vec<float, N>, vec<float, N>);
STRICT_BINARY(max)
STRICT_BINARY(min)
STRICT_BINARY(fmax)
STRICT_BINARY(fmin)
STRICT_BINARY(pow)
#undef STRICT_BINARY
half fma(half, half, half);
float fma(float, float, float);
template <int N>
vec<float, N> fma(vec<float, N>, vec<float, N>, vec<float, N>);
half clamp(half, half, half);
float clamp(float, float, float);
bool isfinite(half);
bool isfinite(float);
bool isnan(float);
bool isinf(float);

// 6.4 integer: one type for all arguments
template <class T>
enable_if_t<strict_scalar<T>::integer, T> abs(T);
template <class T>
enable_if_t<strict_scalar<T>::integer, T> max(T, T);
template <class T>
enable_if_t<strict_scalar<T>::integer, T> min(T, T);
template <class T>
enable_if_t<strict_scalar<T>::integer, T> clamp(T, T, T);
template <class T>
enable_if_t<strict_scalar<T>::integer, T> popcount(T);
template <class T>
enable_if_t<strict_scalar<T>::integer, T> extract_bits(T x, uint offset, uint bits);
template <class T>
enable_if_t<strict_scalar<T>::integer, T> insert_bits(T base, T insert, uint offset, uint bits);

// 6.3 relational, 6.8 geometric. A comparison of float4 is a bool4 in Metal; clang makes it an int4.
template <int N>
bool any(vec<int, N>);
template <int N>
bool all(vec<int, N>);
template <int N>
float dot(vec<float, N>, vec<float, N>);
template <int N>
half dot(vec<half, N>, vec<half, N>);

// 6.9 synchronisation and simdgroups
enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return static_cast<mem_flags>(uint(a) | uint(b)); }
template <mem_flags>
struct strict_constant {};
void strict_barrier(mem_flags);
// The flags must be known at compile time (Apple's header asks for it).
#define threadgroup_barrier(...) (strict_constant<(__VA_ARGS__)>(), metal::strict_barrier(__VA_ARGS__))
#define simdgroup_barrier(...) (strict_constant<(__VA_ARGS__)>(), metal::strict_barrier(__VA_ARGS__))

#define STRICT_REDUCE(name, WHAT) \
  template <class T>              \
  enable_if_t<WHAT, T> name(T);
STRICT_REDUCE(simd_sum, strict_scalar<T>::shuffles)
STRICT_REDUCE(simd_product, strict_scalar<T>::shuffles)
STRICT_REDUCE(simd_max, strict_scalar<T>::shuffles)
STRICT_REDUCE(simd_min, strict_scalar<T>::shuffles)
STRICT_REDUCE(simd_prefix_inclusive_sum, strict_scalar<T>::shuffles)
STRICT_REDUCE(simd_prefix_exclusive_sum, strict_scalar<T>::shuffles)
STRICT_REDUCE(simd_and, (strict_scalar<T>::integer && strict_scalar<T>::shuffles))
STRICT_REDUCE(simd_or, (strict_scalar<T>::integer && strict_scalar<T>::shuffles))
STRICT_REDUCE(simd_xor, (strict_scalar<T>::integer && strict_scalar<T>::shuffles))
#undef STRICT_REDUCE
bool simd_any(bool);
bool simd_all(bool);
#define STRICT_SHUFFLE(name) \
  template <class T>         \
  enable_if_t<strict_scalar<T>::shuffles, T> name(T, ushort);
STRICT_SHUFFLE(simd_shuffle)
STRICT_SHUFFLE(simd_shuffle_xor)
STRICT_SHUFFLE(simd_shuffle_down)
STRICT_SHUFFLE(simd_shuffle_up)
STRICT_SHUFFLE(simd_broadcast)
#undef STRICT_SHUFFLE

// 2.4, 6.7: elements of a lane as MLX's own kernels reach them
template <class T, int Cols, int Rows>
struct simdgroup_matrix {
  thread vec<T, 2>& thread_elements() STRICT_THREAD_THIS;
  vec<T, 2> strict_elements;
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
template <class T, int Cols, int Rows>
simdgroup_matrix<T, Cols, Rows> make_filled_simdgroup_matrix(T value);
template <class T, class U, class V, class W, int Cols, int Rows, int K>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<T, Cols, Rows>& d, thread simdgroup_matrix<U, K, Rows>& a,
                                   thread simdgroup_matrix<V, Cols, K>& b, thread simdgroup_matrix<W, Cols, Rows>& c);

}  // namespace metal
using namespace metal;

// Overloads of simdgroup functions that MLX's text has at global scope.
#define STRICT_MLX_SHUFFLE(name)     \
  uint64_t name(uint64_t, uint16_t); \
  int64_t name(int64_t, uint16_t);   \
  bool name(bool, uint16_t);
STRICT_MLX_SHUFFLE(simd_shuffle)
STRICT_MLX_SHUFFLE(simd_shuffle_up)
STRICT_MLX_SHUFFLE(simd_shuffle_down)
#undef STRICT_MLX_SHUFFLE

// 2.18: an operator of the language; its operands are of one size
template <class To, class From>
To as_type(From) {
  static_assert(sizeof(To) == sizeof(From), "as_type expects types of one size");
  return To();
}
