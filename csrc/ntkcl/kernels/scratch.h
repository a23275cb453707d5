#pragma once

#include <cstddef>
#include <cstdint>

namespace ntkcl::kernels {

constexpr int64_t rounded_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

// Hands out the parts of a thread's scratch memory, each on a line of the cache; without memory it
// counts them.
class Scratch {
 public:
  explicit Scratch(std::byte* memory) : begin_(memory) {}

  template <class E>
  E* take(int64_t rows, int64_t columns) {
    constexpr int64_t kLine = 64;
    std::byte* part = begin_ ? begin_ + used_ : nullptr;
    used_ += rounded_up(rows * columns * static_cast<int64_t>(sizeof(E)), kLine);
    return reinterpret_cast<E*>(part);
  }

  int64_t used() const { return used_; }

 private:
  std::byte* begin_;
  int64_t used_ = 0;
};

}  // namespace ntkcl::kernels
