#include "ntkcl/kernels/attention_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "ntkcl/kernels/attention_amx.h"
#include "ntkcl/kernels/bfloat16_x86.h"
#include "ntkcl/kernels/exp.h"
#include "ntkcl/kernels/lanes.h"
#include "ntkcl/kernels/scratch.h"
#include "ntkcl/kernels/small_matmul_cpu.h"

// Head by head, with everything of a head in the second-level cache: per query and head
// 4 * tokens * width FLOPs forward, 10 backward, and from memory only qkv, out and their gradients.

namespace ntkcl::kernels {
namespace {

// x = softmax(factor * x), factor > 0. A NaN or a positive infinity makes all of x NaN; a negative
// infinity has weight 0. T tells how exact the weights have to be.
template <class T, class C = Compute<T>>
NTKCL_INLINE void softmax_loop(C* x, C factor, int64_t n) {
  // The last lanes are filled up, as short loops would cost more than whole ones.
  const int64_t whole = n / kLanes * kLanes;
  C last[kLanes];
  std::fill_n(last, kLanes, -std::numeric_limits<C>::infinity());
  std::copy_n(x + whole, n - whole, last);

  C lanes[kLanes];
  std::copy_n(last, kLanes, lanes);
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
    }
  }

  const C largest = largest_of(lanes);
  for (int lane = 0; lane < kLanes; ++lane) {
    last[lane] = exp_of(factor * (last[lane] - largest), T{});
    lanes[lane] = last[lane];
  }
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      x[i + lane] = exp_of(factor * (x[i + lane] - largest), T{});
      lanes[lane] += x[i + lane];
    }
  }

  const C share = C{1} / sum_of(lanes);
  for (int64_t i = 0; i < whole; ++i) {
    x[i] *= share;
  }
  for (C& value : last) {
    value *= share;
  }
  std::copy_n(last, n - whole, x + whole);
}

// grad = factor * y * (grad - sum(y * grad)), through y = softmax(x). Returns that sum.
template <class C>
NTKCL_INLINE C softmax_backward_loop(const C* __restrict__ y, C factor, C* __restrict__ grad,
                                     int64_t n) {
  const C along = dot_loop<C>(y, grad, n);
  for (int64_t i = 0; i < n; ++i) {
    grad[i] = factor * (y[i] * (grad[i] - along));
  }
  return along;
}

// Templates cannot be multiversioned; these instances of the loops above are. `T` tells how exact
// the weights have to be.
#define NTKCL_LOOPS(T)                                                                   \
  NTKCL_MULTIVERSION void softmax_row(Compute<T>* x, Compute<T> factor, int64_t n, T) {  \
    softmax_loop<T>(x, factor, n);                                                       \
  }                                                                                      \
  NTKCL_MULTIVERSION void store_row(const Compute<T>* __restrict__ x, Compute<T> factor, \
                                    T* __restrict__ y, int64_t n) {                      \
    for (int64_t i = 0; i < n; ++i) {                                                    \
      y[i] = store<T>(x[i] * factor);                                                    \
    }                                                                                    \
  }
NTKCL_LOOPS(float)
NTKCL_LOOPS(double)
NTKCL_LOOPS(BFloat16)
#undef NTKCL_LOOPS
#define NTKCL_LOOPS(C)                                                                  \
  NTKCL_MULTIVERSION C softmax_backward_row(const C* y, C factor, C* grad, int64_t n) { \
    return softmax_backward_loop<C>(y, factor, grad, n);                                \
  }
NTKCL_LOOPS(float)
NTKCL_LOOPS(double)
#undef NTKCL_LOOPS
NTKCL_MULTIVERSION void load_row(const BFloat16* __restrict__ x, float* __restrict__ y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] = load(x[i]);
  }
}

constexpr int64_t kQueryRows = 64;  // queries whose scores are in work at a time

// ---- Operands of matrix products, E: numbers as they are, or pairs of bfloat16 ----

template <class E>
constexpr int64_t elements(int64_t numbers) {  // that hold so many numbers
  return (numbers + Operand<E>::kNumbers - 1) / Operand<E>::kNumbers;
}

// Rows of q, k, v and the gradient lie at hand as numbers, or as bfloat16 where pairs are made of
// them.
template <class E>
struct RowElement {
  using type = E;
};
template <>
struct RowElement<BFloat16Pair> {
  using type = BFloat16;
};
template <class E>
using Row = typename RowElement<E>::type;

// What a product sums over the columns of x (rows, columns): (rows, columns / numbers).
template <class C>
const C* along_columns(const C* x, int64_t, C*) {
  return x;
}

// What a product sums over the rows of x (rows, columns): (rows / numbers, columns).
template <class C>
const C* along_rows(const C* x, int64_t, int64_t, C*) {
  return x;
}

// x (rows, columns) -> (columns, padded_rows), with zeros behind the rows.
template <class C>
void transpose(const C* x, int64_t rows, int64_t columns, int64_t padded_rows, C* to) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t row = 0; row < padded_rows; ++row) {
      to[j * padded_rows + row] = row < rows ? x[row * columns + j] : C{};
    }
  }
}

#ifdef NTKCL_X86_VERSIONS
// Sixteen columns at a time: all row lengths are multiples of kTileColumns.

NTKCL_X86_BF16 const BFloat16Pair* along_columns(const float* x, int64_t numbers,
                                                 BFloat16Pair* to) {
  for (int64_t i = 0; i < numbers; i += 16) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i / 2), (__m256i)rounded);
  }
  return to;
}

// Rows of bfloat16 are rows of pairs as they lie.
const BFloat16Pair* along_columns(const BFloat16* x, int64_t, BFloat16Pair*) {
  return reinterpret_cast<const BFloat16Pair*>(x);
}

template <class R>
NTKCL_X86_BF16 const BFloat16Pair* along_rows(const R* x, int64_t rows, int64_t columns,
                                              BFloat16Pair* to) {
  for (int64_t row = 0; row < rows; row += 2) {
    const R* first = x + row * columns;
    BFloat16Pair* pairs = to + row / 2 * columns;
    for (int64_t i = 0; i < columns; i += 16) {
      __m512i both = lower_halves(first + i);
      if (row + 1 < rows) {
        const __m512i second = lower_halves(first + columns + i);
        both = _mm512_or_si512(both, _mm512_maskz_slli_epi32(kAllLanes, second, 16));
      }
      _mm512_storeu_si512(pairs + i, both);
    }
  }
  return to;
}

// x (rows, columns) -> (columns / 2, padded_rows), with zeros behind the rows.
NTKCL_X86_BF16 void transpose(const BFloat16* x, int64_t rows, int64_t columns, int64_t padded_rows,
                              BFloat16Pair* to) {
  const int64_t pairs = columns / 2;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i offsets = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(pairs)));
  for (int64_t row = 0; row < padded_rows; row += 16) {
    const int64_t left = std::clamp<int64_t>(rows - row, 0, 16);
    const auto valid = static_cast<__mmask16>((1U << left) - 1);
    for (int64_t j = 0; j < pairs; ++j) {
      const __m512i column = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), valid, offsets,
                                                         x + row * columns + 2 * j, 4);
      _mm512_storeu_si512(to + j * padded_rows + row, column);
    }
  }
}
#endif

// ---- One head of one image ----

// Tile-padded sizes of its matrices.
struct Padded {
  int64_t tokens, keys, width;  // rows; columns of scores; columns of q, k, v

  explicit Padded(const AttentionSizes& sizes)
      : tokens(rounded_up(sizes.tokens, kTileRows)),
        keys(rounded_up(sizes.tokens, kTileColumns)),
        width(rounded_up(sizes.width, kTileColumns)) {}
};

// Keys and values stand in the order class token, patches, prompts, so that those attended to
// together are neighbours. All padding is zero.
template <class T, class R>
class Head {
 public:
  Head(const AttentionSizes& sizes, int64_t matrix)
      : sizes_(sizes), padded_(sizes), matrix_(matrix) {}

  // Offset of a token's row of this head among packed tokens of `parts` projections.
  int64_t at(int64_t token, int64_t part, int64_t parts) const {
    return sizes_.at(matrix_, token, part, parts);
  }

  int64_t token_of_key(int64_t row) const {
    const int64_t others = sizes_.tokens - sizes_.prompts;
    return row == 0 ? 0 : row < others ? row + sizes_.prompts : row - others + 1;
  }

  // Keys (part 1) or values (part 2): (tokens, width).
  void load_keys(const T* qkv, int64_t part, R* to) const {
    for (int64_t row = 0; row < sizes_.tokens; ++row) {
      load(qkv + at(token_of_key(row), part, 3), to + row * padded_.width);
    }
  }

  // Tokens first .. first + rows of projection `part`: (rows, width).
  void load_queries(const T* packed, int64_t part, int64_t parts, int64_t first, int64_t rows,
                    R* to) const {
    for (int64_t row = 0; row < rows; ++row) {
      load(packed + at(first + row, part, parts), to + row * padded_.width);
    }
  }

 private:
  void load(const T* from, R* to) const {
    if constexpr (std::is_same_v<T, R>) {
      std::copy_n(from, sizes_.width, to);
    } else {
      load_row(from, to, sizes_.width);
    }
    std::fill(to + sizes_.width, to + padded_.width, R{});
  }

  const AttentionSizes& sizes_;
  Padded padded_;
  int64_t matrix_;
};

// Softmaxes over a row of scores times factor: over all keys, or over prompts apart.
template <class T>
void softmax_parts(Compute<T>* scores, Compute<T> factor, const AttentionSizes& sizes) {
  const int64_t others = sizes.tokens - sizes.prompts;
  softmax_row(scores, factor, others, T{});
  if (sizes.prompts > 0) {
    softmax_row(scores + others, factor, sizes.prompts, T{});
  }
}

// Products of some queries with all keys, by operands of type E.
template <class E>
struct Products {
  using C = typename Operand<E>::Sum;
  const AttentionSizes& sizes;
  Padded p;
  int64_t rows;

  // a (rows, width) with b (width, keys), both along the width.
  void with_keys(const E* a, const E* b, C* c) const {
    multiply(a, p.width, b, p.keys, c, sizes.width);
  }

  // a (rows, keys) with b (keys, width), both along the keys.
  void over_keys(const E* a, const E* b, C* c) const {
    multiply(a, p.keys, b, p.width, c, sizes.tokens);
  }

  // Adds a^T (keys, rows) with b (rows, width), both along the rows.
  void add_over_rows(const E* a, const E* b, C* c) const {
    small_matmul_cpu<E>({.a = a,
                         .a_row = 1,
                         .a_column = p.keys,
                         .b = b,
                         .b_row = p.width,
                         .c = c,
                         .c_row = p.width,
                         .m = sizes.tokens,
                         .n = p.width,
                         .k = elements<E>(rows),
                         .add = true});
  }

 private:
  // a, stored with a_columns numbers in a row, times b of b_columns, over `numbers` of them.
  void multiply(const E* a, int64_t a_columns, const E* b, int64_t b_columns, C* c,
                int64_t numbers) const {
    small_matmul_cpu<E>({.a = a,
                         .a_row = a_columns / Operand<E>::kNumbers,
                         .b = b,
                         .b_row = b_columns,
                         .c = c,
                         .c_row = b_columns,
                         .m = rows,
                         .n = b_columns,
                         .k = elements<E>(numbers)});
  }
};

// ---- Forward ----

template <class E>
struct ForwardMemory {
  using C = typename Operand<E>::Sum;
  E *keys, *values, *weights;
  Row<E>*rows, *queries;
  C *weight_rows, *mixed;

  ForwardMemory(Scratch& scratch, const AttentionSizes& sizes) {
    const Padded p(sizes);
    keys = scratch.take<E>(p.width, p.keys);  // transposed
    values = scratch.take<E>(p.tokens, p.width);
    weights = scratch.take<E>(kQueryRows, p.keys);
    rows = scratch.take<Row<E>>(p.tokens, p.width);
    queries = scratch.take<Row<E>>(kQueryRows, p.width);
    weight_rows = scratch.take<C>(kQueryRows, p.keys);
    mixed = scratch.take<C>(kQueryRows, p.width);
  }
};

template <class T, class E>
void forward(const Attention<T>& args, int64_t first, int64_t last, std::byte* memory) {
  using C = Compute<T>;
  const AttentionSizes& sizes = args.sizes;
  const Padded p(sizes);
  const C scale = C{1} / std::sqrt(static_cast<C>(sizes.width));
  Scratch scratch(memory);
  const ForwardMemory<E> m(scratch, sizes);
  for (int64_t matrix = first; matrix < last; ++matrix) {
    const Head<T, Row<E>> head(sizes, matrix);
    head.load_keys(args.qkv, 1, m.rows);
    transpose(m.rows, sizes.tokens, p.width, p.keys, m.keys);
    head.load_keys(args.qkv, 2, m.rows);
    const E* values = along_rows(m.rows, sizes.tokens, p.width, m.values);
    const C gate = args.gate ? load(args.gate[matrix % sizes.heads]) : C{1};
    for (int64_t begin = 0; begin < sizes.tokens; begin += kQueryRows) {
      const int64_t rows = std::min(kQueryRows, sizes.tokens - begin);
      const Products<E> products{sizes, p, rows};
      head.load_queries(args.qkv, 0, 3, begin, rows, m.queries);
      products.with_keys(along_columns(m.queries, rows * p.width, m.weights), m.keys,
                         m.weight_rows);
      for (int64_t row = 0; row < rows; ++row) {
        C* weights = m.weight_rows + row * p.keys;
        softmax_parts<T>(weights, scale, sizes);
        for (int64_t key = sizes.tokens - sizes.prompts; key < sizes.tokens; ++key) {
          weights[key] *= gate;
        }
      }
      products.over_keys(along_columns(m.weight_rows, rows * p.keys, m.weights), values, m.mixed);
      for (int64_t row = 0; row < rows; ++row) {
        store_row(m.mixed + row * p.width, C{1}, args.out + head.at(begin + row, 0, 1),
                  sizes.width);
      }
    }
  }
}

// ---- Backward ----

template <class E>
struct BackwardMemory {
  using C = typename Operand<E>::Sum;
  E *keys_transposed, *values_transposed, *keys, *of_rows, *weights;
  Row<E>*rows, *queries, *dmixed;
  C *dkeys, *dvalues, *dqueries, *weight_rows, *dweight_rows;

  BackwardMemory(Scratch& scratch, const AttentionSizes& sizes) {
    const Padded p(sizes);
    keys_transposed = scratch.take<E>(p.width, p.keys);
    values_transposed = scratch.take<E>(p.width, p.keys);
    keys = scratch.take<E>(p.tokens, p.width);
    of_rows = scratch.take<E>(kQueryRows, p.width);
    weights = scratch.take<E>(kQueryRows, p.keys);
    rows = scratch.take<Row<E>>(p.tokens, p.width);
    queries = scratch.take<Row<E>>(kQueryRows, p.width);
    dmixed = scratch.take<Row<E>>(kQueryRows, p.width);
    dkeys = scratch.take<C>(p.tokens, p.width);
    dvalues = scratch.take<C>(p.tokens, p.width);
    dqueries = scratch.take<C>(kQueryRows, p.width);
    weight_rows = scratch.take<C>(kQueryRows, p.keys);
    dweight_rows = scratch.take<C>(kQueryRows, p.keys);
  }
};

// The weights are computed anew, which is cheaper than to have kept them.
template <class T, class E>
void backward(const AttentionBackward<T>& args, int64_t first, int64_t last, std::byte* memory) {
  using C = Compute<T>;
  const AttentionSizes& sizes = args.sizes;
  const Padded p(sizes);
  const int64_t others = sizes.tokens - sizes.prompts;
  const C scale = C{1} / std::sqrt(static_cast<C>(sizes.width));
  Scratch scratch(memory);
  const BackwardMemory<E> m(scratch, sizes);
  for (int64_t matrix = first; matrix < last; ++matrix) {
    const Head<T, Row<E>> head(sizes, matrix);
    head.load_keys(args.qkv, 2, m.rows);
    transpose(m.rows, sizes.tokens, p.width, p.keys, m.values_transposed);
    head.load_keys(args.qkv, 1, m.rows);
    transpose(m.rows, sizes.tokens, p.width, p.keys, m.keys_transposed);
    const E* keys = along_rows(m.rows, sizes.tokens, p.width, m.keys);
    std::fill_n(m.dkeys, p.tokens * p.width, C{0});
    std::fill_n(m.dvalues, p.tokens * p.width, C{0});
    const C gate = args.gate ? load(args.gate[matrix % sizes.heads]) : C{1};
    double dgate = 0;
    for (int64_t begin = 0; begin < sizes.tokens; begin += kQueryRows) {
      const int64_t rows = std::min(kQueryRows, sizes.tokens - begin);
      const Products<E> products{sizes, p, rows};
      head.load_queries(args.qkv, 0, 3, begin, rows, m.queries);
      head.load_queries(args.grad, 0, 1, begin, rows, m.dmixed);
      products.with_keys(along_columns(m.queries, rows * p.width, m.of_rows), m.keys_transposed,
                         m.weight_rows);
      products.with_keys(along_columns(m.dmixed, rows * p.width, m.of_rows), m.values_transposed,
                         m.dweight_rows);
      for (int64_t row = 0; row < rows; ++row) {
        C *weights = m.weight_rows + row * p.keys, *dweights = m.dweight_rows + row * p.keys;
        softmax_parts<T>(weights, scale, sizes);
        softmax_backward_row(weights, C{1}, dweights, others);
        if (sizes.prompts > 0) {
          dgate += softmax_backward_row(weights + others, gate, dweights + others, sizes.prompts);
        }
      }
      products.add_over_rows(along_rows(m.weight_rows, rows, p.keys, m.weights),
                             along_rows(m.dmixed, rows, p.width, m.of_rows), m.dvalues);
      products.add_over_rows(along_rows(m.dweight_rows, rows, p.keys, m.weights),
                             along_rows(m.queries, rows, p.width, m.of_rows), m.dkeys);
      products.over_keys(along_columns(m.dweight_rows, rows * p.keys, m.weights), keys, m.dqueries);
      for (int64_t row = 0; row < rows; ++row) {
        store_row(m.dqueries + row * p.width, scale, args.dqkv + head.at(begin + row, 0, 3),
                  sizes.width);
      }
    }
    for (int64_t row = 0; row < sizes.tokens; ++row) {
      const int64_t token = head.token_of_key(row);
      store_row(m.dkeys + row * p.width, scale, args.dqkv + head.at(token, 1, 3), sizes.width);
      store_row(m.dvalues + row * p.width, row < others ? C{1} : gate,
                args.dqkv + head.at(token, 2, 3), sizes.width);
    }
    if (args.dgate) {
      args.dgate[matrix] = dgate;
    }
  }
}

#ifdef NTKCL_X86_VERSIONS
template <class T>
constexpr bool kHasPairs = std::is_same_v<T, BFloat16>;
#else
template <class T>
constexpr bool kHasPairs = false;
#endif

}  // namespace

template <class T>
int64_t attention_scratch(const AttentionSizes& sizes) {
  if (kHasPairs<T> && attention_has_tiles(sizes)) {
    return attention_amx_scratch(sizes);
  }
  Scratch scratch(nullptr);
  ForwardMemory<Compute<T>>(scratch, sizes);
  return scratch.used();
}

template <class T>
int64_t attention_backward_scratch(const AttentionSizes& sizes) {
  if (kHasPairs<T> && attention_has_tiles(sizes)) {
    return attention_backward_amx_scratch(sizes);
  }
  Scratch scratch(nullptr);
  BackwardMemory<Compute<T>>(scratch, sizes);
  return scratch.used();
}

template <class T>
void attention_cpu(const Attention<T>& args, int64_t first, int64_t last, std::byte* scratch) {
  if constexpr (kHasPairs<T>) {
    if (attention_has_tiles(args.sizes)) {
      return attention_amx(args, first, last, scratch);
    }
    if (has_x86_bf16()) {
      return forward<T, BFloat16Pair>(args, first, last, scratch);
    }
  }
  forward<T, Compute<T>>(args, first, last, scratch);
}

template <class T>
void attention_backward_cpu(const AttentionBackward<T>& args, int64_t first, int64_t last,
                            std::byte* scratch) {
  if constexpr (kHasPairs<T>) {
    if (attention_has_tiles(args.sizes)) {
      return attention_backward_amx(args, first, last, scratch);
    }
    if (has_x86_bf16()) {
      return backward<T, BFloat16Pair>(args, first, last, scratch);
    }
  }
  backward<T, Compute<T>>(args, first, last, scratch);
}

#define NTKCL_INSTANTIATE(T)                                                      \
  template int64_t attention_scratch<T>(const AttentionSizes&);                   \
  template int64_t attention_backward_scratch<T>(const AttentionSizes&);          \
  template void attention_cpu(const Attention<T>&, int64_t, int64_t, std::byte*); \
  template void attention_backward_cpu(const AttentionBackward<T>&, int64_t, int64_t, std::byte*);
NTKCL_INSTANTIATE(float)
NTKCL_INSTANTIATE(double)
NTKCL_INSTANTIATE(BFloat16)
#undef NTKCL_INSTANTIATE

}  // namespace ntkcl::kernels
