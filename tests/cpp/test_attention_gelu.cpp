#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <set>
#include <vector>

#include "ntkcl/kernels/attention_amx.h"
#include "ntkcl/kernels/attention_cpu.h"
#include "ntkcl/kernels/element.h"
#include "ntkcl/kernels/gelu_cpu.h"
#include "testing.h"

using namespace ntkcl::kernels;

// With vectors of exactly the sizes that are promised, for the sanitizers, and scratch memory full
// of NaN, which must reach nothing.
namespace {

// From -1 to 1, without order.
float number(size_t i) {
  uint32_t x = static_cast<uint32_t>(i) * 2654435761U;
  x = (x ^ (x >> 15)) * 2246822519U;
  return static_cast<float>((x ^ (x >> 13)) % 4096) / 2048.0F - 1.0F;
}

template <class T>
std::vector<T> numbers(int64_t size, size_t from) {
  std::vector<T> all;
  for (size_t i = 0; i < static_cast<size_t>(size); ++i) {
    all.push_back(store<T>(static_cast<Compute<T>>(load(store<BFloat16>(number(from + i))))));
  }
  return all;
}

struct alignas(64) Line {
  std::byte bytes[64];
};

std::vector<Line> scratch_of(int64_t bytes) {
  std::vector<Line> scratch(static_cast<size_t>(bytes + 63) / 64);
  std::memset(static_cast<void*>(scratch.data()), 0xFF, scratch.size() * sizeof(Line));
  return scratch;
}

using Results = std::vector<std::vector<double>>;  // out, dqkv, dgate

template <class T>
Results attention(const AttentionSizes& sizes) {
  const int64_t rows = sizes.batch * sizes.tokens, heads = sizes.batch * sizes.heads;
  const auto qkv = numbers<T>(rows * 3 * sizes.columns(), 0),
             grad = numbers<T>(rows * sizes.columns(), 7), gate = numbers<T>(sizes.heads, 3);
  const T* used_gate = sizes.prompts > 0 ? gate.data() : nullptr;
  std::vector<T> out(grad.size()), dqkv(qkv.size());
  std::vector<double> dgate(sizes.prompts > 0 ? static_cast<size_t>(heads) : 0);
  auto scratch = scratch_of(attention_scratch<T>(sizes));
  attention_cpu<T>({sizes, qkv.data(), used_gate, out.data()}, 0, heads, scratch.data()->bytes);
  auto more = scratch_of(attention_backward_scratch<T>(sizes));
  attention_backward_cpu<T>(
      {sizes, grad.data(), qkv.data(), used_gate, dqkv.data(), used_gate ? dgate.data() : nullptr},
      0, heads, more.data()->bytes);
  const auto as_double = [](const std::vector<T>& x) {
    std::vector<double> all;
    for (const T& value : x) {
      all.push_back(load(value));
    }
    return all;
  };
  return {as_double(out), as_double(dqkv), dgate};
}

void check_close(const Results& results, const Results& exact, double tolerance) {
  for (size_t r = 0; r < exact.size(); ++r) {
    double largest = 0;
    for (const double value : exact[r]) {
      largest = std::max(largest, std::fabs(value));
    }
    CAPTURE(r, largest);
    for (size_t i = 0; i < exact[r].size(); ++i) {
      REQUIRE(std::fabs(results[r][i] - exact[r][i]) <= tolerance * largest);
    }
  }
}

}  // namespace

TEST_CASE("attention reads and writes what it is given, and no scratch of before", "[kernels]") {
  if (!attention_has_tiles({.batch = 1, .heads = 1, .tokens = 1, .prompts = 0, .width = 32})) {
    WARN("this processor multiplies no tiles");
  }
  for (const int64_t tokens : {1, 2, 15, 16, 17, 31, 33, 65}) {
    for (const int64_t width : {1, 16, 24, 32, 96, 128}) {
      for (const int64_t prompts :
           std::set<int64_t>{0, std::min<int64_t>(1, tokens - 1), tokens - 1}) {
        CAPTURE(tokens, width, prompts);
        const AttentionSizes sizes{
            .batch = 2, .heads = 2, .tokens = tokens, .prompts = prompts, .width = width};
        const Results exact = attention<double>(sizes);
        check_close(attention<float>(sizes), exact, 1e-5);
        check_close(attention<BFloat16>(sizes), exact, 0.015);
      }
    }
  }
}

TEST_CASE("gelu of any part of a row is that part of the row's", "[kernels]") {
  const auto x = numbers<BFloat16>(70, 1), grad = numbers<BFloat16>(70, 5);
  std::vector<BFloat16> y(x.size()), dx(x.size());
  const int64_t size = 70;
  gelu_cpu<BFloat16>({x.data(), y.data(), size}, 0, size);
  gelu_backward_cpu<BFloat16>({grad.data(), x.data(), dx.data(), size}, 0, size);
  for (int64_t n = 1; n < size; ++n) {
    CAPTURE(n);
    const std::vector<BFloat16> some(x.begin(), x.begin() + n), its(grad.begin(), grad.begin() + n);
    const BFloat16 guard{0x1234};  // behind the end
    std::vector<BFloat16> part(some.size() + 32, guard), dpart(part);
    gelu_cpu<BFloat16>({some.data(), part.data(), n}, 0, n);
    gelu_backward_cpu<BFloat16>({its.data(), some.data(), dpart.data(), n}, 0, n);
    for (size_t i = 0; i < part.size(); ++i) {
      REQUIRE(part[i].bits == (i < some.size() ? y[i] : guard).bits);
      REQUIRE(dpart[i].bits == (i < some.size() ? dx[i] : guard).bits);
    }
  }
}
