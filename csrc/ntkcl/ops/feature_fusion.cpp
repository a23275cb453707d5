#include "ntkcl/ops/feature_fusion.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ntkcl/ops/checks.h"
#include "ntkcl/ops/schema.h"
#include "ntkcl/ops/wanted.h"

namespace ntkcl::ops {
namespace {

using Optional = std::optional<at::Tensor>;
using FourTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Wanted = std::array<bool, kFusionGradients>;

constexpr const char* kOp = "feature_fusion";

void check(const char* op, const at::Tensor& channel, const at::Tensor& weight,
           const Optional& head_mask, double p) {
  check_floating(op, "channel", channel);
  NTKCL_OP_CHECK(channel.dim() == 2, op, "expected channel (B, D), got ", channel.sym_sizes());
  const c10::SymInt d = channel.sym_size(1);
  check_like(op, "weight", weight, "channel", channel);
  check_shape(op, "weight", weight, {d, d});
  check_dropout_probability(op, p);
  if (head_mask) {
    NTKCL_OP_CHECK_TYPE(
        head_mask->scalar_type() == at::kByte || head_mask->scalar_type() == at::kBool, op,
        "expected head_mask of uint8 or bool, got ", head_mask->scalar_type());
    NTKCL_OP_CHECK(head_mask->device() == channel.device(), op,
                   "expected head_mask on channel's device ", channel.device(), ", got ",
                   head_mask->device());
    NTKCL_OP_CHECK(head_mask->dim() == 2 && head_mask->sym_size(0) == channel.sym_size(0) &&
                       head_mask->sym_size(1) >= 1 && d % head_mask->sym_size(1) == 0,
                   op, "expected head_mask (", channel.sym_size(0), ", H) with H a divisor of ", d,
                   ", got ", head_mask->sym_sizes());
  }
}

void check_forward(const at::Tensor& channel, const at::Tensor& patch, const at::Tensor& weight,
                   const at::Tensor& bias, const Optional& head_mask, double p) {
  check(kOp, channel, weight, head_mask, p);
  check_like(kOp, "patch", patch, "channel", channel);
  check_same_shape(kOp, "patch", patch, "channel", channel);
  check_like(kOp, "bias", bias, "channel", channel);
  check_shape(kOp, "bias", bias, {channel.sym_size(1)});
}

void check_backward(const at::Tensor& grad, const at::Tensor& channel, const at::Tensor& weight,
                    const Optional& head_mask, double p) {
  const char* op = "feature_fusion_backward";
  check(op, channel, weight, head_mask, p);
  check_like(op, "grad", grad, "channel", channel);
  check_same_shape(op, "grad", grad, "channel", channel);
}

// x value_scale, times keep / (1 - p) in each head.
at::Tensor scaled_heads(const at::Tensor& x, const Optional& head_mask,
                        const FusionScales& scales) {
  if (!head_mask) {
    return x * scales.value;
  }
  const at::Tensor by_head = head_mask->to(x.scalar_type()) * (scales.value / (1.0 - scales.p));
  return (x.unflatten(1, {head_mask->size(1), -1}) * by_head.unsqueeze(2)).flatten(1);
}

at::Tensor forward(const at::Tensor& channel, const at::Tensor& patch, const at::Tensor& weight,
                   const at::Tensor& bias, const Optional& head_mask, double p, double value_scale,
                   double patch_scale) {
  check_forward(channel, patch, weight, bias, head_mask, p);
  const at::Tensor value = at::addmm(bias, channel, weight.t());
  at::Tensor out = scaled_heads(value, head_mask, {p, value_scale, patch_scale});
  return out.add_(channel).add_(patch, patch_scale);
}

at::Tensor forward_meta(const at::Tensor& channel, const at::Tensor& patch,
                        const at::Tensor& weight, const at::Tensor& bias, const Optional& head_mask,
                        double p, double, double) {
  check_forward(channel, patch, weight, bias, head_mask, p);
  return at::empty_symint(channel.sym_sizes(), channel.options());
}

FourTensors backward(const at::Tensor& grad, const at::Tensor& channel, const at::Tensor& weight,
                     const Optional& head_mask, double p, double value_scale, double patch_scale,
                     Wanted wanted) {
  check_backward(grad, channel, weight, head_mask, p);
  // A backward pass may run inside torch.autocast, which would change the products' types.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor dense = grad.contiguous();
  const at::Tensor dvalue = scaled_heads(dense, head_mask, {p, value_scale, patch_scale});
  return {wanted[0] ? at::addmm(dense, dvalue, weight) : unwanted(grad),
          wanted[1] ? dense * patch_scale : unwanted(grad),
          wanted[2] ? at::mm(dvalue.t(), channel) : unwanted(grad),
          wanted[3] ? dvalue.sum(0) : unwanted(grad)};
}

FourTensors backward_meta(const at::Tensor& grad, const at::Tensor& channel,
                          const at::Tensor& weight, const Optional& head_mask, double p, double,
                          double, Wanted wanted) {
  check_backward(grad, channel, weight, head_mask, p);
  return {empty_if(wanted[0], grad.sym_sizes(), grad), empty_if(wanted[1], grad.sym_sizes(), grad),
          empty_if(wanted[2], weight.sym_sizes(), grad),
          empty_if(wanted[3], {grad.sym_size(1)}, grad)};
}

}  // namespace

at::Tensor feature_fusion(const at::Tensor& channel, const at::Tensor& patch,
                          const at::Tensor& weight, const at::Tensor& bias,
                          const Optional& head_mask, const FusionScales& scales) {
  static const auto op = find_operator<decltype(forward)>(kOp);
  return op.call(channel, patch, weight, bias, head_mask, scales.p, scales.value, scales.patch);
}

std::array<at::Tensor, kFusionGradients> feature_fusion_backward(
    const at::Tensor& grad, const at::Tensor& channel, const at::Tensor& weight,
    const Optional& head_mask, const FusionScales& scales, const Wanted& wanted) {
  static const auto op = find_operator<decltype(backward)>("feature_fusion_backward");
  auto [dchannel, dpatch, dweight, dbias] =
      op.call(grad, channel, weight, head_mask, scales.p, scales.value, scales.patch, wanted);
  return {dchannel, dpatch, dweight, dbias};
}

TORCH_LIBRARY_IMPL(ntkcl, Meta, m) {
  m.impl("feature_fusion", &forward_meta);
  m.impl("feature_fusion_backward", &backward_meta);
}

TORCH_LIBRARY_IMPL(ntkcl, CPU, m) {
  m.impl("feature_fusion", &forward);
  m.impl("feature_fusion_backward", &backward);
}

TORCH_LIBRARY_IMPL(ntkcl, CUDA, m) {
  m.impl("feature_fusion", &forward);
  m.impl("feature_fusion_backward", &backward);
}

}  // namespace ntkcl::ops
