#pragma once

#include <cstdint>
#include <vector>

#include "ntkcl/kernels/element.h"

namespace ntkcl::kernels {

// Small matrices are stored in whole tiles: rows and columns are padded to multiples of these.
// What stands in the padding is computed with, but reaches nothing outside it.
constexpr int64_t kTileRows = 8;
constexpr int64_t kTileColumns = 16;

// Two numbers whose products are added up together: neighbours along the dimension that a matrix
// product sums over.
struct BFloat16Pair {
  BFloat16 first, second;
};

// What elements E of the operands are added up in, and how many numbers one of them holds.
template <class E>
struct Operand {
  using Sum = E;
  static constexpr int64_t kNumbers = 1;
};
template <>
struct Operand<BFloat16Pair> {
  using Sum = float;
  static constexpr int64_t kNumbers = 2;
};

// c = a b, or c += a b, for matrices that fit in the second-level cache: (m, k) times (k, n).
// a may be transposed; rows of b and c lie side by side. m is rounded up to kTileRows, n must be a
// multiple of kTileColumns; k and all strides count elements.
template <class E>
struct SmallMatmul {
  const E* a = nullptr;  // a[i * a_row + j * a_column], one of the two 1
  int64_t a_row = 0, a_column = 1;
  const E* b = nullptr;
  int64_t b_row = 0;
  typename Operand<E>::Sum* c = nullptr;
  int64_t c_row = 0;
  int64_t m = 0, n = 0, k = 0;
  bool add = false;
};

// E in float, double and, where the processor multiplies them itself, BFloat16Pair. In the calling
// thread, with fused multiply-add where there is one; equal bits on equal machines. Near the rate
// of a GEMM library, without its cost of starting and packing.
template <class E>
void small_matmul_cpu(const SmallMatmul<E>& args);

// What small_matmul_cpu may be on this machine, the best first: for tests. Of pairs there may be
// none.
template <class C>
struct SmallMatmulVersion {
  const char* name = nullptr;
  void (*function)(const SmallMatmul<C>&) = nullptr;
};
template <class C>
std::vector<SmallMatmulVersion<C>> small_matmul_versions();

}  // namespace ntkcl::kernels
