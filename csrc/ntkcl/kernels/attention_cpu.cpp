#include "ntkcl/kernels/attention_cpu.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "ntkcl/kernels/lanes.h"
#include "ntkcl/kernels/small_matmul_cpu.h"

// Head by head, with everything of a head in the second-level cache: per query and head
// 4 * tokens * width FLOPs forward, 10 backward, and from memory only qkv, out and their gradients.

namespace ntkcl::kernels {
namespace {

// exp(x) for x <= 0, to 2 units in the last place: 2^n times a polynomial in x - n log 2. Exactly 0
// below -87, where float32 ends. NaN stays NaN.
NTKCL_INLINE float exp_of(float x) {
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const float y = x < -87.0F ? -87.0F : x;
  const float shifted = y * 1.44269504F + kRound;
  const float n = shifted - kRound;
  const float r = (y - n * 0.693359375F) + n * 2.12194440e-4F;  // log 2 in two parts
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * (r * r) + r + 1.0F;
  const uint32_t power = (std::bit_cast<uint32_t>(shifted) << 23) + 0x3F800000U;
  const float value = p * std::bit_cast<float>(power);
  return x < -87.0F ? 0.0F : value;
}

NTKCL_INLINE double exp_of(double x) {
  return std::exp(x);
}

template <class C>
NTKCL_INLINE C max_loop(const C* x, int64_t n) {
  C lanes[kLanes];
  for (C& lane : lanes) {
    lane = -std::numeric_limits<C>::infinity();
  }
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
    }
  }
  for (int lane = 0; i + lane < n; ++lane) {
    lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
  }
  C largest = lanes[0];
  for (const C lane : lanes) {
    largest = lane > largest ? lane : largest;
  }
  return largest;
}

// A NaN or a positive infinity makes all of x NaN; a negative infinity has weight 0.
template <class C>
NTKCL_INLINE void softmax_loop(C* x, int64_t n) {
  const C largest = max_loop(x, n);
  C lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      x[i + lane] = exp_of(x[i + lane] - largest);
      lanes[lane] += x[i + lane];
    }
  }
  for (int lane = 0; i + lane < n; ++lane) {
    x[i + lane] = exp_of(x[i + lane] - largest);
    lanes[lane] += x[i + lane];
  }
  const C factor = C{1} / sum_of(lanes);
  for (int64_t j = 0; j < n; ++j) {
    x[j] *= factor;
  }
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

// Templates cannot be multiversioned; these instances of the loops above are.
#define NTKCL_LOOPS(C)                                                                  \
  NTKCL_MULTIVERSION void softmax_row(C* x, int64_t n) {                                \
    softmax_loop<C>(x, n);                                                              \
  }                                                                                     \
  NTKCL_MULTIVERSION C softmax_backward_row(const C* y, C factor, C* grad, int64_t n) { \
    return softmax_backward_loop<C>(y, factor, grad, n);                                \
  }
NTKCL_LOOPS(float)
NTKCL_LOOPS(double)
#undef NTKCL_LOOPS
#define NTKCL_LOOPS(T)                                                                         \
  NTKCL_MULTIVERSION void load_row(const T* x, Compute<T> factor, Compute<T>* y, int64_t n) {  \
    for (int64_t i = 0; i < n; ++i) {                                                          \
      y[i] = load(x[i]) * factor;                                                              \
    }                                                                                          \
  }                                                                                            \
  NTKCL_MULTIVERSION void store_row(const Compute<T>* x, Compute<T> factor, T* y, int64_t n) { \
    for (int64_t i = 0; i < n; ++i) {                                                          \
      y[i] = store<T>(x[i] * factor);                                                          \
    }                                                                                          \
  }
NTKCL_LOOPS(float)
NTKCL_LOOPS(double)
NTKCL_LOOPS(BFloat16)
#undef NTKCL_LOOPS

constexpr int64_t kQueryRows = 64;  // queries whose scores are in work at a time

// ---- Operands of matrix products, E: numbers as they are, or pairs of bfloat16 ----

template <class E>
constexpr int64_t elements(int64_t numbers) {  // that hold so many numbers
  return (numbers + Operand<E>::kNumbers - 1) / Operand<E>::kNumbers;
}

NTKCL_INLINE BFloat16Pair pair_of(float first, float second) {
  return {store<BFloat16>(first), store<BFloat16>(second)};
}

NTKCL_MULTIVERSION void pair_neighbours(const float* x, BFloat16Pair* to, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    to[i] = pair_of(x[2 * i], x[2 * i + 1]);
  }
}

NTKCL_MULTIVERSION void pair_rows_of(const float* first, const float* second, BFloat16Pair* to,
                                     int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = pair_of(first[i], second[i]);
  }
}

NTKCL_MULTIVERSION void pair_row_with_zero(const float* first, BFloat16Pair* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = pair_of(first[i], 0);
  }
}

// x (rows, columns), which a product sums over the columns of: (rows, columns / numbers).
template <class C>
const C* along_columns(const C* x, int64_t, int64_t, C*) {
  return x;
}
const BFloat16Pair* along_columns(const float* x, int64_t rows, int64_t columns, BFloat16Pair* to) {
  pair_neighbours(x, to, rows * columns / 2);
  return to;
}

// x (rows, columns), which a product sums over the rows of: (rows / numbers, columns).
template <class C>
const C* along_rows(const C* x, int64_t, int64_t, C*) {
  return x;
}
const BFloat16Pair* along_rows(const float* x, int64_t rows, int64_t columns, BFloat16Pair* to) {
  int64_t row = 0;
  for (; row + 1 < rows; row += 2) {
    pair_rows_of(x + row * columns, x + (row + 1) * columns, to + row / 2 * columns, columns);
  }
  if (row < rows) {
    pair_row_with_zero(x + row * columns, to + row / 2 * columns, columns);
  }
  return to;
}

template <class C>
C at_column(const C* row, int64_t column, C) {
  return row[column];
}
BFloat16Pair at_column(const float* row, int64_t column, BFloat16Pair) {
  return pair_of(row[2 * column], row[2 * column + 1]);
}

// Hands out the parts of a thread's scratch memory, or counts them.
class Scratch {
 public:
  explicit Scratch(std::byte* memory) : begin_(memory) {}
  template <class E>
  E* take(int64_t rows, int64_t columns) {
    std::byte* part = begin_ ? begin_ + used_ : nullptr;
    used_ += in_tiles(rows * columns * static_cast<int64_t>(sizeof(E)), 64);
    return reinterpret_cast<E*>(part);
  }
  int64_t used() const { return used_; }

 private:
  std::byte* begin_;
  int64_t used_ = 0;
};

// ---- One head of one image ----

// Tile-padded sizes of its matrices.
struct Padded {
  int64_t tokens, keys, width;  // rows; columns of scores; columns of q, k, v

  explicit Padded(const AttentionSizes& sizes)
      : tokens(in_tiles(sizes.tokens, kTileRows)),
        keys(in_tiles(sizes.tokens, kTileColumns)),
        width(in_tiles(sizes.width, kTileColumns)) {}
};

// Keys and values stand in the order class token, patches, prompts, so that those attended to
// together are neighbours. All padding is zero.
template <class T>
class Head {
 public:
  using C = Compute<T>;

  Head(const AttentionSizes& sizes, int64_t matrix)
      : sizes_(sizes),
        padded_(sizes),
        image_(matrix / sizes.heads),
        column_(matrix % sizes.heads * sizes.width) {}

  // Offset of a token's row of this head among packed tokens of `parts` projections.
  int64_t at(int64_t token, int64_t part, int64_t parts) const {
    return ((image_ * sizes_.tokens + token) * parts + part) * sizes_.columns() + column_;
  }

  int64_t token_of_key(int64_t row) const {
    const int64_t others = sizes_.tokens - sizes_.prompts;
    return row == 0 ? 0 : row < others ? row + sizes_.prompts : row - others + 1;
  }

  // Keys (part 1) or values (part 2): (tokens, width).
  void load_keys(const T* qkv, int64_t part, C* to) const {
    for (int64_t row = 0; row < sizes_.tokens; ++row) {
      load(qkv + at(token_of_key(row), part, 3), C{1}, to + row * padded_.width);
    }
  }

  // x (tokens, width) -> (width / numbers, keys), summed over the width.
  template <class E>
  void transpose(const C* x, E* to) const {
    for (int64_t row = 0; row < padded_.keys; ++row) {
      for (int64_t j = 0; j < elements<E>(sizes_.width); ++j) {
        to[j * padded_.keys + row] =
            row < sizes_.tokens ? at_column(x + row * padded_.width, j, E{}) : E{};
      }
    }
  }

  // Tokens first .. first + rows of projection `part`, times factor: (rows, width).
  void load_queries(const T* packed, int64_t part, int64_t parts, int64_t first, int64_t rows,
                    C factor, C* to) const {
    for (int64_t row = 0; row < rows; ++row) {
      load(packed + at(first + row, part, parts), factor, to + row * padded_.width);
    }
  }

 private:
  void load(const T* from, C factor, C* to) const {
    load_row(from, factor, to, sizes_.width);
    std::fill(to + sizes_.width, to + padded_.width, C{0});
  }

  const AttentionSizes& sizes_;
  Padded padded_;
  int64_t image_, column_;
};

// Softmaxes over a row of scores: over all keys, or over prompts apart.
template <class C>
void softmax_parts(C* scores, const AttentionSizes& sizes) {
  const int64_t others = sizes.tokens - sizes.prompts;
  softmax_row(scores, others);
  if (sizes.prompts > 0) {
    softmax_row(scores + others, sizes.prompts);
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
  E *keys, *values, *queries, *weights;
  C *rows, *query_rows, *weight_rows;

  ForwardMemory(Scratch& scratch, const AttentionSizes& sizes) {
    const Padded p(sizes);
    keys = scratch.take<E>(p.width, p.keys);  // transposed
    values = scratch.take<E>(p.tokens, p.width);
    queries = scratch.take<E>(kQueryRows, p.width);
    weights = scratch.take<E>(kQueryRows, p.keys);
    rows = scratch.take<C>(p.tokens, p.width);
    query_rows = scratch.take<C>(kQueryRows, p.width);
    weight_rows = scratch.take<C>(kQueryRows, p.keys);
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
    const Head<T> head(sizes, matrix);
    head.load_keys(args.qkv, 1, m.rows);
    head.transpose(m.rows, m.keys);
    head.load_keys(args.qkv, 2, m.rows);
    const E* values = along_rows(m.rows, sizes.tokens, p.width, m.values);
    const C gate = args.gate ? load(args.gate[matrix % sizes.heads]) : C{1};
    for (int64_t begin = 0; begin < sizes.tokens; begin += kQueryRows) {
      const int64_t rows = std::min(kQueryRows, sizes.tokens - begin);
      const Products<E> products{sizes, p, rows};
      head.load_queries(args.qkv, 0, 3, begin, rows, scale, m.query_rows);
      products.with_keys(along_columns(m.query_rows, rows, p.width, m.queries), m.keys,
                         m.weight_rows);
      for (int64_t row = 0; row < rows; ++row) {
        C* weights = m.weight_rows + row * p.keys;
        softmax_parts(weights, sizes);
        for (int64_t key = sizes.tokens - sizes.prompts; key < sizes.tokens; ++key) {
          weights[key] *= gate;
        }
      }
      products.over_keys(along_columns(m.weight_rows, rows, p.keys, m.weights), values,
                         m.query_rows);
      for (int64_t row = 0; row < rows; ++row) {
        store_row(m.query_rows + row * p.width, C{1}, args.out + head.at(begin + row, 0, 1),
                  sizes.width);
      }
    }
  }
}

// ---- Backward ----

template <class E>
struct BackwardMemory {
  using C = typename Operand<E>::Sum;
  E *keys_transposed, *values_transposed, *keys, *queries, *dmixed, *weights;
  C *rows, *dkeys, *dvalues, *query_rows, *dmixed_rows, *weight_rows, *dweight_rows;

  BackwardMemory(Scratch& scratch, const AttentionSizes& sizes) {
    const Padded p(sizes);
    keys_transposed = scratch.take<E>(p.width, p.keys);
    values_transposed = scratch.take<E>(p.width, p.keys);
    keys = scratch.take<E>(p.tokens, p.width);
    queries = scratch.take<E>(kQueryRows, p.width);
    dmixed = scratch.take<E>(kQueryRows, p.width);
    weights = scratch.take<E>(kQueryRows, p.keys);
    rows = scratch.take<C>(p.tokens, p.width);
    dkeys = scratch.take<C>(p.tokens, p.width);
    dvalues = scratch.take<C>(p.tokens, p.width);
    query_rows = scratch.take<C>(kQueryRows, p.width);
    dmixed_rows = scratch.take<C>(kQueryRows, p.width);
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
    const Head<T> head(sizes, matrix);
    head.load_keys(args.qkv, 2, m.rows);
    head.transpose(m.rows, m.values_transposed);
    head.load_keys(args.qkv, 1, m.rows);
    head.transpose(m.rows, m.keys_transposed);
    const E* keys = along_rows(m.rows, sizes.tokens, p.width, m.keys);
    std::fill_n(m.dkeys, p.tokens * p.width, C{0});
    std::fill_n(m.dvalues, p.tokens * p.width, C{0});
    const C gate = args.gate ? load(args.gate[matrix % sizes.heads]) : C{1};
    double dgate = 0;
    for (int64_t begin = 0; begin < sizes.tokens; begin += kQueryRows) {
      const int64_t rows = std::min(kQueryRows, sizes.tokens - begin);
      const Products<E> products{sizes, p, rows};
      head.load_queries(args.qkv, 0, 3, begin, rows, scale, m.query_rows);
      head.load_queries(args.grad, 0, 1, begin, rows, C{1}, m.dmixed_rows);
      products.with_keys(along_columns(m.query_rows, rows, p.width, m.queries), m.keys_transposed,
                         m.weight_rows);
      products.with_keys(along_columns(m.dmixed_rows, rows, p.width, m.dmixed), m.values_transposed,
                         m.dweight_rows);
      for (int64_t row = 0; row < rows; ++row) {
        C *weights = m.weight_rows + row * p.keys, *dweights = m.dweight_rows + row * p.keys;
        softmax_parts(weights, sizes);
        softmax_backward_row(weights, C{1}, dweights, others);
        if (sizes.prompts > 0) {
          dgate += softmax_backward_row(weights + others, gate, dweights + others, sizes.prompts);
        }
      }
      products.add_over_rows(along_rows(m.weight_rows, rows, p.keys, m.weights),
                             along_rows(m.dmixed_rows, rows, p.width, m.dmixed), m.dvalues);
      products.add_over_rows(along_rows(m.dweight_rows, rows, p.keys, m.weights),
                             along_rows(m.query_rows, rows, p.width, m.queries), m.dkeys);
      products.over_keys(along_columns(m.dweight_rows, rows, p.keys, m.weights), keys,
                         m.query_rows);
      for (int64_t row = 0; row < rows; ++row) {
        store_row(m.query_rows + row * p.width, scale, args.dqkv + head.at(begin + row, 0, 3),
                  sizes.width);
      }
    }
    // The queries hold the scale, so the keys' gradients have it too.
    for (int64_t row = 0; row < sizes.tokens; ++row) {
      const int64_t token = head.token_of_key(row);
      store_row(m.dkeys + row * p.width, C{1}, args.dqkv + head.at(token, 1, 3), sizes.width);
      store_row(m.dvalues + row * p.width, row < others ? C{1} : gate,
                args.dqkv + head.at(token, 2, 3), sizes.width);
    }
    if (args.dgate) {
      args.dgate[matrix] = dgate;
    }
  }
}

template <class T>
constexpr bool kHasPairs = std::is_same_v<T, BFloat16>;

}  // namespace

template <class T>
int64_t attention_scratch(const AttentionSizes& sizes) {
  Scratch scratch(nullptr);
  ForwardMemory<Compute<T>>(scratch, sizes);
  return scratch.used();
}

template <class T>
int64_t attention_backward_scratch(const AttentionSizes& sizes) {
  Scratch scratch(nullptr);
  BackwardMemory<Compute<T>>(scratch, sizes);
  return scratch.used();
}

template <class T>
void attention_cpu(const Attention<T>& args, int64_t first, int64_t last, std::byte* scratch) {
  if constexpr (kHasPairs<T>) {
    if (has_bfloat16_products()) {
      return forward<T, BFloat16Pair>(args, first, last, scratch);
    }
  }
  forward<T, Compute<T>>(args, first, last, scratch);
}

template <class T>
void attention_backward_cpu(const AttentionBackward<T>& args, int64_t first, int64_t last,
                            std::byte* scratch) {
  if constexpr (kHasPairs<T>) {
    if (has_bfloat16_products()) {
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
