#include "ntkcl/ops/bias_relu_dropout.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "ntkcl/kernels/bias_relu_dropout_cpu.h"
#include "ntkcl/kernels/keep.h"
#include "ntkcl/ops/checks.h"
#include "ntkcl/ops/element_type.h"
#include "ntkcl/ops/schema.h"

namespace ntkcl::ops {
namespace detail {

void check_bias_relu_dropout(const at::Tensor& x, const at::Tensor& bias,
                             const std::optional<at::Tensor>& mask,
                             const std::optional<at::Tensor>& key, double p) {
  const char* op = "bias_relu_dropout";
  check_floating(op, "x", x);
  NTKCL_OP_CHECK(x.dim() >= 1, op, "expected x of shape (..., r), got a scalar");
  check_like(op, "bias", bias, "x", x);
  const bool grouped = bias.dim() == 2 && x.dim() >= 2 && bias.sym_size(0) == x.sym_size(0);
  NTKCL_OP_CHECK((bias.dim() == 1 || grouped) && bias.sym_size(-1) == x.sym_size(-1), op,
                 "expected bias (r), or (g, r) for the g = first dimension, of x ", x.sym_sizes(),
                 ", got ", bias.sym_sizes());
  check_dropout(op, mask, key, p, "x's", x.sym_sizes(), x.device());
}

void check_bias_relu_dropout_backward(const at::Tensor& grad, const at::Tensor& y, double p,
                                      int64_t groups) {
  const char* op = "bias_relu_dropout_backward";
  check_floating(op, "y", y);
  NTKCL_OP_CHECK(y.dim() >= 1, op, "expected y of shape (..., r), got a scalar");
  check_like(op, "grad", grad, "y", y);
  check_same_shape(op, "grad", grad, "y", y);
  check_dropout_probability(op, p);
  NTKCL_OP_CHECK(groups == -1 || (y.dim() >= 2 && y.sym_size(0) == groups), op,
                 "expected groups -1 for none, or the first dimension of y ", y.sym_sizes(),
                 ", got ", groups);
}

}  // namespace detail

namespace {

// Shape of the bias.
template <class Int>
std::vector<Int> bias_sizes(int64_t groups, Int width) {
  return groups >= 0 ? std::vector<Int>{groups, width} : std::vector<Int>{width};
}

at::Tensor bias_relu_dropout_meta(const at::Tensor& x, const at::Tensor& bias,
                                  const std::optional<at::Tensor>& mask,
                                  const std::optional<at::Tensor>& key, double p) {
  detail::check_bias_relu_dropout(x, bias, mask, key, p);
  return at::empty_symint(x.sym_sizes(), x.options());
}

std::tuple<at::Tensor, at::Tensor> bias_relu_dropout_backward_meta(const at::Tensor& grad,
                                                                   const at::Tensor& y, double p,
                                                                   int64_t groups) {
  detail::check_bias_relu_dropout_backward(grad, y, p, groups);
  return {at::empty_symint(y.sym_sizes(), y.options()),
          at::empty_symint(bias_sizes<c10::SymInt>(groups, y.sym_size(-1)), y.options())};
}

at::Tensor bias_relu_dropout_cpu(const at::Tensor& x, const at::Tensor& bias,
                                 const std::optional<at::Tensor>& mask,
                                 const std::optional<at::Tensor>& key, double p) {
  detail::check_bias_relu_dropout(x, bias, mask, key, p);
  at::Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) {
    return y;
  }
  const at::Tensor x_dense = x.contiguous();
  const at::Tensor bias_dense = bias.contiguous();
  const at::Tensor mask_dense = mask ? mask->contiguous() : at::Tensor();
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    kernels::BiasReluDropout<T> args{.x = elements<T>(x_dense),
                                     .bias = elements<T>(bias_dense),
                                     .y = mutable_elements<T>(y),
                                     .rows = y.numel() / y.size(-1),
                                     .width = y.size(-1),
                                     .groups = bias.dim() == 2 ? bias.size(0) : 1};
    if (mask) {
      args.dropout = kernels::Dropout::kMask;
      args.scale = 1 / (1 - p);
      args.mask = elements<uint8_t>(mask_dense);
    } else if (key) {
      args.dropout = kernels::Dropout::kKey;
      args.scale = 1 / (1 - p);
      args.key = static_cast<uint64_t>(*elements<int64_t>(*key));
      args.threshold = kernels::keep_threshold(p);
    }
    const int64_t blocks = (y.numel() + kernels::kKeepBlock - 1) / kernels::kKeepBlock;
    at::parallel_for(
        0, blocks, at::internal::GRAIN_SIZE / kernels::kKeepBlock,
        [&](int64_t first, int64_t last) { kernels::bias_relu_dropout_cpu(args, first, last); });
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> bias_relu_dropout_backward_cpu(const at::Tensor& grad,
                                                                  const at::Tensor& y, double p,
                                                                  int64_t groups) {
  detail::check_bias_relu_dropout_backward(grad, y, p, groups);
  const at::Tensor dx = at::empty(y.sizes(), y.options());
  const at::Tensor dbias = at::zeros(bias_sizes(groups, y.size(-1)), y.options());
  if (y.numel() == 0) {
    return {dx, dbias};
  }
  const at::Tensor grad_dense = grad.contiguous();
  const at::Tensor y_dense = y.contiguous();
  with_element_type(y.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const kernels::BiasReluDropoutBackward<T> args{.grad = elements<T>(grad_dense),
                                                   .y = elements<T>(y_dense),
                                                   .dx = mutable_elements<T>(dx),
                                                   .dbias = mutable_elements<T>(dbias),
                                                   .rows = y.numel() / y.size(-1),
                                                   .width = y.size(-1),
                                                   .groups = std::max<int64_t>(groups, 1),
                                                   .scale = 1 / (1 - p)};
    const int64_t chunks =
        kernels::bias_relu_dropout_chunks_cpu(args.rows / args.groups, args.width);
    const at::Tensor partials =
        at::empty({args.groups, chunks, args.width}, y.options().dtype(at::kDouble));
    double* partial = mutable_elements<double>(partials);
    at::parallel_for(0, args.groups * chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        kernels::bias_relu_dropout_backward_cpu(args, chunk, partial + chunk * args.width);
      }
    });
    kernels::bias_relu_dropout_dbias_cpu(args, partial, chunks);
  });
  return {dx, dbias};
}

}  // namespace

at::Tensor bias_relu_dropout(const at::Tensor& x, const at::Tensor& bias,
                             const std::optional<at::Tensor>& mask,
                             const std::optional<at::Tensor>& key, double p) {
  static const auto op = find_operator<at::Tensor(
      const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
      const std::optional<at::Tensor>&, double)>("bias_relu_dropout");
  return op.call(x, bias, mask, key, p);
}

std::tuple<at::Tensor, at::Tensor> bias_relu_dropout_backward(const at::Tensor& grad,
                                                              const at::Tensor& y, double p,
                                                              int64_t groups) {
  static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, double, int64_t)>("bias_relu_dropout_backward");
  return op.call(grad, y, p, groups);
}

TORCH_LIBRARY_IMPL(ntkcl, Meta, m) {
  m.impl("bias_relu_dropout", &bias_relu_dropout_meta);
  m.impl("bias_relu_dropout_backward", &bias_relu_dropout_backward_meta);
}

TORCH_LIBRARY_IMPL(ntkcl, CPU, m) {
  m.impl("bias_relu_dropout", &bias_relu_dropout_cpu);
  m.impl("bias_relu_dropout_backward", &bias_relu_dropout_backward_cpu);
}

}  // namespace ntkcl::ops
