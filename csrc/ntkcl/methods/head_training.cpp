#include "ntkcl/methods/head_training.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "ntkcl/core/error.h"
#include "ntkcl/optim/optimizer.h"
#include "ntkcl/optim/schedule.h"

namespace ntkcl::methods {
namespace {

// Requires gradients of tensors while it lives.
class Training {
 public:
  explicit Training(const std::vector<at::Tensor>& tensors) : tensors_(tensors) {
    for (const at::Tensor& tensor : tensors_) {
      tensor.requires_grad_(true);
    }
  }
  ~Training() {
    for (const at::Tensor& tensor : tensors_) {
      tensor.mutable_grad().reset();
      tensor.requires_grad_(false);
    }
  }
  Training(const Training&) = delete;
  Training& operator=(const Training&) = delete;

  std::vector<at::Tensor> gradients() const {
    std::vector<at::Tensor> gradients;
    for (const at::Tensor& tensor : tensors_) {
      gradients.push_back(tensor.grad());
    }
    return gradients;
  }

 private:
  std::vector<at::Tensor> tensors_;
};

// One copy to the host for all steps of an epoch.
void append_finite(std::vector<double>& to, const std::vector<at::Tensor>& losses,
                   const char* where) {
  if (losses.empty()) {
    return;
  }
  const at::Tensor host = at::stack(losses).to(at::kCPU, at::kDouble);
  for (const double value : at::ArrayRef<double>(host.const_data_ptr<double>(), losses.size())) {
    if (!std::isfinite(value)) {
      NTKCL_FAIL(NumericalError, where, "the cross-entropy is ", value, " at step ", to.size());
    }
    to.push_back(value);
  }
}

}  // namespace

HeadTraining train_head(const std::vector<at::Tensor>& parameters,
                        const std::function<at::Tensor(const at::Tensor&)>& logits,
                        const std::function<LabelledFeatures(int64_t)>& draw,
                        const HeadTrainingOptions& options, const char* where) {
  const at::AutoGradMode record(true);
  const Training training(parameters);
  optim::OptimizerOptions sgd;
  sgd.kind = "sgd";
  sgd.momentum = options.momentum;
  sgd.weight_decay = options.weight_decay;
  const auto optimizer = optim::make_optimizer(sgd, {{.name = "head", .parameters = parameters}});
  const optim::ScheduleOptions cosine;  // to 0, by epochs
  std::vector<double> values;
  for (int64_t epoch = 0; epoch < options.epochs; ++epoch) {
    optim::schedule_learning_rates(*optimizer, cosine, options.learning_rate, epoch,
                                   options.epochs);
    const LabelledFeatures drawn = draw(epoch);
    std::vector<at::Tensor> losses;
    for (int64_t first = 0; first < drawn.features.size(0); first += options.rows) {
      const int64_t count = std::min(options.rows, drawn.features.size(0) - first);
      optimizer->step([&](int) {
        const at::Tensor loss = at::cross_entropy_loss(
            logits(drawn.features.narrow(0, first, count)), drawn.labels.narrow(0, first, count));
        losses.push_back(loss.detach());
        loss.backward();
      });
    }
    append_finite(values, losses, where);
  }
  std::vector<at::Tensor> gradients;
  if (!values.empty()) {
    gradients = training.gradients();
  }
  return {std::move(values), std::move(gradients)};
}

}  // namespace ntkcl::methods
