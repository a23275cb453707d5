#include "ntkcl/kernels/small_matmul_cpu.h"

#include <cstring>

#include "ntkcl/core/error.h"
#include "ntkcl/kernels/multiversion.h"

#ifdef NTKCL_X86_VERSIONS
#include <immintrin.h>
#endif

// A tile of c stays in registers while k runs: per step one vector or two of b, and eight numbers
// of a, each spread over a vector.
namespace ntkcl::kernels {
namespace {

template <class C, int kBytes, int kVectors>
NTKCL_INLINE void compute_tile(const SmallMatmul<C>& args, int64_t row, int64_t column) {
  typedef C Vector __attribute__((vector_size(kBytes)));
  constexpr int kLanes = kBytes / static_cast<int>(sizeof(C));
  const C* a = args.a + row * args.a_row;
  const C* b = args.b + column;
  C* c = args.c + row * args.c_row + column;
  Vector sums[kTileRows][kVectors] = {};
  if (args.add) {
    for (int r = 0; r < kTileRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        std::memcpy(&sums[r][v], c + r * args.c_row + v * kLanes, kBytes);
      }
    }
  }
  for (int64_t j = 0; j < args.k; ++j) {
    Vector factors[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      std::memcpy(&factors[v], b + v * kLanes, kBytes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const Vector spread = a[r * args.a_row] - Vector{};
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] += spread * factors[v];
      }
    }
    a += args.a_column;
    b += args.b_row;
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      std::memcpy(c + r * args.c_row + v * kLanes, &sums[r][v], kBytes);
    }
  }
}

// The columns of b that a tile reads stay in the first-level cache for all rows of a.
template <class C, int kBytes, int kVectors>
NTKCL_INLINE void compute(const SmallMatmul<C>& args) {
  constexpr int64_t kColumns = kVectors * kBytes / static_cast<int64_t>(sizeof(C));
  int64_t column = 0;
  for (; column + kColumns <= args.n; column += kColumns) {
    for (int64_t row = 0; row < args.m; row += kTileRows) {
      compute_tile<C, kBytes, kVectors>(args, row, column);
    }
  }
  for (; column < args.n; column += kColumns / kVectors) {
    for (int64_t row = 0; row < args.m; row += kTileRows) {
      compute_tile<C, kBytes, 1>(args, row, column);
    }
  }
}

#ifdef NTKCL_X86_VERSIONS
// The same of bfloat16 pairs.
template <int kVectors>
NTKCL_X86_BF16 NTKCL_INLINE void compute_pairs_tile(const SmallMatmul<BFloat16Pair>& args,
                                                    int64_t row, int64_t column) {
  constexpr int kLanes = 16;
  const BFloat16Pair* a = args.a + row * args.a_row;
  const BFloat16Pair* b = args.b + column;
  float* c = args.c + row * args.c_row + column;
  __m512 sums[kTileRows][kVectors];
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] =
          args.add ? _mm512_loadu_ps(c + r * args.c_row + v * kLanes) : _mm512_setzero_ps();
    }
  }
  for (int64_t j = 0; j < args.k; ++j) {
    __m512i factors[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      factors[v] = _mm512_loadu_si512(b + v * kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      int pair;
      std::memcpy(&pair, a + r * args.a_row, sizeof(pair));
      const __m512i spread = _mm512_set1_epi32(pair);
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)spread, (__m512bh)factors[v]);
      }
    }
    a += args.a_column;
    b += args.b_row;
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      _mm512_storeu_ps(c + r * args.c_row + v * kLanes, sums[r][v]);
    }
  }
}

NTKCL_X86_BF16 void compute_pairs(const SmallMatmul<BFloat16Pair>& args) {
  int64_t column = 0;
  for (; column + 2 * kTileColumns <= args.n; column += 2 * kTileColumns) {
    for (int64_t row = 0; row < args.m; row += kTileRows) {
      compute_pairs_tile<2>(args, row, column);
    }
  }
  for (; column < args.n; column += kTileColumns) {
    for (int64_t row = 0; row < args.m; row += kTileRows) {
      compute_pairs_tile<1>(args, row, column);
    }
  }
}

template <class C>
NTKCL_X86_V4 void compute_v4(const SmallMatmul<C>& args) {
  compute<C, 64, 2>(args);
}
template <class C>
NTKCL_X86_V3 void compute_v3(const SmallMatmul<C>& args) {
  compute<C, 32, 1>(args);
}
#endif

template <class C>
void compute_baseline(const SmallMatmul<C>& args) {
  compute<C, 16, 1>(args);
}

}  // namespace

template <class C>
std::vector<SmallMatmulVersion<C>> small_matmul_versions() {
  std::vector<SmallMatmulVersion<C>> versions;
#ifdef NTKCL_X86_VERSIONS
  if (has_x86_v4()) {
    versions.push_back({"x86-64-v4", compute_v4<C>});
  }
  if (has_x86_v3()) {
    versions.push_back({"x86-64-v3", compute_v3<C>});
  }
#endif
  versions.push_back({"baseline", compute_baseline<C>});
  return versions;
}

template <class C>
static auto best_version() {
  const auto versions = small_matmul_versions<C>();
  NTKCL_ASSERT(!versions.empty());
  return versions.front().function;
}

template <class C>
void small_matmul_cpu(const SmallMatmul<C>& args) {
  static const auto function = best_version<C>();
  function(args);
}

template std::vector<SmallMatmulVersion<float>> small_matmul_versions();
template std::vector<SmallMatmulVersion<double>> small_matmul_versions();
#ifdef NTKCL_X86_VERSIONS
template <>
std::vector<SmallMatmulVersion<BFloat16Pair>> small_matmul_versions() {
  std::vector<SmallMatmulVersion<BFloat16Pair>> versions;
  if (has_x86_bf16()) {
    versions.push_back({"avx512bf16", compute_pairs});
  }
  return versions;
}
#else
template <>
std::vector<SmallMatmulVersion<BFloat16Pair>> small_matmul_versions() {
  return {};
}
#endif

template void small_matmul_cpu(const SmallMatmul<float>&);
template void small_matmul_cpu(const SmallMatmul<double>&);
template void small_matmul_cpu(const SmallMatmul<BFloat16Pair>&);

}  // namespace ntkcl::kernels
