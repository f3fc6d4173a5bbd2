#pragma once
#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

namespace zsad {
namespace {  // compiled for several instruction sets, of which none may take another's place

// Zeros on a cache line.
template <typename T>
class Buffer {
 public:
  explicit Buffer(std::size_t n) : data_(static_cast<T*>(::operator new[](n * sizeof(T), kLine))) {
    std::fill_n(data_.get(), n, T(0));
  }
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Delete {
    void operator()(T* p) const { ::operator delete[](p, kLine); }
  };
  std::unique_ptr<T[], Delete> data_;
};

}  // namespace
}  // namespace zsad
