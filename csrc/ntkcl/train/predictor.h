#pragma once

#include <memory>
#include <string>

#include "ntkcl/data/loader.h"
#include "ntkcl/methods/table.h"
#include "ntkcl/train/normalization.h"
#include "ntkcl/train/options.h"

namespace ntkcl::train {

// A trained method outside its run: scores and features of any images.
class Predictor {
 public:
  // How images come to the backbone.
  struct Input {
    data::TransformOptions transform;
    data::LoaderOptions loader;
    std::vector<double> mean, std;  // of pixels in [0, 1], per channel
  };

  // `state` is all of a method's after `tasks` tasks. ValueError where it is not of this method.
  Predictor(const methods::MakeMethod& make, TrainOptions options,
            const nn::VisionTransformer& backbone, int64_t tasks, Input input,
            const methods::State& state);

  // Of all images of the store, in order, on the CPU: (n, classes seen; of some methods all
  // classes), and the tasks inferred. A corrupt image ends it with CorruptImage.
  methods::Scores scores(std::shared_ptr<const data::ImageStore> images) const;
  // Of uint8 images (B, 3, S, S) that are already transformed, on the backbone's device; in plain
  // operators one after the other, which torch.export can record.
  at::Tensor scores_of(const at::Tensor& images) const;
  // (n, D), what the classes are told apart by.
  at::Tensor features(std::shared_ptr<const data::ImageStore> images) const;

  methods::Method& method() { return *method_; }

 private:
  using ImagesFn = std::function<void(const at::Tensor& images)>;
  void for_each_batch(std::shared_ptr<const data::ImageStore> images, const ImagesFn& fn) const;

  TrainOptions options_;
  Input input_;
  nn::VisionTransformer vit_;
  Normalization normalization_;
  methods::RandomSource random_;
  std::unique_ptr<methods::Method> method_;
};

}  // namespace ntkcl::train
