#include "ntkcl/ops/residual_layer_norm.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "ntkcl/kernels/residual_layer_norm_cpu.h"
#include "ntkcl/ops/checks.h"
#include "ntkcl/ops/residual_layer_norm_arguments.h"
#include "ntkcl/ops/schema.h"
#include "ntkcl/ops/wanted.h"

namespace ntkcl::ops {
namespace {

using Optional = std::optional<at::Tensor>;
using OptionalType = std::optional<at::ScalarType>;
using detail::FourTensors;

// TypeError unless `type` is the stream's, or bfloat16 beside float32.
void check_beside(const char* op, const char* name, at::ScalarType type, at::ScalarType stream) {
  NTKCL_OP_CHECK_TYPE(type == stream || (stream == at::kFloat && type == at::kBFloat16), op,
                      "expected ", name, " of the stream's type ", stream,
                      ", or bfloat16 beside float32, got ", type);
}

// A parameter (C) of the stream's type.
void check_parameter(const char* op, const char* name, const at::Tensor& parameter,
                     const at::Tensor& stream) {
  check_like(op, name, parameter, "the stream", stream);
  NTKCL_OP_CHECK(parameter.dim() == 1 && parameter.sym_size(0) == stream.sym_size(-1), op,
                 "expected ", name, " of shape [", stream.sym_size(-1), "], got ",
                 parameter.sym_sizes());
}

void check_stream(const char* op, const char* name, const at::Tensor& stream) {
  check_floating(op, name, stream);
  NTKCL_OP_CHECK(stream.dim() >= 1, op, "expected ", name, " of shape (..., C), got a scalar");
}

void check_forward(const at::Tensor& x, const Optional& update, const at::Tensor& weight,
                   const at::Tensor& bias, double eps, OptionalType dtype) {
  const char* op = "residual_layer_norm";
  check_stream(op, "x", x);
  if (update) {
    check_beside(op, "update", update->scalar_type(), x.scalar_type());
    check_same_shape(op, "update", *update, "x", x);
    NTKCL_OP_CHECK(update->device() == x.device(), op, "expected update on x's device ", x.device(),
                   ", got ", update->device());
  }
  check_parameter(op, "weight", weight, x);
  check_parameter(op, "bias", bias, x);
  NTKCL_OP_CHECK(eps >= 0, op, "expected eps >= 0, got ", eps);
  if (dtype) {
    check_beside(op, "a dtype", *dtype, x.scalar_type());
  }
}

void check_backward(const at::Tensor& grad, const Optional& sum_grad, const at::Tensor& sum,
                    const at::Tensor& mean, const at::Tensor& scale, const at::Tensor& weight,
                    OptionalType update_dtype) {
  const char* op = "residual_layer_norm_backward";
  check_stream(op, "sum", sum);
  check_beside(op, "grad", grad.scalar_type(), sum.scalar_type());
  check_same_shape(op, "grad", grad, "sum", sum);
  if (sum_grad) {
    check_like(op, "sum_grad", *sum_grad, "sum", sum);
    check_same_shape(op, "sum_grad", *sum_grad, "sum", sum);
  }
  for (const auto& [name, of_row] : {std::pair{"mean", &mean}, std::pair{"scale", &scale}}) {
    NTKCL_OP_CHECK_TYPE(of_row->scalar_type() == compute_type(sum.scalar_type()), op, "expected ",
                        name, " of ", compute_type(sum.scalar_type()), ", got ",
                        of_row->scalar_type());
    NTKCL_OP_CHECK(of_row->sym_sizes() == sum.sym_sizes().slice(0, sum.dim() - 1), op, "expected ",
                   name, " of shape ", sum.sym_sizes().slice(0, sum.dim() - 1), ", got ",
                   of_row->sym_sizes());
  }
  check_parameter(op, "weight", weight, sum);
  if (update_dtype) {
    check_beside(op, "an update_dtype", *update_dtype, sum.scalar_type());
  }
}

FourTensors empty_results(const at::Tensor& x, bool update, OptionalType dtype) {
  const auto rows = x.sym_sizes().slice(0, x.dim() - 1);
  const auto of_rows = x.options().dtype(compute_type(x.scalar_type()));
  return {empty_if(update, x.sym_sizes(), x),
          at::empty_symint(x.sym_sizes(), x.options().dtype(dtype.value_or(x.scalar_type()))),
          at::empty_symint(rows, of_rows), at::empty_symint(rows, of_rows)};
}

FourTensors empty_gradients(const at::Tensor& sum, const at::Tensor& weight,
                            OptionalType update_dtype, bool affine) {
  const bool other = update_dtype && *update_dtype != sum.scalar_type();
  return {at::empty_symint(sum.sym_sizes(), sum.options()),
          other ? at::empty_symint(sum.sym_sizes(), sum.options().dtype(*update_dtype))
                : at::empty({0}, sum.options()),
          empty_if(affine, weight.sym_sizes(), weight),
          empty_if(affine, weight.sym_sizes(), weight)};
}

FourTensors residual_layer_norm_meta(const at::Tensor& x, const Optional& update,
                                     const at::Tensor& weight, const at::Tensor& bias, double eps,
                                     OptionalType dtype) {
  check_forward(x, update, weight, bias, eps, dtype);
  return empty_results(x, update.has_value(), dtype);
}

FourTensors residual_layer_norm_backward_meta(const at::Tensor& grad, const Optional& sum_grad,
                                              const at::Tensor& sum, const at::Tensor& mean,
                                              const at::Tensor& scale, const at::Tensor& weight,
                                              OptionalType update_dtype, bool affine) {
  check_backward(grad, sum_grad, sum, mean, scale, weight, update_dtype);
  return empty_gradients(sum, weight, update_dtype, affine);
}

// ---- CPU ----

constexpr int64_t kGrain = 16384;  // elements

template <class Arguments, class Run>
void over_rows(const Arguments& args, const Run& run) {
  at::parallel_for(0, args.rows, std::max<int64_t>(1, kGrain / args.width),
                   [&](int64_t first, int64_t last) { run(args, first, last); });
}

void forward_cpu(const at::Tensor& x, const at::Tensor& update, const at::Tensor& weight,
                 const at::Tensor& bias, double eps, const ResidualLayerNorm& results) {
  detail::with_forward_arguments(x, update, weight, bias, eps, results, [](const auto& all) {
    over_rows(all, [](const auto& args, int64_t first, int64_t last) {
      kernels::residual_layer_norm_cpu(args, first, last);
    });
  });
}

void backward_cpu(const at::Tensor& grad, const at::Tensor& sum_grad, const at::Tensor& sum,
                  const at::Tensor& mean, const at::Tensor& scale, const at::Tensor& weight,
                  const at::Tensor& dx, const at::Tensor& dupdate) {
  detail::with_backward_arguments(
      grad, sum_grad, sum, mean, scale, weight, dx, dupdate, [](const auto& all) {
        over_rows(all, [](const auto& args, int64_t first, int64_t last) {
          kernels::residual_layer_norm_backward_cpu(args, first, last);
        });
      });
}

constexpr detail::ResidualLayerNormKernels kCpuKernels{&forward_cpu, &backward_cpu};

FourTensors residual_layer_norm_cpu(const at::Tensor& x, const Optional& update,
                                    const at::Tensor& weight, const at::Tensor& bias, double eps,
                                    OptionalType dtype) {
  return detail::residual_layer_norm(kCpuKernels, x, update, weight, bias, eps, dtype);
}

FourTensors residual_layer_norm_backward_cpu(const at::Tensor& grad, const Optional& sum_grad,
                                             const at::Tensor& sum, const at::Tensor& mean,
                                             const at::Tensor& scale, const at::Tensor& weight,
                                             OptionalType update_dtype, bool affine) {
  return detail::residual_layer_norm_backward(kCpuKernels, grad, sum_grad, sum, mean, scale, weight,
                                              update_dtype, affine);
}

// Sums over the rows, by torch's operators: only where a LayerNorm is trained.
void affine_gradients(const at::Tensor& grad, const at::Tensor& sum, const at::Tensor& mean,
                      const at::Tensor& scale, const at::Tensor& dweight, const at::Tensor& dbias) {
  const int64_t width = sum.size(-1);
  const at::Tensor g = grad.reshape({-1, width}).to(mean.scalar_type());
  const at::Tensor centred = sum.reshape({-1, width}) - mean.reshape({-1, 1});
  dweight.copy_((g * centred * scale.reshape({-1, 1})).sum(0));
  dbias.copy_(g.sum(0));
}

at::Tensor contiguous_or_undefined(const Optional& tensor) {
  return tensor ? tensor->contiguous() : at::Tensor();
}

}  // namespace

FourTensors detail::residual_layer_norm(const ResidualLayerNormKernels& kernels,
                                        const at::Tensor& x, const Optional& update,
                                        const at::Tensor& weight, const at::Tensor& bias,
                                        double eps, OptionalType dtype) {
  check_forward(x, update, weight, bias, eps, dtype);
  FourTensors results = empty_results(x, update.has_value(), dtype);
  const auto& [sum, out, mean, scale] = results;
  if (x.numel() > 0) {
    kernels.forward(x.contiguous(), contiguous_or_undefined(update), weight.contiguous(),
                    bias.contiguous(), eps, {sum, out, mean, scale});
  }
  return results;
}

FourTensors detail::residual_layer_norm_backward(const ResidualLayerNormKernels& kernels,
                                                 const at::Tensor& grad, const Optional& sum_grad,
                                                 const at::Tensor& sum, const at::Tensor& mean,
                                                 const at::Tensor& scale, const at::Tensor& weight,
                                                 OptionalType update_dtype, bool affine) {
  check_backward(grad, sum_grad, sum, mean, scale, weight, update_dtype);
  FourTensors results = empty_gradients(sum, weight, update_dtype, affine);
  const auto& [dx, dupdate, dweight, dbias] = results;
  if (sum.numel() == 0) {
    dweight.zero_();
    dbias.zero_();
    return results;
  }
  kernels.backward(grad.contiguous(), contiguous_or_undefined(sum_grad), sum.contiguous(),
                   mean.contiguous(), scale.contiguous(), weight.contiguous(), dx, dupdate);
  if (affine) {
    affine_gradients(grad, sum, mean, scale, dweight, dbias);
  }
  return results;
}

ResidualLayerNorm residual_layer_norm(const at::Tensor& x, const Optional& update,
                                      const at::Tensor& weight, const at::Tensor& bias, double eps,
                                      OptionalType dtype) {
  static const auto op =
      find_operator<FourTensors(const at::Tensor&, const Optional&, const at::Tensor&,
                                const at::Tensor&, double, OptionalType)>("residual_layer_norm");
  auto [sum, out, mean, scale] = op.call(x, update, weight, bias, eps, dtype);
  return {sum, out, mean, scale};
}

ResidualLayerNormGradients residual_layer_norm_backward(
    const at::Tensor& grad, const Optional& sum_grad, const at::Tensor& sum, const at::Tensor& mean,
    const at::Tensor& scale, const at::Tensor& weight, OptionalType update_dtype, bool affine) {
  static const auto op = find_operator<FourTensors(
      const at::Tensor&, const Optional&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
      const at::Tensor&, OptionalType, bool)>("residual_layer_norm_backward");
  auto [dx, dupdate, dweight, dbias] =
      op.call(grad, sum_grad, sum, mean, scale, weight, update_dtype, affine);
  return {dx, dupdate, dweight, dbias};
}

TORCH_LIBRARY_IMPL(ntkcl, Meta, m) {
  m.impl("residual_layer_norm", &residual_layer_norm_meta);
  m.impl("residual_layer_norm_backward", &residual_layer_norm_backward_meta);
}

TORCH_LIBRARY_IMPL(ntkcl, CPU, m) {
  m.impl("residual_layer_norm", &residual_layer_norm_cpu);
  m.impl("residual_layer_norm_backward", &residual_layer_norm_backward_cpu);
}

}  // namespace ntkcl::ops
