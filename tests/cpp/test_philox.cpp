#include "ntkcl/core/philox.h"

#include <cmath>
#include <set>
#include <vector>

#include "testing.h"

namespace ntkcl {
namespace {

std::vector<uint32_t> words(const Philox4& block) {
  return {block.v, block.v + 4};
}

TEST_CASE("Philox4x32-10 gives the known answers of Random123", "[core][philox]") {
  using Words = std::vector<uint32_t>;
  CHECK(words(philox(0, 0, 0)) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(words(philox(UINT64_MAX, UINT64_MAX, UINT64_MAX)) ==
        Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  // Digits of pi: counter 243f6a88 85a308d3 13198a2e 03707344, key a4093822 299f31d0.
  CHECK(words(philox(0x299f31d0a4093822, 0x85a308d3243f6a88, 0x0370734413198a2e)) ==
        Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("uniform numbers lie in [0, 1) and reach both ends", "[core][philox]") {
  CHECK(uniform24(0) == 0.0f);
  CHECK(uniform24(UINT32_MAX) == 1.0f - std::ldexp(1.0f, -24));
  CHECK(uniform53(0, 0) == 0.0);
  CHECK(uniform53(UINT32_MAX, UINT32_MAX) == 1.0 - std::ldexp(1.0, -53));
}

TEST_CASE("subkeys of different labels differ, in both places", "[core][philox]") {
  std::set<uint64_t> keys;
  for (uint64_t label = 0; label < 100; ++label) {
    for (uint64_t second = 0; second < 100; ++second) {
      keys.insert(philox_subkey(7, label, second));
    }
  }
  CHECK(keys.size() == 10000);
  CHECK(philox_subkey(7, 1) != philox_subkey(8, 1));
  CHECK(purpose_label("shuffle") != purpose_label("dropout"));
}

TEST_CASE("a stream is the blocks of its key in counter order", "[core][philox]") {
  PhiloxStream stream(42);
  for (uint64_t counter = 0; counter < 3; ++counter) {
    const Philox4 block = philox(42, counter);
    for (const uint32_t expected : block.v) {
      CHECK(stream.bits() == expected);
    }
  }
}

TEST_CASE("below(n) stays below n and meets every value equally often", "[core][philox]") {
  const uint64_t n = GENERATE(1u, 2u, 3u, 10u, 1000u);
  const int per_value = 1000;
  PhiloxStream stream(n);
  std::vector<int> counts(n, 0);
  for (uint64_t i = 0; i < n * per_value; ++i) {
    ++counts.at(stream.below(n));
  }
  // Six standard deviations of a binomial count: the key is fixed, so this never flickers.
  const double bound = 6 * std::sqrt(per_value);
  for (const int count : counts) {
    CHECK(std::abs(count - per_value) <= bound);
  }
}

TEST_CASE("below(n) has no bias where n does not divide 2^64", "[core][philox]") {
  // With plain `bits % n` values under 2^62 would be half of the draws instead of a third.
  const uint64_t n = 3 * (uint64_t{1} << 62);
  PhiloxStream stream(1);
  const int draws = 30000;
  int low = 0;
  int outside = 0;
  for (int i = 0; i < draws; ++i) {
    const uint64_t draw = stream.below(n);
    low += draw < (uint64_t{1} << 62);
    outside += draw >= n;
  }
  CHECK(outside == 0);
  CHECK(std::abs(low - draws / 3) <= 6 * std::sqrt(draws * 2.0 / 9.0));
}

}  // namespace
}  // namespace ntkcl
