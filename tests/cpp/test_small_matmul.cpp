#include <cmath>
#include <vector>

#include "ntkcl/kernels/scratch.h"
#include "ntkcl/kernels/small_matmul_cpu.h"
#include "testing.h"

using namespace ntkcl::kernels;

namespace {

// Numbers that bfloat16 holds exactly, so that every sum of them is exact too.
float number(int64_t i) {
  return static_cast<float>((i * 2654435761U) % 17) - 8.0F;
}

struct Sizes {
  int64_t m, n, k;
};
const Sizes kSizes[] = {{1, 16, 1},    {8, 16, 7},     {5, 48, 64},
                        {64, 208, 33}, {200, 64, 197}, {24, 112, 96}};

template <class C>
struct Matrices {
  Sizes size;
  std::vector<C> a, b, c, expected;

  // `transposed`: a is stored (k, m), as weights are that are summed over their rows.
  Matrices(Sizes s, bool transposed, bool add) : size(s) {
    const int64_t rows = rounded_up(s.m, kTileRows);
    a.resize(static_cast<size_t>(rows * s.k));
    b.resize(static_cast<size_t>(s.k * s.n));
    c.resize(static_cast<size_t>(rows * s.n));
    for (size_t i = 0; i < a.size(); ++i) {
      a[i] = number(static_cast<int64_t>(i));
    }
    for (size_t i = 0; i < b.size(); ++i) {
      b[i] = number(static_cast<int64_t>(i) + 5);
    }
    for (size_t i = 0; i < c.size(); ++i) {
      c[i] = number(static_cast<int64_t>(i) + 9);
    }
    row = transposed ? 1 : s.k;
    column = transposed ? rows : 1;
    expected.resize(static_cast<size_t>(s.m * s.n));
    for (int64_t i = 0; i < s.m; ++i) {
      for (int64_t j = 0; j < s.n; ++j) {
        C sum = add ? c[static_cast<size_t>(i * s.n + j)] : C{0};
        for (int64_t l = 0; l < s.k; ++l) {
          sum += a[static_cast<size_t>(i * row + l * column)] * b[static_cast<size_t>(l * s.n + j)];
        }
        expected[static_cast<size_t>(i * s.n + j)] = sum;
      }
    }
  }

  SmallMatmul<C> arguments(bool add) {
    return {a.data(), row, column, b.data(), size.n, c.data(), size.n, size.m, size.n, size.k, add};
  }

  void check() const {
    for (size_t i = 0; i < expected.size(); ++i) {
      REQUIRE(c[i] == expected[i]);
    }
  }

  int64_t row, column;
};

}  // namespace

TEMPLATE_TEST_CASE("small products are exact at every vector width", "[kernels]", float, double) {
  for (const auto& version : small_matmul_versions<TestType>()) {
    for (const Sizes size : kSizes) {
      for (const bool transposed : {false, true}) {
        for (const bool add : {false, true}) {
          CAPTURE(version.name, size.m, size.n, size.k, transposed, add);
          Matrices<TestType> matrices(size, transposed, add);
          version.function(matrices.arguments(add));
          matrices.check();
        }
      }
    }
  }
}

// a in pairs along k, side by side or, transposed, row beside row, and b in pairs row over row;
// zero where k is odd. Behind them lies what no product may see.
struct Pairs {
  int64_t count, row, column;
  std::vector<BFloat16Pair> a, b;

  Pairs(const Matrices<float>& m, bool transposed)
      : count((m.size.k + 1) / 2),
        row(transposed ? 1 : count),
        column(transposed ? rounded_up(m.size.m, kTileRows) : 1) {
    const int64_t rows = rounded_up(m.size.m, kTileRows), n = m.size.n, k = m.size.k;
    const BFloat16Pair nan{store<BFloat16>(NAN), store<BFloat16>(NAN)};
    a.assign(static_cast<size_t>(rows * count + 16), nan);
    b.assign(static_cast<size_t>(count * n + 16 * n), nan);
    const auto at = [](const std::vector<float>& x, int64_t i, bool there) {
      return store<BFloat16>(there ? x[static_cast<size_t>(i)] : 0.0F);
    };
    for (int64_t j = 0; j < count; ++j) {
      const bool second = 2 * j + 1 < k;
      for (int64_t i = 0; i < rows; ++i) {
        a[static_cast<size_t>(i * row + j * column)] = {at(m.a, i * k + 2 * j, true),
                                                        at(m.a, i * k + 2 * j + 1, second)};
      }
      for (int64_t i = 0; i < n; ++i) {
        b[static_cast<size_t>(j * n + i)] = {at(m.b, 2 * j * n + i, true),
                                             at(m.b, (2 * j + 1) * n + i, second)};
      }
    }
  }
};

TEST_CASE("products of bfloat16 pairs are exact", "[kernels]") {
  const auto versions = small_matmul_versions<BFloat16Pair>();
  if (versions.empty()) {
    WARN("this processor has no bfloat16 products");
  }
  for (const auto& version : versions) {
    for (const Sizes size : kSizes) {
      for (const bool transposed : {false, true}) {
        for (const bool add : {false, true}) {
          CAPTURE(version.name, size.m, size.n, size.k, transposed, add);
          Matrices<float> matrices(size, false, add);
          const Pairs pairs(matrices, transposed);
          version.function({pairs.a.data(), pairs.row, pairs.column, pairs.b.data(), size.n,
                            matrices.c.data(), size.n, size.m, size.n, pairs.count, add});
          matrices.check();
        }
      }
    }
  }
}
