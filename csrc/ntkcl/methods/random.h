#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace ntkcl::methods {

// What a draw is for. Two draws with different names or numbers are independent.
struct Draw {
  std::string purpose;
  int64_t task = 0;
  int64_t step = 0;
  int64_t list = 0;
  int64_t layer = 0;
};

// All randomness of a method: counter-based (Philox), a function of (seed, draw) alone. Tests
// override `recorded` to give draws from a file.
class RandomSource {
 public:
  explicit RandomSource(uint64_t seed) : seed_(seed) {}
  virtual ~RandomSource() = default;

  // U(low, high), N(0, 1).
  at::Tensor uniform(const Draw& draw, at::IntArrayRef sizes, double low, double high,
                     const at::TensorOptions& options);
  at::Tensor normal(const Draw& draw, at::IntArrayRef sizes, const at::TensorOptions& options);
  // A random order of 0 .. n-1: int64 (n), on the CPU.
  at::Tensor permutation(const Draw& draw, int64_t n);
  // k of 0 .. n-1 without replacement: int64 (k), on the CPU; k <= n.
  at::Tensor choice(const Draw& draw, int64_t n, int64_t k);
  // The key of a dropout that the kernel draws itself: int64 scalar, on the CPU or the device.
  virtual at::Tensor dropout_key(const Draw& draw);
  // Keep-mask (uint8, 1 = keep with probability 1 - p).
  at::Tensor keep_mask(const Draw& draw, at::IntArrayRef sizes, double p, at::Device device);
  // What `make` makes of a draw on the CPU, on the device. What a training step needs there comes
  // this way: nothing waits for the copy, and a step that is replayed finds the next step's values.
  using Make = std::function<at::Tensor(RandomSource& source, const Draw& draw)>;
  virtual at::Tensor placed(const Draw& draw, at::Device device, const Make& make);
  // A key for streams outside (the loader's augmentation).
  uint64_t key(const Draw& draw) const;
  // The given value of a draw, if there is one.
  virtual std::optional<at::Tensor> recorded(const Draw& draw);

 private:
  uint64_t seed_;
};

}  // namespace ntkcl::methods
