#include "ntkcl/methods/softmax_head.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "ntkcl/core/error.h"
#include "ntkcl/nn/cosine_head.h"

namespace ntkcl::methods {
namespace {

constexpr double kDeviation = 0.02;  // of the first weights

}  // namespace

SoftmaxHead::SoftmaxHead(SoftmaxHeadOptions options, int64_t width, const at::TensorOptions& like)
    : options_(std::move(options)),
      weight_(at::zeros({0, width}, like)),
      bias_(at::zeros({0}, like)) {}

void SoftmaxHead::grow(int64_t kept, int64_t more, int64_t task, RandomSource& random) {
  NTKCL_CHECK(kept <= classes(), "state", "head: expected the ", kept,
              " classes learned before, got ", classes());
  const at::Tensor fresh =
      random.normal({"head.weight", task}, {more, weight_.size(1)}, weight_.options()) * kDeviation;
  weight_ = at::cat({weight_.narrow(0, 0, kept).detach(), fresh});
  bias_ = at::constant_pad_nd(bias_.narrow(0, 0, kept).detach(), {0, more});
}

std::vector<optim::ParameterGroup> SoftmaxHead::trained(const std::vector<at::Tensor>& peft,
                                                        ClassRange range) {
  NTKCL_CHECK(range.first + range.count <= classes(), "state", "head: expected the ",
              range.first + range.count, " classes of this task and before, got ", classes());
  first_trained_ = range.first;
  trained_weight_ = weight_.narrow(0, range.first, range.count).detach();
  trained_bias_ = bias_.narrow(0, range.first, range.count).detach();
  std::vector<optim::ParameterGroup> groups{{.name = "peft", .parameters = peft},
                                            {.name = "head", .parameters = {trained_weight_}}};
  if (options_.kind == "linear") {
    groups.back().parameters.push_back(trained_bias_);
  }
  for (const optim::ParameterGroup& group : groups) {
    for (const at::Tensor& parameter : group.parameters) {
      parameter.requires_grad_(true);
    }
  }
  return groups;
}

Losses SoftmaxHead::gradients(const at::Tensor& features, const at::Tensor& labels,
                              TaskServices& services) const {
  const at::Tensor loss = at::cross_entropy_loss(logits(features, trained_weight_, trained_bias_),
                                                 labels - first_trained_);
  loss.backward();
  services.average_gradients({});
  return {{"total", loss.detach()}};
}

at::Tensor SoftmaxHead::logits(const at::Tensor& features) const {
  return logits(features, weight_, bias_);
}

at::Tensor SoftmaxHead::logits(const at::Tensor& features, const at::Tensor& weight,
                               const at::Tensor& bias) const {
  return options_.kind == "linear" ? at::linear(features, weight, bias)
                                   : nn::cosines(features, weight) * options_.logit_scale;
}

void SoftmaxHead::visit_state(const std::string& prefix, const StateVisitor& visitor) {
  const int64_t width = weight_.size(1);
  visitor(prefix + "weight", weight_);
  visitor(prefix + "bias", bias_);
  NTKCL_CHECK(weight_.dim() == 2 && weight_.size(1) == width &&
                  bias_.sizes() == weight_.sizes().slice(0, 1),
              "state", prefix, "*: expected weight (classes, ", width, ") and bias (classes), got ",
              weight_.sizes(), " and ", bias_.sizes());
}

}  // namespace ntkcl::methods
