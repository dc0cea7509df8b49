// Metal's scalar and vector types with the swizzles that kernels use.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace metal {

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using half = _Float16;
inline half operator""h(long double x) { return half(x); }

// bfloat16, rounded to nearest even, computed in float as Metal does.
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  bfloat(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    bits = (u & 0x7fffffffu) > 0x7f800000u ? uint16_t(u >> 16 | 64) : uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16);
  }
  operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
  }
};

template <class T, int N>
struct vec;

template <class T, int N, int... I>
struct swizzle {
  T data[N];
  operator vec<T, sizeof...(I)>() const { return vec<T, sizeof...(I)>(data[I]...); }
  swizzle& operator=(const vec<T, sizeof...(I)>& v) {
    const int to[] = {I...};
    for (unsigned i = 0; i < sizeof...(I); i++) data[to[i]] = v[i];
    return *this;
  }
  swizzle& operator=(const swizzle& other) { return *this = vec<T, sizeof...(I)>(other); }
};

template <class T, int N>
struct components;
template <class T>
struct components<T, 2> {
  union {
    T data[2];
    struct {
      T x, y;
    };
    struct {
      T r, g;
    };
    swizzle<T, 2, 0, 1> xy;
    swizzle<T, 2, 1, 0> yx;
  };
};
template <class T>
struct components<T, 3> {
  union {
    T data[4];
    struct {
      T x, y, z;
    };
    struct {
      T r, g, b;
    };
    swizzle<T, 4, 0, 1> xy;
    swizzle<T, 4, 1, 2> yz;
  };
};
template <class T>
struct components<T, 4> {
  union {
    T data[4];
    struct {
      T x, y, z, w;
    };
    struct {
      T r, g, b, a;
    };
    swizzle<T, 4, 0, 1> xy;
    swizzle<T, 4, 1, 0> yx;
    swizzle<T, 4, 2, 3> zw;
    swizzle<T, 4, 0, 2> xz;
    swizzle<T, 4, 1, 3> yw;
    swizzle<T, 4, 0, 1, 2> xyz;
  };
};

template <class T, int N>
struct alignas(sizeof(T) * (N == 3 ? 4 : N)) vec : components<T, N> {
  using components<T, N>::data;
  vec() {}
  vec(const vec& v) { copy(v.data); }
  vec& operator=(const vec& v) {
    copy(v.data);
    return *this;
  }
  vec(T s) {
    for (int i = 0; i < N; i++) data[i] = s;
  }
  template <class U>
  explicit vec(const vec<U, N>& v) {
    for (int i = 0; i < N; i++) data[i] = static_cast<T>(v[i]);
  }
  template <class A, class B, class... C>
  vec(const A& a, const B& b, const C&... c) {
    fill(0, a, b, c...);
  }
  T& operator[](int i) { return data[i]; }
  const T& operator[](int i) const { return data[i]; }
  vec operator-() const {
    vec r;
    for (int i = 0; i < N; i++) r.data[i] = -data[i];
    return r;
  }
  vec operator~() const {
    vec r;
    for (int i = 0; i < N; i++) r.data[i] = ~data[i];
    return r;
  }

 private:
  void copy(const T* v) {
    for (int i = 0; i < N; i++) data[i] = v[i];
  }
  void fill(int at) {
    (void)at;
    static_assert(N > 0, "");
  }
  template <class A, class... C>
  std::enable_if_t<std::is_convertible<A, T>::value> fill(int at, const A& a, const C&... c) {
    data[at] = static_cast<T>(a);
    fill(at + 1, c...);
  }
  template <class U, int M, class... C>
  void fill(int at, const vec<U, M>& a, const C&... c) {
    for (int i = 0; i < M; i++) data[at + i] = a[i];
    fill(at + M, c...);
  }
};

#define MSL_BINARY(op)                                                                                         \
  template <class T, int N>                                                                                    \
  vec<T, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {                                              \
    vec<T, N> r;                                                                                               \
    for (int i = 0; i < N; i++) r.data[i] = static_cast<T>(a[i] op b[i]);                                      \
    return r;                                                                                                  \
  }                                                                                                            \
  template <class T, int N, class S, class = std::enable_if_t<std::is_convertible<S, T>::value>>               \
  vec<T, N> operator op(const vec<T, N>& a, const S& s) {                                                      \
    return a op vec<T, N>(static_cast<T>(s));                                                                  \
  }                                                                                                            \
  template <class T, int N, class S, class = std::enable_if_t<std::is_convertible<S, T>::value>, class = void> \
  vec<T, N> operator op(const S& s, const vec<T, N>& a) {                                                      \
    return vec<T, N>(static_cast<T>(s)) op a;                                                                  \
  }                                                                                                            \
  template <class T, int N, class S>                                                                           \
  vec<T, N>& operator op## = (vec<T, N> & a, const S& s) {                                                     \
    return a = a op s;                                                                                         \
  }
MSL_BINARY(+)
MSL_BINARY(-)
MSL_BINARY(*)
MSL_BINARY(/)
MSL_BINARY(%)
MSL_BINARY(&)
MSL_BINARY(|)
MSL_BINARY(^)
MSL_BINARY(<<)
MSL_BINARY(>>)
#undef MSL_BINARY

#define MSL_COMPARE(op)                                              \
  template <class T, int N>                                          \
  vec<bool, N> operator op(const vec<T, N>& a, const vec<T, N>& b) { \
    vec<bool, N> r;                                                  \
    for (int i = 0; i < N; i++) r.data[i] = a[i] op b[i];            \
    return r;                                                        \
  }
MSL_COMPARE(==)
MSL_COMPARE(!=)
MSL_COMPARE(<)
MSL_COMPARE(>)
MSL_COMPARE(<=)
MSL_COMPARE(>=)
#undef MSL_COMPARE

// A vector with the alignment of its elements.
template <class T, int N>
struct packed_vec {
  T data[N];
  packed_vec() = default;
  packed_vec(const vec<T, N>& v) {
    for (int i = 0; i < N; i++) data[i] = v[i];
  }
  operator vec<T, N>() const {
    vec<T, N> r;
    for (int i = 0; i < N; i++) r.data[i] = data[i];
    return r;
  }
  T& operator[](int i) { return data[i]; }
  const T& operator[](int i) const { return data[i]; }
};

#define MSL_NAMES(T)                      \
  using T##2 = vec<T, 2>;                 \
  using T##3 = vec<T, 3>;                 \
  using T##4 = vec<T, 4>;                 \
  using packed_##T##2 = packed_vec<T, 2>; \
  using packed_##T##3 = packed_vec<T, 3>; \
  using packed_##T##4 = packed_vec<T, 4>;
MSL_NAMES(bool)
MSL_NAMES(char)
MSL_NAMES(uchar)
MSL_NAMES(short)
MSL_NAMES(ushort)
MSL_NAMES(int)
MSL_NAMES(uint)
MSL_NAMES(long)
MSL_NAMES(ulong)
MSL_NAMES(half)
MSL_NAMES(bfloat)
MSL_NAMES(float)
#undef MSL_NAMES

template <class To, class From>
To as_type(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as_type expects types of one size");
  To to;
  std::memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof to);
  return to;
}

}  // namespace metal
