#include "ntkcl/scenario/class_order.h"

#include <bit>
#include <numeric>
#include <random>
#include <utility>

#include "ntkcl/core/error.h"

namespace ntkcl::scenario {
namespace {

// Uniform in 0 .. max as NumPy's legacy generator draws it: the low bits, rejected above max.
uint32_t masked_rejection(std::mt19937& generator, uint32_t max) {
  const uint32_t mask = UINT32_MAX >> std::countl_zero(max);
  for (;;) {
    const uint32_t value = static_cast<uint32_t>(generator()) & mask;
    if (value <= max) {
      return value;
    }
  }
}

}  // namespace

std::vector<int64_t> numpy_permutation(uint32_t seed, int64_t n) {
  NTKCL_CHECK(n >= 0 && n <= int64_t{UINT32_MAX}, "numpy_permutation",
              "expected 0 <= n < 2^32, got ", n);
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  // std::mt19937's seeding is the init_genrand that NumPy uses for a scalar seed.
  std::mt19937 generator(seed);
  for (size_t i = order.size(); i-- > 1;) {
    std::swap(order[i], order[masked_rejection(generator, static_cast<uint32_t>(i))]);
  }
  return order;
}

}  // namespace ntkcl::scenario
