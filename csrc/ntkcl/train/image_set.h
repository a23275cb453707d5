#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "ntkcl/data/loader.h"
#include "ntkcl/dist/communicator.h"
#include "ntkcl/methods/method.h"
#include "ntkcl/train/normalization.h"

namespace ntkcl::train {

// The images of a run. Labels of the stores are class indices of the data set; `class_order[k]` is
// the data set's class that is learned as number k.
struct RunData {
  std::shared_ptr<data::ImageStore> train, test;
  std::vector<int64_t> class_order;
  data::TransformOptions transform;
  data::LoaderOptions loader;
  std::vector<double> mean{0, 0, 0}, std{1, 1, 1};  // of pixels in [0, 1], per channel
  std::vector<int64_t> task_sizes{};  // classes of each task; empty: as the options split them
  int64_t finished_classes = 0;       // learned before this run: they may come without images
};

// The training or the test images of a run: which are of which class, and their way to the device.
//
// Note: of several ranks each reads its own rows of a batch alone; where corrupt images are left
// out, which changes a batch's size, each reads the whole.
class ImageSet {
 public:
  // The sets of training and of test images, in the backbone's type and on its device. With a
  // share held out, the test images are that share of each class's training images. ValueError for
  // a class order, labels or classes that do not fit.
  static std::pair<ImageSet, ImageSet> of_run(const RunData& data, double validation_fraction,
                                              const at::TensorOptions& like,
                                              const std::shared_ptr<dist::Communicator>& ranks);

  // Store positions of the images of classes first .. first + count - 1, in store order.
  std::vector<int64_t> of_classes(int64_t first, int64_t count) const;

  // A pass over images at these store positions, in batches of one image a rank or more; see
  // data::Loader.
  void start(data::View view, std::vector<int64_t> images, int64_t batch_size, uint64_t key);
  // The next batch, normalised and on the device; false at the end of the pass.
  bool next(methods::Batch& batch);
  // Images of the pass that are behind it: in the batches that next() has read.
  int64_t position() const { return reads_own_rows_ ? position_ : loader_->position(); }

  const Normalization& normalization() const { return normalization_; }
  // Corrupt images that were left out, each counted once: int64 (n), store positions.
  at::Tensor skipped() const { return loader_->skipped_images(); }
  // Counts these, too: they were left out before the run went on.
  void count_as_skipped(const at::Tensor& images) { loader_->count_as_skipped(images); }

 private:
  using ByClass = std::vector<std::vector<int64_t>>;
  ImageSet(std::shared_ptr<data::ImageStore> store, ByClass images, const RunData& data,
           const at::TensorOptions& like, std::shared_ptr<dist::Communicator> ranks);
  std::vector<int64_t> own_rows(const std::vector<int64_t>& images, int64_t batch_size) const;
  at::Tensor next_numbers();

  std::shared_ptr<data::ImageStore> store_;
  ByClass images_;                     // store positions per class number
  std::vector<int64_t> class_number_;  // of each class of the data set
  Normalization normalization_;
  std::shared_ptr<dist::Communicator> ranks_;
  std::unique_ptr<data::Loader> loader_;
  bool reads_own_rows_ = false;
  // Of the pass, where a rank reads its own rows.
  std::vector<int64_t> pass_;
  int64_t batch_size_ = 1, position_ = 0;
};

}  // namespace ntkcl::train
