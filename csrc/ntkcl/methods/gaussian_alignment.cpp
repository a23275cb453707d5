#include "ntkcl/methods/gaussian_alignment.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "ntkcl/core/error.h"

namespace ntkcl::methods {
namespace {

constexpr const char* kWhere = "gaussian_alignment";

}  // namespace

GaussianDraws gaussian_draws(TaskServices& services, const stats::ClassGaussians& gaussians,
                             const GaussianAlignmentOptions& options) {
  const int64_t task = services.task().index;
  return {
      .permutation =
          [&services, task, epochs = options.epochs](int64_t epoch, int64_t count) {
            services.progress("alignment", epoch, epochs);
            return services.random().permutation({"alignment.order", task, epoch}, count);
          },
      .normals =
          [&services, &gaussians, task, samples = options.samples](int64_t epoch, int64_t number) {
            const at::Tensor& means = gaussians.means();
            return services.random().normal({"alignment.normals", task, epoch, number},
                                            {samples, means.size(1)}, means.options());
          }};
}

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
  NTKCL_CHECK(static_cast<int64_t>(factors.size()) == classes, kWhere,
              "expected a factor for each of ", classes, " classes, got ", factors.size());
  const auto draw = [&](int64_t epoch) -> LabelledFeatures {
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> of_class;
    for (int64_t c = 0; c < classes; ++c) {
      const at::Tensor normals = draws.normals(epoch, c);
      NTKCL_CHECK(normals.dim() == 2 && normals.size(0) == options.samples, kWhere, "expected ",
                  options.samples, " draws of class ", c, ", got ", normals.sizes());
      of_class.push_back(gaussians.draw(c, factors[static_cast<size_t>(c)], normals));
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
                     .rows = options.samples},
                    kWhere);
}

}  // namespace ntkcl::methods
