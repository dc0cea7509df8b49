// Checked pointers for the address spaces of Metal. Every access is tested for bounds and alignment; memory that a
// kernel can write also for order: see runtime.h.
#pragma once
#include <cstring>
#include <type_traits>

#include "runtime.h"

namespace msl {

// An element of writable memory. Reads and writes go through it, so that the emulator sees which is which.
template <class T, Space S>
class ref;

template <class T, Space S>
class ptr {
 public:
  using value_type = std::remove_const_t<T>;
  ptr() = default;
  ptr(std::nullptr_t) {}
  ptr(T* address, const Region* region) : address_(address), region_(region) {}
  template <class U, class = std::enable_if_t<std::is_same<const U, T>::value>>
  ptr(const ptr<U, S>& other) : address_(other.address()), region_(other.region()) {}
  template <class U, class = void,
            class = std::enable_if_t<!std::is_same<const U, T>::value && !std::is_same<U, T>::value>>
  explicit ptr(const ptr<U, S>& other) : address_(reinterpret_cast<T*>(other.address())), region_(other.region()) {
    static_assert(std::is_const<T>::value || !std::is_const<U>::value, "a cast must not drop const");
  }

  T* address() const { return address_; }
  const Region* region() const { return region_; }
  explicit operator bool() const { return address_ != nullptr; }

  template <class I>
  auto operator[](I i) const {
    return *(*this + i);
  }
  auto operator*() const { return deref(std::is_const<T>()); }
  template <class I>
  ptr operator+(I i) const {
    return ptr(address_ + static_cast<std::ptrdiff_t>(i), region_);
  }
  template <class I>
  ptr operator-(I i) const {
    return ptr(address_ - static_cast<std::ptrdiff_t>(i), region_);
  }
  std::ptrdiff_t operator-(const ptr& other) const { return address_ - other.address_; }
  template <class I>
  ptr& operator+=(I i) {
    return *this = *this + i;
  }
  template <class I>
  ptr& operator-=(I i) {
    return *this = *this - i;
  }
  ptr& operator++() { return *this += 1; }
  ptr operator++(int) {
    ptr old = *this;
    ++*this;
    return old;
  }
  bool operator==(const ptr& other) const { return address_ == other.address_; }
  bool operator!=(const ptr& other) const { return address_ != other.address_; }
  bool operator<(const ptr& other) const { return address_ < other.address_; }

  value_type load() const {
    check_access(region_, address_, sizeof(T), alignof(T));
    region_->bytes_read += sizeof(T);
    if (region_->cells) note_read(region_, address_, sizeof(T));
    return *address_;
  }
  void store(const value_type& value) const {
    check_access(region_, address_, sizeof(T), alignof(T));
    note_write(region_, address_, sizeof(T));
    *const_cast<value_type*>(address_) = value;
  }

 private:
  value_type deref(std::true_type) const { return load(); }
  ref<T, S> deref(std::false_type) const { return ref<T, S>(*this); }

  T* address_ = nullptr;
  const Region* region_ = nullptr;
};

template <class T, Space S>
class ref {
 public:
  explicit ref(ptr<T, S> p) : p_(p) {}
  operator T() const { return p_.load(); }
  ptr<T, S> operator&() const { return p_; }
  const ref& operator=(const T& value) const {
    p_.store(value);
    return *this;
  }
  const ref& operator=(const ref& other) const {
    p_.store(other);
    return *this;
  }
  template <class V>
  const ref& operator+=(const V& v) const {
    p_.store(static_cast<T>(p_.load() + v));
    return *this;
  }
  template <class V>
  const ref& operator-=(const V& v) const {
    p_.store(static_cast<T>(p_.load() - v));
    return *this;
  }
  template <class V>
  const ref& operator*=(const V& v) const {
    p_.store(static_cast<T>(p_.load() * v));
    return *this;
  }
  template <class V>
  const ref& operator|=(const V& v) const {
    p_.store(static_cast<T>(p_.load() | v));
    return *this;
  }

 private:
  ptr<T, S> p_;
};

template <class T>
using device_ptr = ptr<T, kDevice>;
template <class T>
using threadgroup_ptr = ptr<T, kThreadgroup>;
template <class T>
using constant_ptr = ptr<T, kConstant>;
template <class T>
using device_ref = ref<T, kDevice>;
template <class T>
using threadgroup_ref = ref<T, kThreadgroup>;

// Storage of one `threadgroup T name[N];`. The threads of a threadgroup share it, and threadgroups run one after
// another, so one static object serves them all; its cells know which threadgroup wrote them. It begins at a multiple
// of ALIGN, what the declaration promises, and of no more: a read as a wider type is then seen to be misaligned.
template <class T, size_t N, size_t ALIGN>
struct threadgroup_storage {
  alignas(64) char room[sizeof(T) * N + ALIGN];
  Cell cells[N];
  Region region;
  uint32_t declared_in;  // number of the launch that declared it last
  threadgroup_ptr<T> get(const char* name) {
    static_assert(ALIGN <= 32, "expected an alignment of at most 32 bytes");
    char* bytes = room + ALIGN;
    if (declared_in != launch_number()) {
      declared_in = launch_number();
      region = Region{bytes, sizeof(T) * N, name, cells, sizeof(T), kThreadgroup, false, 0};
      declare_threadgroup(&region);
    }
    return threadgroup_ptr<T>(reinterpret_cast<T*>(bytes), &region);
  }
};

}  // namespace msl
