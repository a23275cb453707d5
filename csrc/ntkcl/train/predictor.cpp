#include "ntkcl/train/predictor.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <numeric>

#include "ntkcl/train/compute_setup.h"

namespace ntkcl::train {

Predictor::Predictor(const methods::MakeMethod& make, TrainOptions options,
                     const nn::VisionTransformer& backbone, int64_t tasks, Input input,
                     const methods::State& state)
    : options_(std::move(options)),
      input_(std::move(input)),
      vit_(prepare_backbone(backbone, options_)),
      normalization_(input_.mean, input_.std, vit_.options()),
      random_(static_cast<uint64_t>(options_.seed)) {
  input_.loader.on_corrupt = "stop";  // every image has its row
  method_ = make(vit_, tasks, random_);
  methods::load_state([&](const methods::StateVisitor& visitor) { method_->visit_state(visitor); },
                      state, {});
}

methods::Scores Predictor::scores(std::shared_ptr<const data::ImageStore> images) const {
  std::vector<at::Tensor> classes, tasks;
  for_each_batch(std::move(images), [&](const at::Tensor& batch) {
    const methods::Scores scores = method_->scores(batch);
    classes.push_back(scores.classes.cpu());
    if (scores.task.defined()) {
      tasks.push_back(scores.task.cpu());
    }
  });
  return {at::cat(classes), tasks.empty() ? at::Tensor() : at::cat(tasks)};
}

at::Tensor Predictor::scores_of(const at::Tensor& images) const {
  const at::NoGradGuard no_grad;
  return method_->scores(normalization_(images)).classes;
}

at::Tensor Predictor::features(std::shared_ptr<const data::ImageStore> images) const {
  std::vector<at::Tensor> rows;
  for_each_batch(std::move(images), [&](const at::Tensor& batch) {
    rows.push_back(method_->features_of(batch).cpu());
  });
  return at::cat(rows);
}

void Predictor::for_each_batch(std::shared_ptr<const data::ImageStore> images,
                               const ImagesFn& fn) const {
  const at::NoGradGuard no_grad;
  const ComputeScope scope(options_, normalization_.device());
  std::vector<int64_t> all(static_cast<size_t>(images->size()));
  std::iota(all.begin(), all.end(), 0);
  data::LoaderOptions options = input_.loader;
  options.augment_on = "threads";
  data::Loader loader(std::move(images), data::Transform(input_.transform), options);
  loader.start(data::View::kTest, std::move(all), options_.evaluation_batch_size, 0);
  data::LoadedBatch batch;
  while (loader.next(batch)) {
    fn(normalization_(batch.images));
  }
}

}  // namespace ntkcl::train
