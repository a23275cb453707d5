#include "ntkcl/kernels/small_matmul_amx.h"

#include "ntkcl/core/error.h"
#include "ntkcl/kernels/multiversion.h"

#if defined(NTKCL_X86_VERSIONS) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define NTKCL_HAS_AMX
#endif

// A tile register holds 16 rows of 64 bytes: 16 x 16 sums of float32, 16 rows of a with 16 pairs
// each, or 16 pairs along k of 16 columns of b, just as they lie. Up to four tiles of c stay in
// registers while k runs.
namespace ntkcl::kernels {

#ifdef NTKCL_HAS_AMX
namespace {

constexpr int64_t kTile = 16;  // rows of a tile, and elements in one of them
constexpr int64_t kBytes = 4;  // of an element, a pair or a sum

// Tile registers, which instructions name by number.
#define NTKCL_A 4
#define NTKCL_A_END 5  // the last elements of k, fewer than a tile's
#define NTKCL_B 6
#define NTKCL_B_END 7

// What ldtilecfg reads.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The compiler does not know what tile instructions read: what was written before is in memory now,
// and what is written after is not yet.
NTKCL_X86_AMX NTKCL_INLINE void fence(const void* memory) {
  __asm__ volatile("" : : "r"(memory) : "memory");
}

NTKCL_X86_AMX NTKCL_INLINE void set_shapes(int64_t rows, int64_t k_end) {
  TileShapes shapes;
  const auto set = [&](int tile, int64_t tile_rows, int64_t columns) {
    shapes.rows[tile] = static_cast<uint8_t>(tile_rows);
    shapes.row_bytes[tile] = static_cast<uint16_t>(columns * kBytes);
  };
  for (int tile = 0; tile < 4; ++tile) {
    set(tile, rows, kTile);
  }
  set(NTKCL_A, rows, kTile);
  set(NTKCL_B, kTile, kTile);
  if (k_end > 0) {
    set(NTKCL_A_END, rows, k_end);
    set(NTKCL_B_END, k_end, kTile);
  }
  fence(&shapes);
  _tile_loadconfig(&shapes);
  fence(&shapes);
}

// Instructions without a mask make gcc 12 warn of its headers.
constexpr __mmask16 kAll = 0xFFFF;

// to[i][j] = from[j][i], 16 x 16; from has `count` rows, its columns `column` apart.
NTKCL_X86_AMX NTKCL_INLINE void transpose(const BFloat16Pair* from, int64_t column, int64_t count,
                                          __mmask16 valid, int32_t (&to)[kTile][kTile]) {
  __m512i x[16], y[16];
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) {
    x[j] = j < count ? _mm512_maskz_loadu_epi32(valid, from + j * column) : _mm512_setzero_si512();
  }
  // Pairs of rows, pairs of pairs, and then quarters of rows twice.
#pragma GCC unroll 8
  for (int j = 0; j < 16; j += 2) {
    y[j] = _mm512_maskz_unpacklo_epi32(kAll, x[j], x[j + 1]);
    y[j + 1] = _mm512_maskz_unpackhi_epi32(kAll, x[j], x[j + 1]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 16; j += 4) {
    x[j] = _mm512_maskz_unpacklo_epi64(0xFF, y[j], y[j + 2]);
    x[j + 1] = _mm512_maskz_unpackhi_epi64(0xFF, y[j], y[j + 2]);
    x[j + 2] = _mm512_maskz_unpacklo_epi64(0xFF, y[j + 1], y[j + 3]);
    x[j + 3] = _mm512_maskz_unpackhi_epi64(0xFF, y[j + 1], y[j + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i low = _mm512_maskz_shuffle_i32x4(kAll, x[i], x[i + 4], 0x88);
    const __m512i high = _mm512_maskz_shuffle_i32x4(kAll, x[i + 8], x[i + 12], 0x88);
    const __m512i low_odd = _mm512_maskz_shuffle_i32x4(kAll, x[i], x[i + 4], 0xDD);
    const __m512i high_odd = _mm512_maskz_shuffle_i32x4(kAll, x[i + 8], x[i + 12], 0xDD);
    y[i] = _mm512_maskz_shuffle_i32x4(kAll, low, high, 0x88);
    y[i + 4] = _mm512_maskz_shuffle_i32x4(kAll, low_odd, high_odd, 0x88);
    y[i + 8] = _mm512_maskz_shuffle_i32x4(kAll, low, high, 0xDD);
    y[i + 12] = _mm512_maskz_shuffle_i32x4(kAll, low_odd, high_odd, 0xDD);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    _mm512_store_si512(to[i], y[i]);
  }
}

// Where a tile of a lies: in place, or transposed aside.
struct TileOfA {
  const void* first;
  int64_t stride;
};

NTKCL_X86_AMX NTKCL_INLINE TileOfA tile_of_a(const SmallMatmul<BFloat16Pair>& args, int64_t row,
                                             int64_t rows, int64_t k, int64_t count,
                                             int32_t (&aside)[kTile][kTile]) {
  const BFloat16Pair* a = args.a + row * args.a_row + k * args.a_column;
  if (args.a_column == 1) {
    return {a, args.a_row * kBytes};
  }
  transpose(a, args.a_column, count, static_cast<__mmask16>((1U << rows) - 1), aside);
  fence(aside);
  return {aside, kTile * kBytes};
}

#define NTKCL_FOR_TILES(run)  \
  run(0);                     \
  if constexpr (kTiles > 1) { \
    run(1);                   \
  }                           \
  if constexpr (kTiles > 2) { \
    run(2);                   \
  }                           \
  if constexpr (kTiles > 3) { \
    run(3);                   \
  }

// kTiles tiles of c, side by side.
template <int kTiles>
NTKCL_X86_AMX NTKCL_INLINE void compute_tiles(const SmallMatmul<BFloat16Pair>& args, int64_t row,
                                              int64_t rows, int64_t column) {
  alignas(64) int32_t aside[kTile][kTile];
  float* c = args.c + row * args.c_row + column;
  const int64_t c_stride = args.c_row * kBytes, b_stride = args.b_row * kBytes;
#define NTKCL_LOAD(t) _tile_loadd(t, c + kTile * (t), c_stride)
#define NTKCL_ZERO(t) _tile_zero(t)
  if (args.add) {
    NTKCL_FOR_TILES(NTKCL_LOAD)
  } else {
    NTKCL_FOR_TILES(NTKCL_ZERO)
  }
  int64_t k = 0;
  for (; k + kTile <= args.k; k += kTile) {
    const TileOfA a = tile_of_a(args, row, rows, k, kTile, aside);
    const BFloat16Pair* b = args.b + k * args.b_row + column;
    _tile_loadd(NTKCL_A, a.first, a.stride);
    fence(a.first);
#define NTKCL_MULTIPLY(t)                          \
  _tile_loadd(NTKCL_B, b + kTile * (t), b_stride); \
  _tile_dpbf16ps(t, NTKCL_A, NTKCL_B)
    NTKCL_FOR_TILES(NTKCL_MULTIPLY)
  }
  if (k < args.k) {
    const TileOfA a = tile_of_a(args, row, rows, k, args.k - k, aside);
    const BFloat16Pair* b = args.b + k * args.b_row + column;
    _tile_loadd(NTKCL_A_END, a.first, a.stride);
    fence(a.first);
#define NTKCL_MULTIPLY_END(t)                          \
  _tile_loadd(NTKCL_B_END, b + kTile * (t), b_stride); \
  _tile_dpbf16ps(t, NTKCL_A_END, NTKCL_B_END)
    NTKCL_FOR_TILES(NTKCL_MULTIPLY_END)
  }
#define NTKCL_STORE(t) _tile_stored(t, c + kTile * (t), c_stride)
  NTKCL_FOR_TILES(NTKCL_STORE)
#undef NTKCL_LOAD
#undef NTKCL_ZERO
#undef NTKCL_MULTIPLY
#undef NTKCL_MULTIPLY_END
#undef NTKCL_STORE
}

NTKCL_X86_AMX NTKCL_INLINE void compute_rows(const SmallMatmul<BFloat16Pair>& args, int64_t row,
                                             int64_t rows) {
  int64_t column = 0;
  for (; column + 4 * kTile <= args.n; column += 4 * kTile) {
    compute_tiles<4>(args, row, rows, column);
  }
  for (; column < args.n; column += kTile) {
    compute_tiles<1>(args, row, rows, column);
  }
}

bool ask_for_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBFloat16 = 1U << 22, kTiles = 1U << 24;
  if (!has_bfloat16_products() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBFloat16) ||
      !(d & kTiles)) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool has_amx() {
  static const bool has = ask_for_amx();
  return has;
}

NTKCL_X86_AMX void small_matmul_amx(const SmallMatmul<BFloat16Pair>& args) {
  NTKCL_ASSERT(args.a_row == 1 || args.a_column == 1);
  fence(&args);
  const int64_t m = in_tiles(args.m, kTileRows), k_end = args.k % kTile, whole = m / kTile * kTile;
  if (whole > 0) {
    set_shapes(kTile, k_end);
    for (int64_t row = 0; row < whole; row += kTile) {
      compute_rows(args, row, kTile);
    }
  }
  if (whole < m) {
    set_shapes(m - whole, k_end);
    compute_rows(args, whole, m - whole);
  }
  _tile_release();
}
#else

bool has_amx() {
  return false;
}

void small_matmul_amx(const SmallMatmul<BFloat16Pair>&) {
  NTKCL_ASSERT(false);  // has_amx() says no
}
#endif

}  // namespace ntkcl::kernels
