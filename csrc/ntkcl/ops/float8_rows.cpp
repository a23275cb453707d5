#include "ntkcl/ops/float8_rows.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ntkcl/kernels/float8_rows.h"
#include "ntkcl/ops/checks.h"
#include "ntkcl/ops/schema.h"

namespace ntkcl::ops {
namespace detail {

void check_float8_rows(const at::Tensor& x) {
  const char* op = "float8_rows";
  NTKCL_OP_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, op,
                      "expected x of float32 or bfloat16, got ", x.scalar_type());
  NTKCL_OP_CHECK(x.dim() > 0, op, "expected x (..., K), got a scalar");
}

}  // namespace detail

namespace {

std::tuple<at::Tensor, at::Tensor> float8_rows_meta(const at::Tensor& x) {
  detail::check_float8_rows(x);
  c10::SymDimVector rows(x.sym_sizes());
  rows.back() = 1;
  return {at::empty_symint(x.sym_sizes(), x.options().dtype(at::kFloat8_e4m3fn)),
          at::empty_symint(rows, x.options().dtype(at::kFloat))};
}

std::tuple<at::Tensor, at::Tensor> float8_rows_cpu(const at::Tensor& x) {
  detail::check_float8_rows(x);
  const at::Tensor exact = x.to(at::kFloat).contiguous();
  if (exact.numel() == 0) {
    auto rows = x.sizes().vec();
    rows.back() = 1;
    return {exact.to(at::kFloat8_e4m3fn), at::ones(rows, exact.options())};
  }
  const at::Tensor largest = exact.abs().amax(-1, /*keepdim=*/true) / kernels::kLargestFloat8;
  const at::Tensor scale = at::where(largest > 0, largest, 1.0f);
  return {(exact / scale).to(at::kFloat8_e4m3fn), scale};
}

}  // namespace

Float8Rows float8_rows(const at::Tensor& x) {
  static const auto op =
      find_operator<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&)>("float8_rows");
  auto [values, scale] = op.call(x);
  return {std::move(values), std::move(scale)};
}

bool multiplies_float8(at::Device device) {
  return device.is_cuda() && detail::cuda_multiplies_float8(device);
}

TORCH_LIBRARY_IMPL(ntkcl, Meta, m) {
  m.impl("float8_rows", &float8_rows_meta);
}

TORCH_LIBRARY_IMPL(ntkcl, CPU, m) {
  m.impl("float8_rows", &float8_rows_cpu);
}

}  // namespace ntkcl::ops
