#include "ntkcl/methods/gaussian_alignment.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "ntkcl/core/error.h"

namespace ntkcl::methods {

std::vector<double> mean_factors(const std::vector<int64_t>& tasks, int64_t task, double lowest) {
  std::vector<double> factors;
  for (const int64_t of_class : tasks) {
    factors.push_back(lowest + (1 - lowest) * static_cast<double>(of_class + 1) /
                                   static_cast<double>(task + 1));
  }
  return factors;
}

HeadTraining align_on_gaussians(const std::vector<at::Tensor>& parameters,
                                const std::function<at::Tensor(const at::Tensor&)>& logits,
                                const stats::ClassGaussians& gaussians,
                                const std::vector<double>& factors,
                                const GaussianAlignmentOptions& options,
                                const GaussianDraws& draws) {
  const int64_t classes = gaussians.classes();
  NTKCL_CHECK(static_cast<int64_t>(factors.size()) == classes, "gaussian_alignment",
              "expected a factor for each of ", classes, " classes, got ", factors.size());
  const auto draw = [&](int64_t epoch) -> LabelledFeatures {
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> of_class;
    for (int64_t c = 0; c < classes; ++c) {
      of_class.push_back(
          gaussians.draw(c, factors[static_cast<size_t>(c)], draws.normals(epoch, c)));
    }
    const at::Tensor order = draws.permutation(epoch, classes * options.samples);
    const at::Device device = gaussians.means().device();
    return {at::cat(of_class).index_select(0, order.to(device)),
            order.div(options.samples, "floor").to(device)};
  };
  return train_head(parameters, logits, draw,
                    {.epochs = options.epochs,
                     .learning_rate = options.learning_rate,
                     .momentum = options.momentum,
                     .weight_decay = options.weight_decay,
                     .rows = options.samples});
}

}  // namespace ntkcl::methods
