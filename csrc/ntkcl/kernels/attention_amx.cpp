#include "ntkcl/kernels/attention_amx.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ntkcl/core/error.h"
#include "ntkcl/kernels/bfloat16_x86.h"
#include "ntkcl/kernels/exp.h"
#include "ntkcl/kernels/multiversion.h"
#include "ntkcl/kernels/scratch.h"

#if defined(NTKCL_X86_VERSIONS) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define NTKCL_HAS_AMX
#endif

// Sixteen queries of a head at a time, side by side in the lanes of a vector: scores are
// (keys, 16), so that softmaxes run down columns without sums across lanes, prompts are a range of
// rows, and weights are at hand for every product that needs them:
//
//   scores^T = K Q^T                    (keys, 16)      dweights^T = V dO^T
//   O^T      = V^T weights^T            (width, 16)     dQ^T       = K^T dscores^T
//   dV       = weights^T dO             (keys, width)   dK         = dscores^T Q
//
// A tile register holds 16 rows of 64 bytes. Of a product it is 16 x 16 sums, 16 rows of the left
// factor with 32 numbers each, or 32 rows of the right factor, 16 columns, as 16 rows of pairs.
namespace ntkcl::kernels {

#ifdef NTKCL_HAS_AMX
namespace {

constexpr int64_t kTile = 16;      // rows of a tile; sums or pairs in one of them
constexpr int64_t kStep = 32;      // numbers that one product of tiles sums over
constexpr int64_t kRowBytes = 64;  // of a tile
constexpr int kRegisters = 6;
// The backward pass keeps all weights, which grow as the square: beside the cache from here on.
constexpr int64_t kMostTokens = 1024;

// ---- Products of tiles ----

// What ldtilecfg reads: all tiles whole.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The compiler does not know what tile instructions read: what was written before is in memory now,
// and what is written after is not yet.
NTKCL_INLINE void fence() {
  __asm__ volatile("" : : : "memory");
}

NTKCL_X86_AMX void begin_tiles() {
  TileShapes shapes;
  std::fill_n(shapes.row_bytes, kRegisters, static_cast<uint16_t>(kRowBytes));
  std::fill_n(shapes.rows, kRegisters, static_cast<uint8_t>(kTile));
  fence();
  _tile_loadconfig(&shapes);
  fence();
}

NTKCL_X86_AMX void end_tiles() {
  _tile_release();
}

// c = a b, 16 columns of it. a: rows of numbers; b: rows of pairs, each of two rows of numbers; all
// in whole tiles.
struct TileProduct {
  const BFloat16* a;
  int64_t a_row;  // numbers
  const int32_t* b;
  int64_t b_row;  // pairs
  float* c;
  int64_t c_row;
  int64_t rows;
  int64_t steps;  // of 32 numbers, along the sums
};

#define NTKCL_A 4
#define NTKCL_B 5
#define NTKCL_FOR_TILES(run)  \
  run(0);                     \
  if constexpr (kTiles > 1) { \
    run(1);                   \
    run(2);                   \
    run(3);                   \
  }

// kTiles tiles of c, one below the other: they stay in registers 0 to 3.
template <int kTiles>
NTKCL_X86_AMX NTKCL_INLINE void compute_tiles(const TileProduct& p, int64_t row) {
  const BFloat16* a = p.a + row * p.a_row;
  float* c = p.c + row * p.c_row;
  const int64_t a_bytes = p.a_row * 2, b_bytes = p.b_row * 4, c_bytes = p.c_row * 4;
  const int64_t a_tile = kTile * p.a_row, c_tile = kTile * p.c_row;
#define NTKCL_ZERO(t) _tile_zero(t)
  NTKCL_FOR_TILES(NTKCL_ZERO)
  for (int64_t step = 0; step < p.steps; ++step) {
    _tile_loadd(NTKCL_B, p.b + step * kTile * p.b_row, b_bytes);
#define NTKCL_MULTIPLY(t)                                         \
  _tile_loadd(NTKCL_A, a + a_tile * (t) + step * kStep, a_bytes); \
  _tile_dpbf16ps(t, NTKCL_A, NTKCL_B)
    NTKCL_FOR_TILES(NTKCL_MULTIPLY)
  }
#define NTKCL_STORE(t) _tile_stored(t, c + c_tile * (t), c_bytes)
  NTKCL_FOR_TILES(NTKCL_STORE)
#undef NTKCL_ZERO
#undef NTKCL_MULTIPLY
#undef NTKCL_STORE
}
#undef NTKCL_A
#undef NTKCL_B
#undef NTKCL_FOR_TILES

NTKCL_X86_AMX void multiply(const TileProduct& p) {
  fence();
  int64_t row = 0;
  for (; row + 4 * kTile <= p.rows; row += 4 * kTile) {
    compute_tiles<4>(p, row);
  }
  for (; row < p.rows; row += kTile) {
    compute_tiles<1>(p, row);
  }
  fence();
}

// ---- Rows of bfloat16 ----

// x[i][j] = x[j][i], 16 x 16.
NTKCL_X86_AMX NTKCL_INLINE void transpose(__m512i (&x)[16]) {
  __m512i y[16];
  // Pairs of rows, pairs of pairs, and then quarters of rows twice.
#pragma GCC unroll 8
  for (int j = 0; j < 16; j += 2) {
    y[j] = _mm512_maskz_unpacklo_epi32(kAllLanes, x[j], x[j + 1]);
    y[j + 1] = _mm512_maskz_unpackhi_epi32(kAllLanes, x[j], x[j + 1]);
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
    const __m512i low = _mm512_maskz_shuffle_i32x4(kAllLanes, x[i], x[i + 4], 0x88);
    const __m512i high = _mm512_maskz_shuffle_i32x4(kAllLanes, x[i + 8], x[i + 12], 0x88);
    const __m512i low_odd = _mm512_maskz_shuffle_i32x4(kAllLanes, x[i], x[i + 4], 0xDD);
    const __m512i high_odd = _mm512_maskz_shuffle_i32x4(kAllLanes, x[i + 8], x[i + 12], 0xDD);
    y[i] = _mm512_maskz_shuffle_i32x4(kAllLanes, low, high, 0x88);
    y[i + 4] = _mm512_maskz_shuffle_i32x4(kAllLanes, low_odd, high_odd, 0x88);
    y[i + 8] = _mm512_maskz_shuffle_i32x4(kAllLanes, low, high, 0xDD);
    y[i + 12] = _mm512_maskz_shuffle_i32x4(kAllLanes, low_odd, high_odd, 0xDD);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    x[i] = y[i];
  }
}

// Some rows of a head's queries, keys, values or gradient, as they lie among packed tokens. Those
// behind the last one are zero.
struct HeadRows {
  const BFloat16* first;
  int64_t stride, count, width;

  const BFloat16* row(int64_t i) const { return first + i * stride; }

  // Pairs of 16 columns of rows i and i + 1.
  NTKCL_X86_AMX NTKCL_INLINE __m512i pairs(int64_t i, int64_t column) const {
    const __m512i none = _mm512_setzero_si512();
    const __m512i first_row = i < count ? lower_halves(row(i) + column) : none;
    const __m512i second = i + 1 < count ? lower_halves(row(i + 1) + column) : none;
    return _mm512_or_si512(first_row, _mm512_maskz_slli_epi32(kAllLanes, second, 16));
  }

  // (rows, width), side by side.
  NTKCL_X86_AMX void copy(int64_t rows, BFloat16* to) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t column = 0; column < width; column += kStep) {
        const __m512i x = i < count ? _mm512_loadu_si512(row(i) + column) : _mm512_setzero_si512();
        _mm512_store_si512(to + i * width + column, x);
      }
    }
  }

  // (rows / 2, width) of pairs.
  NTKCL_X86_AMX void copy_pairs(int64_t rows, int32_t* to) const {
    for (int64_t i = 0; i < rows; i += 2) {
      for (int64_t column = 0; column < width; column += kTile) {
        _mm512_store_si512(to + i / 2 * width + column, pairs(i, column));
      }
    }
  }

  // (width, rows)
  NTKCL_X86_AMX void copy_transposed(int64_t rows, BFloat16* to) const {
    for (int64_t i = 0; i < rows; i += kStep) {
      for (int64_t column = 0; column < width; column += kTile) {
        __m512i x[16];
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
          x[j] = pairs(i + 2 * j, column);
        }
        transpose(x);
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
          _mm512_store_si512(to + (column + j) * rows + i, x[j]);
        }
      }
    }
  }

  // (width / 2, 16) of pairs: rows `begin` to begin + 16 in columns.
  NTKCL_X86_AMX void copy_columns(int64_t begin, int32_t* to) const {
    for (int64_t column = 0; column < width; column += kStep) {
      __m512i x[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        const int64_t i = begin + j;
        x[j] = i < count ? _mm512_loadu_si512(row(i) + column) : _mm512_setzero_si512();
      }
      transpose(x);
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        _mm512_store_si512(to + (column / 2 + j) * kTile, x[j]);
      }
    }
  }
};

// c (width, 16) times factor, as the first `count` of 16 rows.
NTKCL_X86_AMX void store_columns(const float* c, float factor, int64_t count, int64_t width,
                                 BFloat16* to, int64_t stride) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int64_t column = 0; column < width; column += kStep) {
    __m512i x[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      const float* pair = c + (column + 2 * j) * kTile;
      x[j] = as_pairs(rounded_pair(_mm512_load_ps(pair) * f, _mm512_load_ps(pair + kTile) * f));
    }
    transpose(x);
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      if (j < count) {
        _mm512_storeu_si512(to + j * stride + column, x[j]);
      }
    }
  }
}

// c (16, width) times factor, its first `count` rows.
NTKCL_X86_AMX void store_rows(const float* c, float factor, int64_t count, int64_t width,
                              BFloat16* to, int64_t stride) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t column = 0; column < width; column += kStep) {
      const float* x = c + i * width + column;
      _mm512_storeu_si512(to + i * stride + column,
                          rounded_pair(_mm512_load_ps(x) * f, _mm512_load_ps(x + kTile) * f));
    }
  }
}

// ---- Softmaxes down the columns of scores (keys, 16) ----

// 2^x for x <= 0; 0 below what exp_of() takes for 0. NaN stays NaN.
NTKCL_X86_AMX NTKCL_INLINE __m512 power(__m512 x) {
  const __m512 end = _mm512_set1_ps(kExpEnd * kLog2E);
  return power_near(_mm512_cmp_ps_mask(x, end, _CMP_NLT_UQ), x);
}

NTKCL_X86_AMX NTKCL_INLINE __m512 larger(__m512 a, __m512 b) {
  return _mm512_maskz_max_ps(kAllLanes, a, b);
}

// The keys that share a softmax: two ranges of rows.
struct Keys {
  int64_t ranges[2][2];
};

// What a softmax leaves beside the powers of its scores, by query.
struct Softmax {
  __m512 share;  // 1 / sum of powers
  __m512 along;  // sum of weights * dweights, where these are given
};

// Turns scores into 2^(exponent * (score - the largest)).
NTKCL_X86_AMX NTKCL_INLINE Softmax softmax(const Keys& keys, float exponent, float* scores,
                                           const float* dweights) {
  const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 largest[4] = {none, none, none, none};
  for (const auto& [first, last] : keys.ranges) {
    int64_t key = first;
    for (; key + 4 <= last; key += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        largest[i] = larger(_mm512_load_ps(scores + (key + i) * kTile), largest[i]);
      }
    }
    for (; key < last; ++key) {
      largest[0] = larger(_mm512_load_ps(scores + key * kTile), largest[0]);
    }
  }
  const __m512 most = larger(larger(largest[0], largest[1]), larger(largest[2], largest[3]));
  __m512 sum = _mm512_setzero_ps(), dot = _mm512_setzero_ps();
  for (const auto& [first, last] : keys.ranges) {
    for (int64_t key = first; key < last; ++key) {
      const __m512 below = _mm512_load_ps(scores + key * kTile) - most;  // exactly 0 of the largest
      const __m512 x = power(below * _mm512_set1_ps(exponent));
      _mm512_store_ps(scores + key * kTile, x);
      sum += x;
      if (dweights) {
        dot = _mm512_fmadd_ps(x, _mm512_load_ps(dweights + key * kTile), dot);
      }
    }
  }
  const __m512 share = _mm512_set1_ps(1.0F) / sum;
  return {share, dot * share};
}

// ---- One head of one image ----

struct Sizes {
  int64_t tokens, prompts, width;
  int64_t rows;    // tokens in whole tiles
  int64_t padded;  // and in whole steps
  float scale, exponent;

  explicit Sizes(const AttentionSizes& s)
      : tokens(s.tokens),
        prompts(s.prompts),
        width(s.width),
        rows(rounded_up(s.tokens, kTile)),
        padded(rounded_up(s.tokens, kStep)),
        scale(1.0F / std::sqrt(static_cast<float>(s.width))),
        exponent(scale * kLog2E) {}

  Keys all_but_prompts() const { return {{{0, 1}, {prompts + 1, tokens}}}; }
  Keys of_prompts() const { return {{{1, prompts + 1}, {0, 0}}}; }
};

// The softmaxes of 16 queries; a prompt's share has the gate in it.
struct Softmaxes {
  Softmax others, prompts;
  int64_t count;  // of prompts

  NTKCL_X86_AMX NTKCL_INLINE Softmaxes(const Sizes& s, float gate, float* scores,
                                       const float* dweights)
      : others(softmax(s.all_but_prompts(), s.exponent, scores, dweights)),
        prompts(others),
        count(s.prompts) {
    if (count > 0) {
      prompts = softmax(s.of_prompts(), s.exponent, scores, dweights);
      prompts.share *= _mm512_set1_ps(gate);
    }
  }

  NTKCL_X86_AMX NTKCL_INLINE const Softmax& of(int64_t key) const {
    return 1 <= key && key <= count ? prompts : others;
  }
};

// All rows of a head among packed tokens of `parts` projections.
HeadRows rows_of(const AttentionSizes& s, const BFloat16* packed, int64_t matrix, int64_t part,
                 int64_t parts) {
  return {packed + s.at(matrix, 0, part, parts), parts * s.columns(), s.tokens, s.width};
}

struct ForwardMemory {
  BFloat16 *keys, *values;     // (rows, width), (width, padded)
  int32_t *queries, *weights;  // (width / 2, 16), (padded / 2, 16)
  float *scores, *mixed;       // (rows, 16), (width, 16)

  ForwardMemory(Scratch& scratch, const Sizes& s)
      : keys(scratch.take<BFloat16>(s.rows, s.width)),
        values(scratch.take<BFloat16>(s.width, s.padded)),
        queries(scratch.take<int32_t>(s.width / 2, kTile)),
        weights(scratch.take<int32_t>(s.padded / 2, kTile)),
        scores(scratch.take<float>(s.rows, kTile)),
        mixed(scratch.take<float>(s.width, kTile)) {}
};

// The weights of 16 queries as pairs of keys.
NTKCL_X86_AMX void forward_weights(const Sizes& s, const ForwardMemory& m, float gate) {
  const Softmaxes softmaxes(s, gate, m.scores, nullptr);
  const auto weight = [&](int64_t key) NTKCL_X86_AMX NTKCL_INLINE_LAMBDA -> __m512 {
    return key < s.tokens ? _mm512_load_ps(m.scores + key * kTile) * softmaxes.of(key).share
                          : _mm512_setzero_ps();
  };
  for (int64_t key = 0; key < s.tokens; key += 2) {
    _mm512_store_si512(m.weights + key / 2 * kTile,
                       as_pairs(rounded_pair(weight(key), weight(key + 1))));
  }
}

// Rows first .. last of x become zero.
template <class E>
void clear_rows(E* x, int64_t first, int64_t last, int64_t columns) {
  std::fill(x + first * columns, x + last * columns, E{});
}

NTKCL_X86_AMX void forward_head(const Attention<BFloat16>& args, const Sizes& s,
                                const ForwardMemory& m, int64_t matrix) {
  const AttentionSizes& sizes = args.sizes;
  const float gate = args.gate ? load(args.gate[matrix % sizes.heads]) : 1.0F;
  const HeadRows queries = rows_of(sizes, args.qkv, matrix, 0, 3);
  rows_of(sizes, args.qkv, matrix, 1, 3).copy(s.rows, m.keys);
  rows_of(sizes, args.qkv, matrix, 2, 3).copy_transposed(s.padded, m.values);
  for (int64_t begin = 0; begin < s.tokens; begin += kTile) {
    queries.copy_columns(begin, m.queries);
    multiply({m.keys, s.width, m.queries, kTile, m.scores, kTile, s.rows, s.width / kStep});
    forward_weights(s, m, gate);
    multiply({m.values, s.padded, m.weights, kTile, m.mixed, kTile, s.width, s.padded / kStep});
    store_columns(m.mixed, 1.0F, s.tokens - begin, s.width,
                  args.out + sizes.at(matrix, begin, 0, 1), sizes.columns());
  }
}

constexpr int64_t kKeys = 4 * kTile;  // whose gradients are in work at a time

struct BackwardMemory {
  BFloat16 *keys, *values, *keys_transposed;  // (rows, width) twice, (width, padded)
  BFloat16 *weights, *dscores;                // (rows, padded): by key and query
  int32_t *queries, *dmixed;                  // (padded / 2, width)
  int32_t *queries_of_tile, *dmixed_of_tile;  // (width / 2, 16)
  int32_t* dscores_of_tile;                   // (padded / 2, 16)
  float *scores, *dweights, *dqueries;        // (rows, 16) twice, (width, 16)
  float* by_key;                              // (kKeys, width): gradient of keys or values

  BackwardMemory(Scratch& scratch, const Sizes& s)
      : keys(scratch.take<BFloat16>(s.rows, s.width)),
        values(scratch.take<BFloat16>(s.rows, s.width)),
        keys_transposed(scratch.take<BFloat16>(s.width, s.padded)),
        weights(scratch.take<BFloat16>(s.rows, s.padded)),
        dscores(scratch.take<BFloat16>(s.rows, s.padded)),
        queries(scratch.take<int32_t>(s.padded / 2, s.width)),
        dmixed(scratch.take<int32_t>(s.padded / 2, s.width)),
        queries_of_tile(scratch.take<int32_t>(s.width / 2, kTile)),
        dmixed_of_tile(scratch.take<int32_t>(s.width / 2, kTile)),
        dscores_of_tile(scratch.take<int32_t>(s.padded / 2, kTile)),
        scores(scratch.take<float>(s.rows, kTile)),
        dweights(scratch.take<float>(s.rows, kTile)),
        dqueries(scratch.take<float>(s.width, kTile)),
        by_key(scratch.take<float>(kKeys, s.width)) {}
};

// The halves of x, to `to` and to the row behind it.
NTKCL_X86_AMX NTKCL_INLINE void store_halves(BFloat16* to, int64_t row, __m512i x) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_extracti64x4_epi64(0xF, x, 0));
  _mm256_store_si256(reinterpret_cast<__m256i*>(to + row),
                     _mm512_maskz_extracti64x4_epi64(0xF, x, 1));
}

// The weights of queries `begin` to begin + 16 and the gradients of their scores, in the columns of
// the matrices by key and query; the latter as pairs of keys, too. Returns the gate's gradient.
NTKCL_X86_AMX double backward_weights(const Sizes& s, const BackwardMemory& m, float gate,
                                      int64_t begin) {
  const Softmaxes softmaxes(s, gate, m.scores, m.dweights);
  const int64_t count = std::min(kTile, s.tokens - begin);
  // What stands behind the last query or key is 0, also where a key or value is infinite.
  const auto queries = static_cast<__mmask16>((1U << count) - 1);
  struct Both {
    __m512 weight, dscore;
  };
  const auto both = [&](int64_t key) NTKCL_X86_AMX NTKCL_INLINE_LAMBDA -> Both {
    if (key >= s.tokens) {
      return {_mm512_setzero_ps(), _mm512_setzero_ps()};
    }
    const Softmax& part = softmaxes.of(key);
    const __m512 scores = _mm512_maskz_load_ps(queries, m.scores + key * kTile);
    const __m512 weight = _mm512_maskz_mul_ps(queries, scores, part.share);
    const __m512 dweight = _mm512_load_ps(m.dweights + key * kTile) - part.along;
    return {weight, _mm512_maskz_mul_ps(queries, weight, dweight)};
  };
  for (int64_t key = 0; key < s.tokens; key += 2) {
    const Both first = both(key), second = both(key + 1);
    const int64_t at = key * s.padded + begin;
    store_halves(m.weights + at, s.padded, rounded_pair(first.weight, second.weight));
    const __m512i dscores = rounded_pair(first.dscore, second.dscore);
    store_halves(m.dscores + at, s.padded, dscores);
    _mm512_store_si512(m.dscores_of_tile + key / 2 * kTile, as_pairs(dscores));
  }
  double dgate = 0;
  for (int64_t query = 0; s.prompts > 0 && query < count; ++query) {
    dgate += softmaxes.prompts.along[query];
  }
  return dgate;
}

// The gradient of a head's keys or values: weights^T or dscores^T (keys, queries) times `rows`,
// some keys at a time, which stay in the first-level cache.
NTKCL_X86_AMX void store_by_key(const Sizes& s, const BackwardMemory& m, const BFloat16* by_query,
                                const int32_t* rows, float factor, BFloat16* to, int64_t stride) {
  for (int64_t key = 0; key < s.tokens; key += kKeys) {
    for (int64_t column = 0; column < s.width; column += kTile) {
      multiply({by_query + key * s.padded, s.padded, rows + column, s.width, m.by_key + column,
                s.width, std::min(kKeys, s.rows - key), s.padded / kStep});
    }
    store_rows(m.by_key, factor, std::min(kKeys, s.tokens - key), s.width, to + key * stride,
               stride);
  }
}

NTKCL_X86_AMX void backward_head(const AttentionBackward<BFloat16>& args, const Sizes& s,
                                 const BackwardMemory& m, int64_t matrix) {
  const AttentionSizes& sizes = args.sizes;
  const float gate = args.gate ? load(args.gate[matrix % sizes.heads]) : 1.0F;
  const HeadRows queries = rows_of(sizes, args.qkv, matrix, 0, 3),
                 keys = rows_of(sizes, args.qkv, matrix, 1, 3),
                 dmixed = rows_of(sizes, args.grad, matrix, 0, 1);
  keys.copy(s.rows, m.keys);
  keys.copy_transposed(s.padded, m.keys_transposed);
  rows_of(sizes, args.qkv, matrix, 2, 3).copy(s.rows, m.values);
  queries.copy_pairs(s.padded, m.queries);
  dmixed.copy_pairs(s.padded, m.dmixed);

  double dgate = 0;
  const int64_t stride = 3 * sizes.columns();
  for (int64_t begin = 0; begin < s.tokens; begin += kTile) {
    queries.copy_columns(begin, m.queries_of_tile);
    dmixed.copy_columns(begin, m.dmixed_of_tile);
    multiply({m.keys, s.width, m.queries_of_tile, kTile, m.scores, kTile, s.rows, s.width / kStep});
    multiply(
        {m.values, s.width, m.dmixed_of_tile, kTile, m.dweights, kTile, s.rows, s.width / kStep});
    dgate += backward_weights(s, m, gate, begin);
    multiply({m.keys_transposed, s.padded, m.dscores_of_tile, kTile, m.dqueries, kTile, s.width,
              s.padded / kStep});
    store_columns(m.dqueries, s.scale, s.tokens - begin, s.width,
                  args.dqkv + sizes.at(matrix, begin, 0, 3), stride);
  }
  store_by_key(s, m, m.dscores, m.queries, s.scale, args.dqkv + sizes.at(matrix, 0, 1, 3), stride);
  store_by_key(s, m, m.weights, m.dmixed, 1.0F, args.dqkv + sizes.at(matrix, 0, 2, 3), stride);
  if (args.dgate) {
    args.dgate[matrix] = dgate;
  }
}

bool ask_for_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBFloat16Bit = 1U << 22, kTileBit = 1U << 24;
  if (!has_x86_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBFloat16Bit) ||
      !(d & kTileBit)) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool attention_has_tiles(const AttentionSizes& sizes) {
  static const bool has = ask_for_amx();
  return has && sizes.width % kStep == 0 && sizes.tokens <= kMostTokens;
}

int64_t attention_amx_scratch(const AttentionSizes& sizes) {
  Scratch scratch(nullptr);
  ForwardMemory(scratch, Sizes(sizes));
  return scratch.used();
}

int64_t attention_backward_amx_scratch(const AttentionSizes& sizes) {
  Scratch scratch(nullptr);
  BackwardMemory(scratch, Sizes(sizes));
  return scratch.used();
}

void attention_amx(const Attention<BFloat16>& args, int64_t first, int64_t last,
                   std::byte* memory) {
  const Sizes s(args.sizes);
  Scratch scratch(memory);
  const ForwardMemory m(scratch, s);
  // What products read behind the last key.
  clear_rows(m.weights, s.tokens / 2, s.padded / 2, kTile);
  begin_tiles();
  for (int64_t matrix = first; matrix < last; ++matrix) {
    forward_head(args, s, m, matrix);
  }
  end_tiles();
}

void attention_backward_amx(const AttentionBackward<BFloat16>& args, int64_t first, int64_t last,
                            std::byte* memory) {
  const Sizes s(args.sizes);
  Scratch scratch(memory);
  const BackwardMemory m(scratch, s);
  // What products read behind the last query and key.
  clear_rows(m.weights, 0, s.rows, s.padded);
  clear_rows(m.dscores, 0, s.rows, s.padded);
  clear_rows(m.dscores_of_tile, s.tokens / 2, s.padded / 2, kTile);
  begin_tiles();
  for (int64_t matrix = first; matrix < last; ++matrix) {
    backward_head(args, s, m, matrix);
  }
  end_tiles();
}
#else

bool attention_has_tiles(const AttentionSizes&) {
  return false;
}

int64_t attention_amx_scratch(const AttentionSizes&) {
  return 0;
}

int64_t attention_backward_amx_scratch(const AttentionSizes&) {
  return 0;
}

// attention_has_tiles() says no.
void attention_amx(const Attention<BFloat16>&, int64_t, int64_t, std::byte*) {
  NTKCL_ASSERT(false);
}

void attention_backward_amx(const AttentionBackward<BFloat16>&, int64_t, int64_t, std::byte*) {
  NTKCL_ASSERT(false);
}
#endif

}  // namespace ntkcl::kernels
