#include <ATen/ATen.h>

#include "ntkcl/core/error.h"
#include "ntkcl/nn/frozen_linear.h"
#include "testing.h"

namespace ntkcl::nn {
namespace {

at::Tensor random(at::IntArrayRef sizes, int64_t seed) {
  const auto generator = at::detail::createCPUGenerator(static_cast<uint64_t>(seed));
  return at::randn(sizes, generator, at::kFloat);
}

at::Tensor rounded(const at::Tensor& x) {
  const ops::Float8Rows rows = ops::float8_rows(x);
  return rows.values.to(at::kDouble) * rows.scale.to(at::kDouble);
}

double distance(const at::Tensor& a, const at::Tensor& b) {
  return ((a.to(at::kDouble) - b).norm() / b.norm()).item<double>();
}

struct Case {
  FrozenLinear linear{};
  at::Tensor x{}, grad{};
};

Case of(at::ScalarType type) {
  return {.linear = {.weight = random({48, 32}, 1).to(type), .bias = random({48}, 2).to(type)},
          .x = random({3, 5, 32}, 3).to(type),
          .grad = random({3, 5, 48}, 4).to(type)};
}

TEST_CASE("a quantised product is that of its rounded factors", "[frozen_linear]") {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    const auto [linear, x, grad] = of(type);
    const FrozenLinear quantised = linear.quantise();
    const double tolerance = type == at::kFloat ? 1e-6 : 4e-3;  // of the sum, and of what leaves
    const at::Tensor w = linear.weight, b = linear.bias.to(at::kDouble);

    const at::Tensor y = quantised(x);
    CHECK(y.scalar_type() == type);
    CHECK(distance(y, rounded(x).matmul(rounded(w).t()) + b) < tolerance);
    CHECK(distance(y, x.to(at::kDouble).matmul(w.to(at::kDouble).t()) + b) > 0.01);

    // By the gradient's rows and those of W^T.
    const at::Tensor dx = quantised.input_gradient(grad);
    CHECK(dx.scalar_type() == type);
    CHECK(distance(dx, rounded(grad).matmul(rounded(w.t()).t())) < tolerance);

    CHECK(distance(quantised.gelu(x), at::gelu(y.to(at::kDouble))) < tolerance);
  }
}

TEST_CASE("a quantised product differentiates by its input alone", "[frozen_linear]") {
  const auto [linear, x, grad] = of(at::kFloat);
  const FrozenLinear quantised = linear.quantise();
  const at::Tensor leaf = x.clone().requires_grad_(true);
  const at::Tensor y = quantised(leaf);
  CHECK(at::equal(y.detach(), quantised(x)));
  y.backward(grad);
  CHECK(at::equal(leaf.grad(), quantised.input_gradient(grad)));
}

TEST_CASE("what float8 holds is multiplied exactly", "[frozen_linear]") {
  // Whole numbers of four bits, the largest 448 in every row.
  at::Tensor x = at::arange(-8, 8).to(at::kFloat).repeat({16, 1});
  x.select(1, 0).fill_(448);
  const FrozenLinear linear{.weight = x.roll(3, 1).contiguous(), .bias = at::ones({16})};
  CHECK(at::equal(linear.quantise()(x), linear(x)));
}

TEST_CASE("matrices that do not fit the tiles of float8 are refused", "[frozen_linear]") {
  const FrozenLinear linear{.weight = at::zeros({48, 24}), .bias = at::zeros({48})};
  const std::string message = testing::message_of<ValueError>([&] { linear.quantise(); });
  CHECK(message.find("[float8] expected frozen matrices with sides that are multiples of 16") == 0);
  CHECK(message.find("[48, 24]") != std::string::npos);
}

}  // namespace
}  // namespace ntkcl::nn
