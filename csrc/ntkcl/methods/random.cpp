#include "ntkcl/methods/random.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <bit>
#include <cmath>
#include <numbers>
#include <numeric>

#include "ntkcl/core/error.h"
#include "ntkcl/core/philox.h"
#include "ntkcl/ops/philox_keep_mask.h"

namespace ntkcl::methods {
namespace {

// Fisher-Yates for the first k places of 0 .. n-1.
at::Tensor shuffled(PhiloxStream stream, int64_t n, int64_t k) {
  at::Tensor order = at::arange(n, at::kLong);
  int64_t* values = order.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < k; ++i) {
    std::swap(values[i],
              values[i + static_cast<int64_t>(stream.below(static_cast<uint64_t>(n - i)))]);
  }
  return order.narrow(0, 0, k);
}

// A recorded draw has the shape of the draw that it replaces.
const at::Tensor& checked(const at::Tensor& given, const Draw& draw, at::IntArrayRef sizes) {
  NTKCL_CHECK(given.sizes() == sizes, draw.purpose, "expected a recorded draw of shape ", sizes,
              ", got ", given.sizes());
  return given;
}

template <class NextFn>
at::Tensor filled(at::IntArrayRef sizes, const at::TensorOptions& options, NextFn next) {
  at::Tensor values = at::empty(sizes, at::kDouble);
  double* out = values.mutable_data_ptr<double>();
  for (int64_t i = 0; i < values.numel(); ++i) {
    out[i] = next();
  }
  return values.to(options);
}

}  // namespace

std::optional<at::Tensor> RandomSource::recorded(const Draw&) {
  return std::nullopt;
}

uint64_t RandomSource::key(const Draw& draw) const {
  const auto label = [](int64_t value) { return static_cast<uint64_t>(value); };
  const uint64_t purpose = philox_subkey(seed_, purpose_label(draw.purpose), label(draw.task));
  const uint64_t step = philox_subkey(purpose, label(draw.step), label(draw.list));
  return philox_subkey(step, label(draw.layer));
}

at::Tensor RandomSource::uniform(const Draw& draw, at::IntArrayRef sizes, double low, double high,
                                 const at::TensorOptions& options) {
  if (auto given = recorded(draw)) {
    return checked(*given, draw, sizes).to(options, /*non_blocking=*/false, /*copy=*/true);
  }
  PhiloxStream stream(key(draw));
  return filled(sizes, options, [&] { return low + (high - low) * stream.uniform(); });
}

at::Tensor RandomSource::normal(const Draw& draw, at::IntArrayRef sizes,
                                const at::TensorOptions& options) {
  if (auto given = recorded(draw)) {
    return checked(*given, draw, sizes).to(options, /*non_blocking=*/false, /*copy=*/true);
  }
  at::Tensor values = at::empty(sizes, at::kDouble);
  double* out = values.mutable_data_ptr<double>();
  const uint64_t of_draw = key(draw);
  // Number i is made of block i of the stream, whichever thread makes it.
  at::parallel_for(0, values.numel(), 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Philox4 block = philox(of_draw, static_cast<uint64_t>(i));
      // Box-Muller; 1 - u is never 0.
      const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform53(block.v[0], block.v[1])));
      out[i] = radius * std::cos(2.0 * std::numbers::pi * uniform53(block.v[2], block.v[3]));
    }
  });
  return values.to(options);
}

at::Tensor RandomSource::permutation(const Draw& draw, int64_t n) {
  return choice(draw, n, n);
}

at::Tensor RandomSource::choice(const Draw& draw, int64_t n, int64_t k) {
  NTKCL_ASSERT(0 <= k && k <= n);
  if (auto given = recorded(draw)) {
    at::Tensor values = checked(*given, draw, {k}).to(at::kCPU, at::kLong).contiguous();
    NTKCL_CHECK(k == 0 || (values.min().item<int64_t>() >= 0 && values.max().item<int64_t>() < n),
                draw.purpose, "expected recorded draws in 0 .. ", n - 1);
    return values;
  }
  return shuffled(PhiloxStream(key(draw)), n, k);
}

at::Tensor RandomSource::dropout_key(const Draw& draw) {
  return at::scalar_tensor(std::bit_cast<int64_t>(key(draw)), at::kLong);
}

at::Tensor RandomSource::placed(const Draw& draw, at::Device device, const Make& make) {
  const at::Tensor value = make(*this, draw);
  return device.is_cuda() ? value.pin_memory().to(device, /*non_blocking=*/true) : value.to(device);
}

at::Tensor RandomSource::keep_mask(const Draw& draw, at::IntArrayRef sizes, double p,
                                   at::Device device) {
  if (auto given = recorded(draw)) {
    return checked(*given, draw, sizes).to(device);
  }
  const at::Tensor of_draw = placed(
      draw, device, [](RandomSource& source, const Draw& d) { return source.dropout_key(d); });
  return ops::philox_keep_mask(of_draw, sizes, p);
}

}  // namespace ntkcl::methods
