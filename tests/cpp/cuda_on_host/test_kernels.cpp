// Every CUDA kernel on the host (cuda_on_host.h) beside the CPU's: in memory of exactly the sizes
// that are promised, aligned for vectors and not, threads in both orders.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "../testing.h"
#include "cuda_on_host.h"
#include "ntkcl/kernels/bias_relu_dropout_cpu.h"
#include "ntkcl/kernels/bias_relu_dropout_cuda.h"
#include "ntkcl/kernels/float8_rows_cuda.h"
#include "ntkcl/kernels/gelu_cpu.h"
#include "ntkcl/kernels/gelu_cuda.h"
#include "ntkcl/kernels/keep.h"
#include "ntkcl/kernels/launch.cuh"
#include "ntkcl/kernels/optimizer_step_cpu.h"
#include "ntkcl/kernels/optimizer_step_cuda.h"
#include "ntkcl/kernels/philox_keep_mask_cpu.h"
#include "ntkcl/kernels/philox_keep_mask_cuda.h"
#include "ntkcl/kernels/residual_layer_norm_cpu.h"
#include "ntkcl/kernels/residual_layer_norm_cuda.h"
#include "ntkcl/kernels/sam_step_cpu.h"
#include "ntkcl/kernels/sam_step_cuda.h"
#include "ntkcl/kernels/section_cosine_cpu.h"
#include "ntkcl/kernels/section_cosine_cuda.h"
#include "ntkcl/kernels/view_batch_cuda.h"
#include "ntkcl/kernels/warp.cuh"

using namespace ntkcl::kernels;
using ntkcl::testing::Approx;
using ntkcl::testing::message_of;

namespace {

// `size` elements in memory of just that size, after `offset` more that put them out of line.
template <class T>
class Memory {
 public:
  explicit Memory(int64_t size, int64_t offset = 0, double value = 0)
      : all_(static_cast<size_t>(size + offset), store<T>(static_cast<Compute<T>>(value))),
        offset_(offset) {}

  T* data() { return all_.data() + offset_; }
  int64_t size() const { return static_cast<int64_t>(all_.size()) - offset_; }
  double at(int64_t i) const {
    return static_cast<double>(load(all_[static_cast<size_t>(i + offset_)]));
  }
  bool operator==(const Memory& other) const {
    return all_.size() == other.all_.size() &&
           (all_.empty() ||
            std::memcmp(all_.data(), other.all_.data(), all_.size() * sizeof(T)) == 0);
  }

 private:
  std::vector<T> all_;
  int64_t offset_;
};

template <class T>
Memory<T> numbers(int64_t size, unsigned seed, int64_t offset = 0) {
  Memory<T> memory(size, offset);
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::generate_n(memory.data(), size, [&] {
    return store<T>(static_cast<Compute<T>>(load(store<BFloat16>(normal(generator)))));
  });
  return memory;
}

template <class T>
double tolerance() {
  return std::is_same_v<T, BFloat16> ? 1e-2 : std::is_same_v<T, float> ? 1e-5 : 1e-13;
}

// To the type's rounding, of numbers around 1; `sums`: of how many terms they are made.
template <class T>
void check_near(const Memory<T>& got, const Memory<T>& expected, double sums = 1) {
  REQUIRE(got.size() == expected.size());
  double worst = 0;
  for (int64_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(got.at(i) - expected.at(i)) / (1 + std::abs(expected.at(i)));
    worst = std::max(worst, error == error ? error : HUGE_VAL);
  }
  CHECK(worst <= tolerance<T>() * std::sqrt(sums));
}

// What run() returns, which must not depend on the order of threads.
template <class Run>
auto in_both_orders(const Run& run) {
  cuda_on_host::order = cuda_on_host::Order::kDescending;
  const auto other = run();
  cuda_on_host::order = cuda_on_host::Order::kAscending;
  auto result = run();
  CHECK(result == other);
  return result;
}

void check_started(cudaError_t error) {
  REQUIRE(error == cudaSuccess);
}

__global__ void race_kernel(int* out) {
  __shared__ int values[64];
  const int self = static_cast<int>(threadIdx.x);
  values[self] = self;
  out[self] = values[(self + 1) % 64];  // a barrier is missing
  __syncthreads();
}

__global__ void half_barrier_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  }
}

__global__ void far_shuffle_kernel() {
  warp_sum(1.0);  // there are 8 lanes
}

__global__ void sum_kernel(double* out) {
  out[threadIdx.y] = warp_sum(static_cast<double>(threadIdx.x + 100 * threadIdx.y));
}

}  // namespace

TEST_CASE("kernels on the host: what is wrong on a GPU is seen", "[cuda]") {
  const auto race = [](cuda_on_host::Order order) {
    cuda_on_host::order = order;
    std::vector<int> out(64);
    check_started(launch(race_kernel, 1, 64, nullptr, out.data()));
    cuda_on_host::order = cuda_on_host::Order::kAscending;
    return out;
  };
  std::vector<int> nothing_yet(64, -1), all_but_one(64);
  nothing_yet[63] = 0;
  std::iota(all_but_one.begin(), all_but_one.end(), 1);
  all_but_one[63] = -1;
  CHECK(race(cuda_on_host::Order::kAscending) == nothing_yet);
  CHECK(race(cuda_on_host::Order::kDescending) == all_but_one);

  CHECK(message_of<std::logic_error>([] { launch(half_barrier_kernel, 1, 64, nullptr); }) ==
        "threads of a block wait for others that have ended");
  CHECK(message_of<std::logic_error>([] { launch(far_shuffle_kernel, 1, 8, nullptr); }) ==
        "a shuffle from a lane that the warp does not have");
  std::vector<double> sums(2);
  check_started(launch(sum_kernel, 1, dim3(kWarp, 2), nullptr, sums.data()));
  CHECK(sums == std::vector<double>{496, 496 + 3200});
}

TEMPLATE_TEST_CASE("CUDA's bias_relu_dropout on the host", "[cuda]", float, double, BFloat16) {
  using T = TestType;
  struct Size {
    int64_t groups, rows, width;
  };
  for (const auto& [groups, rows, width] :
       {Size{1, 1, 1}, Size{1, 300, 16}, Size{2, 70, 20}, Size{3, 5, 37}, Size{1, 9, 1030}}) {
    for (const int64_t offset : {0, 1}) {
      for (const Dropout dropout : {Dropout::kNone, Dropout::kMask, Dropout::kKey}) {
        CAPTURE(groups, rows, width, offset, static_cast<int>(dropout));
        const int64_t all = groups * rows, n = all * width;
        auto x = numbers<T>(n, 1, offset), bias = numbers<T>(groups * width, 2, offset),
             grad = numbers<T>(n, 3, offset);
        Memory<uint8_t> mask(0);
        std::vector<uint8_t> kept(static_cast<size_t>(n));
        for (size_t i = 0; i < kept.size(); ++i) {
          kept[i] = i % 3 != 0;
        }
        const int64_t key = 77;
        const double p = dropout == Dropout::kNone ? 0 : 0.25;
        BiasReluDropout<T> args{.x = x.data(),
                                .bias = bias.data(),
                                .rows = all,
                                .width = width,
                                .groups = groups,
                                .dropout = dropout,
                                .scale = 1 / (1 - p),
                                .mask = dropout == Dropout::kMask ? kept.data() : nullptr,
                                .key = key,
                                .threshold = keep_threshold(p)};
        Memory<T> expected(n, offset);
        args.y = expected.data();
        bias_relu_dropout_cpu(args, 0, (n + kKeepBlock - 1) / kKeepBlock);
        const auto y = in_both_orders([&] {
          Memory<T> out(n, offset);
          args.y = out.data();
          args.device_key = dropout == Dropout::kKey ? &key : nullptr;
          check_started(bias_relu_dropout_cuda(args, nullptr));
          return out;
        });
        check_near(y, expected);

        BiasReluDropoutBackward<T> back{.grad = grad.data(),
                                        .y = expected.data(),
                                        .rows = all,
                                        .width = width,
                                        .groups = groups,
                                        .scale = 1 / (1 - p)};
        Memory<T> dx(n, offset), dbias(groups * width);
        back.dx = dx.data();
        back.dbias = dbias.data();
        const int64_t chunks = bias_relu_dropout_chunks_cpu(rows, width);
        std::vector<double> partials(static_cast<size_t>(groups * chunks * width));
        for (int64_t chunk = 0; chunk < groups * chunks; ++chunk) {
          bias_relu_dropout_backward_cpu(back, chunk, partials.data() + chunk * width);
        }
        bias_relu_dropout_dbias_cpu(back, partials.data(), chunks);
        const auto [there, sums] = in_both_orders([&] {
          std::pair found{Memory<T>(n, offset), Memory<T>(groups * width)};
          back.dx = found.first.data();
          back.dbias = found.second.data();
          Memory<Compute<T>> workspace(groups * bias_relu_dropout_chunks_cuda(rows, width) * width,
                                       0, NAN);
          check_started(bias_relu_dropout_backward_cuda(back, workspace.data(), nullptr));
          return found;
        });
        check_near(there, dx);
        check_near(sums, dbias, static_cast<double>(rows));
      }
    }
  }
}

TEMPLATE_TEST_CASE("CUDA's gelu on the host", "[cuda]", float, double, BFloat16) {
  using T = TestType;
  for (const int64_t n : {1, 4, 255, 1024, 2500}) {
    for (const int64_t offset : {0, 1}) {
      CAPTURE(n, offset);
      auto x = numbers<T>(n, 1, offset), grad = numbers<T>(n, 2, offset);
      Memory<T> y(n), dx(n);
      gelu_cpu<T>({x.data(), y.data(), n}, 0, n);
      gelu_backward_cpu<T>({grad.data(), x.data(), dx.data(), n}, 0, n);
      check_near(in_both_orders([&] {
                   Memory<T> out(n, offset);
                   check_started(gelu_cuda<T>({x.data(), out.data(), n}, nullptr));
                   return out;
                 }),
                 y);
      check_near(
          in_both_orders([&] {
            Memory<T> out(n, offset);
            check_started(gelu_backward_cuda<T>({grad.data(), x.data(), out.data(), n}, nullptr));
            return out;
          }),
          dx);
    }
  }
}

TEST_CASE("CUDA's philox_keep_mask on the host", "[cuda]") {
  const int64_t key = -5;
  for (const int64_t n : {1, 6, 1023, 4096}) {
    const uint32_t threshold = keep_threshold(0.3);
    std::vector<uint8_t> expected(
        static_cast<size_t>((n + kKeepBlock - 1) / kKeepBlock * kKeepBlock));
    for (int64_t block = 0; block * kKeepBlock < n; ++block) {
      philox_keep_block(static_cast<uint64_t>(key), threshold, block,
                        expected.data() + block * kKeepBlock);
    }
    expected.resize(static_cast<size_t>(n));
    CHECK(in_both_orders([&] {
            std::vector<uint8_t> keep(static_cast<size_t>(n));
            check_started(philox_keep_mask_cuda(&key, threshold, n, keep.data(), nullptr));
            return keep;
          }) == expected);
  }
}

namespace {

template <class S, class U, class O>
void layer_norm(int64_t rows, int64_t width, int64_t offset, bool updated) {
  CAPTURE(rows, width, offset, updated, sizeof(S), sizeof(U), sizeof(O));
  const int64_t n = rows * width;
  using Results = std::tuple<Memory<S>, Memory<O>, Memory<Compute<S>>, Memory<Compute<S>>>;
  auto x = numbers<S>(n, 1, offset), weight = numbers<S>(width, 2, offset),
       bias = numbers<S>(width, 3, offset);
  auto update = numbers<U>(n, 4, offset);
  ResidualLayerNorm<S, U, O> args{.x = x.data(),
                                  .update = updated ? update.data() : nullptr,
                                  .weight = weight.data(),
                                  .bias = bias.data(),
                                  .rows = rows,
                                  .width = width,
                                  .eps = 1e-6};
  const auto forward = [&](const auto& run) {
    Results r{Memory<S>(updated ? n : 0, offset), Memory<O>(n, offset), Memory<Compute<S>>(rows),
              Memory<Compute<S>>(rows)};
    args.sum = updated ? std::get<0>(r).data() : nullptr;
    args.out = std::get<1>(r).data();
    args.mean = std::get<2>(r).data();
    args.scale = std::get<3>(r).data();
    run();
    return r;
  };
  auto expected = forward([&] { residual_layer_norm_cpu(args, 0, rows); });
  const auto got = in_both_orders(
      [&] { return forward([&] { check_started(residual_layer_norm_cuda(args, nullptr)); }); });
  check_near(std::get<0>(got), std::get<0>(expected));
  check_near(std::get<1>(got), std::get<1>(expected), 10);
  check_near(std::get<2>(got), std::get<2>(expected), 10);
  check_near(std::get<3>(got), std::get<3>(expected), 10);

  auto grad = numbers<O>(n, 5, offset);
  auto sum_grad = numbers<S>(n, 6, offset);
  ResidualLayerNormBackward<S, U, O> back{.grad = grad.data(),
                                          .sum_grad = updated ? sum_grad.data() : nullptr,
                                          .sum = updated ? std::get<0>(expected).data() : x.data(),
                                          .mean = std::get<2>(expected).data(),
                                          .scale = std::get<3>(expected).data(),
                                          .weight = weight.data(),
                                          .rows = rows,
                                          .width = width};
  const auto backward = [&](const auto& run) {
    std::pair r{Memory<S>(n, offset), Memory<U>(updated ? n : 0, offset)};
    back.dx = r.first.data();
    back.dupdate = updated ? r.second.data() : nullptr;
    run();
    return r;
  };
  const auto [dx, dupdate] = backward([&] { residual_layer_norm_backward_cpu(back, 0, rows); });
  const auto found = in_both_orders([&] {
    return backward([&] { check_started(residual_layer_norm_backward_cuda(back, nullptr)); });
  });
  check_near(found.first, dx, 10);
  check_near(found.second, dupdate, 10);
}

}  // namespace

TEST_CASE("CUDA's residual_layer_norm on the host", "[cuda]") {
  for (const int64_t rows : {1, 21}) {
    for (const int64_t width : {3, 64, 192, 260}) {
      for (const int64_t offset : {0, 1}) {
        for (const bool updated : {false, true}) {
#define NTKCL_RUN(S, U, O) layer_norm<S, U, O>(rows, width, offset, updated);
          NTKCL_FOR_LAYER_NORM_TYPES(NTKCL_RUN)
#undef NTKCL_RUN
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("CUDA's section_cosine on the host", "[cuda]", float, double, BFloat16) {
  using T = TestType;
  for (const int64_t rows : {1, 13}) {
    for (const int64_t width : {5, 32, 200}) {
      for (const int64_t offset : {0, 1}) {
        for (const bool weighted : {false, true}) {
          CAPTURE(rows, width, offset, weighted);
          const int64_t sections = 3, segments = rows * sections, n = segments * width;
          auto x = numbers<T>(n, 1, offset), pulled = numbers<T>(n, 2, offset),
               weights = numbers<T>(sections, 3);
          std::fill_n(x.data(), width, T{});  // a segment without a direction
          Memory<T> unit(n), dx(n);
          Memory<Compute<T>> along(segments);
          const T* used = weighted ? weights.data() : nullptr;
          normalize_sections_cpu<T>({x.data(), used, unit.data(), rows, sections, width}, 0,
                                    segments);
          project_sections_cpu<T>({pulled.data(), x.data(), weights.data(), dx.data(), along.data(),
                                   rows, sections, width},
                                  0, segments);
          check_near(in_both_orders([&] {
                       Memory<T> out(n, offset);
                       check_started(normalize_sections_cuda<T>(
                           {x.data(), used, out.data(), rows, sections, width}, nullptr));
                       return out;
                     }),
                     unit);
          const auto found = in_both_orders([&] {
            std::pair r{Memory<T>(n, offset), Memory<Compute<T>>(segments)};
            check_started(
                project_sections_cuda<T>({pulled.data(), x.data(), weights.data(), r.first.data(),
                                          r.second.data(), rows, sections, width},
                                         nullptr));
            return r;
          });
          // The segment without a direction is divided by the least norm.
          for (int64_t i = 0; i < n; ++i) {
            CHECK(found.first.at(i) == Approx(dx.at(i)).epsilon(2 * tolerance<T>()).margin(1e-2));
          }
          check_near(found.second, along, 30);
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("CUDA's float8_rows on the host", "[cuda]", float, BFloat16) {
  using T = TestType;
  for (const int64_t width : {1, 6, 128, 300}) {
    for (const int64_t offset : {0, 1}) {
      CAPTURE(width, offset);
      const int64_t rows = 7;
      auto x = numbers<T>(rows * width, 1, offset);
      std::fill_n(x.data(), width, T{});
      const auto [values, scale] = in_both_orders([&] {
        std::pair r{std::vector<uint8_t>(static_cast<size_t>(rows * width)),
                    std::vector<float>(rows)};
        check_started(
            float8_rows_cuda<T>({x.data(), r.first.data(), r.second.data(), rows, width}, nullptr));
        return r;
      });
      CHECK(scale[0] == 1);
      for (int64_t row = 0; row < rows; ++row) {
        double largest = 0;
        for (int64_t i = row * width; i < (row + 1) * width; ++i) {
          largest = std::max(largest, std::abs(x.at(i)));
          // e4m3: a sign, 4 bits of exponent (bias 7), 3 of mantissa.
          const uint8_t bits = values[static_cast<size_t>(i)];
          const int exponent = bits >> 3 & 15, mantissa = bits & 7;
          const double size =
              exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
          const double value = (bits & 128 ? -size : size) * scale[static_cast<size_t>(row)];
          const double half_step = std::max(
              std::abs(x.at(i)) / 16, std::ldexp(double{scale[static_cast<size_t>(row)]}, -10));
          CHECK(std::abs(value - x.at(i)) <= half_step * (1 + 1e-6));
        }
        if (largest > 0) {
          CHECK(scale[static_cast<size_t>(row)] == Approx(largest / kLargestFloat8));
        }
      }
    }
  }
}

TEST_CASE("CUDA's views on the host have the CPU's bits", "[cuda]") {
  const int64_t size = 10;
  std::vector<ViewJob> jobs;
  ViewBatch batch{.size = size};
  int64_t pixels = 0, between = 0;
  struct View {
    int64_t height, width, resized_height, resized_width, top, left;
  };
  for (const View& v :
       {View{37, 21, 12, 14, 1, 2}, View{8, 9, 10, 10, 0, 0}, View{5, 60, 10, 30, 0, 20}}) {
    ViewJob job{.height = v.height,
                .width = v.width,
                .resized_height = v.resized_height,
                .resized_width = v.resized_width,
                .top = v.top,
                .left = v.left,
                .filter = jobs.empty() ? Filter::kBicubic : Filter::kBilinear,
                .mirrored = jobs.size() == 1,
                .brightness = jobs.size() == 2 ? 1.3F : 1.0F};
    complete(job, size);
    job.pixels = pixels;
    job.between = between;
    pixels += 3 * v.height * v.width;
    between += 3 * job.between_pixels(size);
    batch.most_between = std::max(batch.most_between, job.between_pixels(size));
    batch.taps = std::max({batch.taps, job.columns().most_taps(), job.rows().most_taps()});
    jobs.push_back(job);
  }
  batch.images = static_cast<int64_t>(jobs.size());
  std::vector<uint8_t> bytes(static_cast<size_t>(pixels));
  std::mt19937 generator(3);
  std::generate(bytes.begin(), bytes.end(), [&] { return static_cast<uint8_t>(generator()); });
  batch.pixels = bytes.data();
  batch.jobs = jobs.data();

  const auto views = [&](const auto& fill) {
    const auto places = static_cast<size_t>(2 * batch.images * size);
    std::vector<Span> spans(places);
    std::vector<double> exact(places * static_cast<size_t>(batch.taps));
    std::vector<int32_t> weights(exact.size());
    std::vector<uint8_t> middle(static_cast<size_t>(between)),
        out(static_cast<size_t>(3 * batch.images * size * size));
    batch.spans = spans.data();
    batch.exact = exact.data();
    batch.weights = weights.data();
    batch.between = middle.data();
    batch.out = out.data();
    fill();
    return out;
  };
  CHECK(in_both_orders([&] {
          return views([&] { check_started(fill_views_cuda(batch, nullptr)); });
        }) == views([&] { fill_views_cpu(batch); }));
}

namespace {

// As many tensors as need two launches, one of them empty.
template <class T>
std::vector<Memory<T>> tensors(unsigned seed) {
  std::vector<Memory<T>> all;
  for (int64_t i = 0; i < 70; ++i) {
    all.push_back(numbers<T>(i == 5   ? 0
                             : i == 9 ? 700
                                      : 1 + 3 * i,
                             seed + static_cast<unsigned>(i)));
  }
  return all;
}

template <class T>
struct StepState {
  std::vector<Memory<T>> parameters = tensors<T>(0), first = tensors<T>(100),
                         second = tensors<T>(200), averages = tensors<T>(300);
  double distance = 0;

  StepState() {
    for (Memory<T>& memory : second) {  // squares
      std::transform(memory.data(), memory.data() + memory.size(), memory.data(),
                     [](T value) { return value * value; });
    }
  }
  bool operator==(const StepState& o) const {
    return parameters == o.parameters && first == o.first && second == o.second &&
           averages == o.averages && distance == Approx(o.distance);
  }
};

template <class T>
std::vector<StepTensor<T>> arguments(StepState<T>& state, std::vector<Memory<T>>& gradients,
                                     std::vector<Memory<T>>& anchors) {
  std::vector<StepTensor<T>> all;
  for (size_t i = 0; i < gradients.size(); ++i) {
    all.push_back({.parameter = state.parameters[i].data(),
                   .gradient = gradients[i].data(),
                   .first = state.first[i].data(),
                   .second = state.second[i].data(),
                   .anchor = i % 3 == 0 ? nullptr : anchors[i].data(),
                   .average = i % 4 == 0 ? nullptr : state.averages[i].data(),
                   .size = gradients[i].size()});
  }
  return all;
}

}  // namespace

TEMPLATE_TEST_CASE("CUDA's steps of optimisers on the host have the CPU's bits", "[cuda]", float,
                   double) {
  using T = TestType;
  auto gradients = tensors<T>(400), anchors = tensors<T>(500);
  const StepOptions step{0.05, 0.3, 0.7, 0.75};
  const SgdOptions sgd{step, 0.9};
  const float steps = 3;
  for (const int kind : {0, 1, 2}) {
    const AdamOptions adam{step, 0.8, 0.97, 1e-4, kind == 2};
    StepState<T> expected;
    for (const StepTensor<T>& tensor : arguments(expected, gradients, anchors)) {
      expected.distance +=
          kind == 0 ? optimizer_step_cpu(tensor, SgdStep<T>(sgd), 0, tensor.size)
                    : optimizer_step_cpu(tensor, AdamStep<T>(adam, steps), 0, tensor.size);
    }
    for (const int64_t blocks : {1, 3}) {
      const auto got = in_both_orders([&] {
        StepState<T> state;
        const auto all = arguments(state, gradients, anchors);
        const auto count = static_cast<int64_t>(all.size());
        std::vector<double> distances(all.size() * static_cast<size_t>(blocks), NAN);
        check_started(kind == 0
                          ? sgd_step_cuda(all.data(), count, sgd, distances.data(), blocks, nullptr)
                          : adam_step_cuda(all.data(), count, adam, &steps, distances.data(),
                                           blocks, nullptr));
        state.distance = std::accumulate(distances.begin(), distances.end(), 0.0);
        return state;
      });
      CHECK(got == expected);
    }
  }
}

// Larger than the largest grid takes at once: every thread goes round its loop again. Millions of
// threads, for whose jumps the address sanitizer takes minutes.
#ifndef __SANITIZE_ADDRESS__
TEST_CASE("CUDA's loops over more than a grid", "[cuda]") {
  const int64_t n = int64_t{8192} * 256 * 4 + 4 * 300;
  auto x = numbers<float>(n, 1), bias = numbers<float>(12, 2);
  Memory<float> expected(n), got(n);
  gelu_cpu<float>({x.data(), expected.data(), n}, 0, n);
  check_started(gelu_cuda<float>({x.data(), got.data(), n}, nullptr));
  check_near(got, expected);

  const int64_t key = 9;
  BiasReluDropout<float> args{.x = x.data(),
                              .bias = bias.data(),
                              .y = expected.data(),
                              .rows = n / 12,
                              .width = 12,
                              .dropout = Dropout::kKey,
                              .scale = 2,
                              .key = key,
                              .threshold = keep_threshold(0.5)};
  bias_relu_dropout_cpu(args, 0, (n + kKeepBlock - 1) / kKeepBlock);
  args.y = got.data();
  check_started(bias_relu_dropout_cuda(args, nullptr));
  check_near(got, expected);

  std::vector<uint8_t> kept(static_cast<size_t>(n)), block(kKeepBlock);
  check_started(philox_keep_mask_cuda(&key, args.threshold, n, kept.data(), nullptr));
  for (const int64_t last : {n / kKeepBlock - 1, n / kKeepBlock - 2}) {
    philox_keep_block(static_cast<uint64_t>(key), args.threshold, last, block.data());
    CHECK(std::equal(block.begin(), block.end(), kept.begin() + last * kKeepBlock));
  }
}
#endif

namespace {

// `many`: one tensor of more rows than a grid has, else those of tensors().
template <class T>
std::vector<Memory<T>> stacks(unsigned seed, bool many) {
  return many ? std::vector{numbers<T>(2 * 1500, seed)} : tensors<T>(seed);
}

int64_t rows_of(int64_t i, int64_t size, bool many) {
  return many ? 1500 : i == 9 ? 7 : i % 5 == 1 && size % 2 == 0 ? 2 : 1;
}

template <class T>
struct SamState {
  explicit SamState(bool many)
      : parameters(stacks<T>(0, many)),
        saved(stacks<T>(100, many)),
        momenta(stacks<T>(200, many)) {}
  bool operator==(const SamState& other) const = default;

  std::vector<Memory<T>> parameters, saved, momenta;
  std::vector<double> sums;  // of gradients, then of alignments
};

template <class T>
void sam_steps(bool many) {
  CAPTURE(many);
  auto first = stacks<T>(300, many), second = stacks<T>(400, many);
  int64_t rows = 0;
  const auto tensors_of = [&](SamState<T>& s) {
    std::vector<SamTensor<T>> all;
    rows = 0;
    for (size_t i = 0; i < first.size(); ++i) {
      const auto n = static_cast<int64_t>(i);
      const int64_t size = first[i].size(), stack = rows_of(n, size, many);
      all.push_back({s.parameters[i].data(), s.saved[i].data(), s.momenta[i].data(),
                     first[i].data(), second[i].data(), size, stack, rows,
                     static_cast<T>(0.1 + 0.01 * static_cast<double>(i)), static_cast<T>(0.02)});
      rows += stack;
    }
    return all;
  };
  const double scale = 0.37;
  const auto gammas = numbers<T>(1700, 7);
  const auto gamma_of = [&](int64_t row) { return static_cast<T>(gammas.at(row)); };

  SamState<T> expected(many);
  const auto here = tensors_of(expected);
  std::vector<Alignment> alignments(static_cast<size_t>(rows));
  double squares = 0;
  for (const SamTensor<T>& t : here) {
    squares += square_sum_cpu(t.first_gradient, 0, t.size);
    sam_ascend_cpu(t, static_cast<T>(scale), 0, t.size);
    const int64_t width = t.size / t.rows;
    for (int64_t row = 0; row < t.rows; ++row) {
      const int64_t begin = row * width, end = begin + width;
      alignments[static_cast<size_t>(t.first_row + row)] =
          sam_momentum_cpu(t, static_cast<T>(0.8), begin, end);
      sam_descend_cpu(t, gamma_of(t.first_row + row), begin, end);
    }
  }

  for (const int64_t blocks : {1, 2}) {
    const auto got = in_both_orders([&] {
      SamState<T> state(many);
      const auto all = tensors_of(state);
      const auto count = static_cast<int64_t>(all.size());
      std::vector<double> sums(all.size() * static_cast<size_t>(blocks), NAN);
      check_started(sam_square_sums_cuda(all.data(), count, sums.data(), blocks, nullptr));
      state.sums.push_back(std::accumulate(sums.begin(), sums.end(), 0.0));
      check_started(sam_ascend_cuda(all.data(), count, &scale, blocks, nullptr));
      std::vector<Alignment> parts(static_cast<size_t>(rows * blocks), {NAN, NAN, NAN});
      check_started(
          sam_momentum_cuda(all.data(), count, static_cast<T>(0.8), parts.data(), blocks, nullptr));
      for (int64_t row = 0; row < rows; ++row) {
        Alignment sum;
        for (int64_t block = 0; block < blocks; ++block) {
          sum += parts[static_cast<size_t>(row * blocks + block)];
        }
        state.sums.insert(state.sums.end(),
                          {sum.product, sum.momentum_square, sum.gradient_square});
      }
      auto given = gammas;
      check_started(sam_descend_cuda(all.data(), count, static_cast<const T*>(given.data()), blocks,
                                     nullptr));
      return state;
    });
    CHECK(got.parameters == expected.parameters);
    CHECK(got.saved == expected.saved);
    CHECK(got.momenta == expected.momenta);
    SamState<T> plain = got, same = got;
    const auto all = tensors_of(plain), again = tensors_of(same);
    const auto count = static_cast<int64_t>(all.size());
    check_started(sam_momentum_cuda<T>(all.data(), count, T{0.5}, nullptr, blocks, nullptr));
    for (const SamTensor<T>& t : again) {
      sam_momentum_cpu(t, T{0.5}, 0, t.size);
    }
    CHECK(plain == same);
    CHECK(got.sums[0] == Approx(squares));
    for (size_t row = 0; row < alignments.size(); ++row) {
      CHECK(got.sums[1 + 3 * row] == Approx(alignments[row].product).margin(1e-9));
      CHECK(got.sums[2 + 3 * row] == Approx(alignments[row].momentum_square).margin(1e-9));
      CHECK(got.sums[3 + 3 * row] == Approx(alignments[row].gradient_square).margin(1e-9));
    }
  }
}

}  // namespace

TEMPLATE_TEST_CASE("CUDA's steps of SAM on the host have the CPU's bits", "[cuda]", float, double) {
  sam_steps<TestType>(false);
  sam_steps<TestType>(true);
}
