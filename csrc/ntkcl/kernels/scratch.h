#pragma once

#include <cstddef>
#include <cstdint>

namespace ntkcl::kernels {

// Hands out the parts of a thread's scratch memory, each on a line of the cache; without memory it
// counts them.
class Scratch {
 public:
  explicit Scratch(std::byte* memory) : begin_(memory) {}

  template <class E>
  E* take(int64_t rows, int64_t columns) {
    constexpr int64_t kLine = 64;
    std::byte* part = begin_ ? begin_ + used_ : nullptr;
    used_ += (rows * columns * static_cast<int64_t>(sizeof(E)) + kLine - 1) / kLine * kLine;
    return reinterpret_cast<E*>(part);
  }

  int64_t used() const { return used_; }

 private:
  std::byte* begin_;
  int64_t used_ = 0;
};

}  // namespace ntkcl::kernels
