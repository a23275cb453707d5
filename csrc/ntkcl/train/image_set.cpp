#include "ntkcl/train/image_set.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "ntkcl/core/error.h"

namespace ntkcl::train {
namespace {

std::vector<int64_t> inverse_order(const std::vector<int64_t>& order) {
  const auto n = static_cast<int64_t>(order.size());
  NTKCL_CHECK(n > 0, "class_order", "expected at least one class, got none");
  std::vector<int64_t> inverse(order.size(), -1);
  for (int64_t k = 0; k < n; ++k) {
    const int64_t c = order[static_cast<size_t>(k)];
    NTKCL_CHECK(c >= 0 && c < n && inverse[static_cast<size_t>(c)] < 0, "class_order",
                "expected a permutation of 0 .. ", n - 1, ", got ", c, " at place ", k);
    inverse[static_cast<size_t>(c)] = k;
  }
  return inverse;
}

std::vector<std::vector<int64_t>> by_class(const data::ImageStore& store,
                                           const std::vector<int64_t>& class_number) {
  std::vector<std::vector<int64_t>> images(class_number.size());
  const std::vector<int64_t>& labels = store.labels();
  for (size_t i = 0; i < labels.size(); ++i) {
    NTKCL_CHECK(labels[i] >= 0 && labels[i] < static_cast<int64_t>(class_number.size()), "data",
                "label of ", store.name(static_cast<int64_t>(i)), ": expected 0 .. ",
                class_number.size() - 1, ", got ", labels[i]);
    const auto number = static_cast<size_t>(class_number[static_cast<size_t>(labels[i])]);
    images[number].push_back(static_cast<int64_t>(i));
  }
  return images;
}

void check_classes(const std::vector<std::vector<int64_t>>& images, const RunData& data,
                   const char* kind) {
  for (auto c = static_cast<size_t>(data.finished_classes); c < images.size(); ++c) {
    NTKCL_CHECK(!images[c].empty(), "data", "class ", data.class_order[c],
                ": expected at least one ", kind, " image, got none");
  }
}

// Takes a share of each class's images out. Keyed by the data set's class, not by the seed: every
// seed holds out the same images.
std::vector<std::vector<int64_t>> hold_out(std::vector<std::vector<int64_t>>& images,
                                           const std::vector<int64_t>& class_order, double share) {
  std::vector<std::vector<int64_t>> held_out;
  for (size_t c = 0; c < images.size(); ++c) {
    const auto n = static_cast<int64_t>(images[c].size());
    const auto held = static_cast<int64_t>(std::llround(static_cast<double>(n) * share));
    NTKCL_CHECK(held > 0 && held < n, "validation_fraction",
                "expected to leave and to hold out at ", "least one image of each class, got ",
                held, " of ", n, " held out");
    const at::Tensor order =
        methods::RandomSource(0).permutation({"validation", class_order[c]}, n);
    const int64_t* place = order.const_data_ptr<int64_t>();
    std::vector<int64_t> kept, out;
    for (int64_t i = 0; i < n; ++i) {
      (i < held ? out : kept).push_back(images[c][static_cast<size_t>(place[i])]);
    }
    std::sort(kept.begin(), kept.end());
    std::sort(out.begin(), out.end());
    images[c] = std::move(kept);
    held_out.push_back(std::move(out));
  }
  return held_out;
}

}  // namespace

std::pair<ImageSet, ImageSet> ImageSet::of_run(const RunData& data, double validation_fraction,
                                               const at::TensorOptions& like,
                                               const std::shared_ptr<dist::Communicator>& ranks) {
  const std::vector<int64_t> class_number = inverse_order(data.class_order);
  ByClass train = by_class(*data.train, class_number), test = by_class(*data.test, class_number);
  check_classes(train, data, "training");
  if (data.finished_classes == 0 || data.test->size() > 0) {  // else nothing is tested
    check_classes(test, data, "test");
  }
  std::shared_ptr<data::ImageStore> test_store = data.test;
  if (validation_fraction > 0) {
    test = hold_out(train, data.class_order, validation_fraction);
    test_store = data.train;
  }
  return {ImageSet(data.train, std::move(train), data, like, ranks),
          ImageSet(std::move(test_store), std::move(test), data, like, ranks)};
}

ImageSet::ImageSet(std::shared_ptr<data::ImageStore> store, ByClass images, const RunData& data,
                   const at::TensorOptions& like, std::shared_ptr<dist::Communicator> ranks)
    : store_(std::move(store)),
      images_(std::move(images)),
      class_number_(inverse_order(data.class_order)),
      normalization_(data.mean, data.std, like),
      ranks_(std::move(ranks)),
      reads_own_rows_(ranks_->size() > 1 && data.loader.on_corrupt == "stop") {
  data::LoaderOptions options = data.loader;
  options.pin_memory = like.device().is_cuda();
  if (!like.device().is_cuda()) {
    options.augment_on = "threads";
  }
  loader_ = std::make_unique<data::Loader>(store_, data::Transform(data.transform), options);
}

std::vector<int64_t> ImageSet::of_classes(int64_t first, int64_t count) const {
  std::vector<int64_t> images;
  for (int64_t c = first; c < first + count; ++c) {
    const auto& of_class = images_[static_cast<size_t>(c)];
    images.insert(images.end(), of_class.begin(), of_class.end());
  }
  std::sort(images.begin(), images.end());
  return images;
}

void ImageSet::start(data::View view, std::vector<int64_t> images, int64_t batch_size,
                     uint64_t key) {
  if (!reads_own_rows_) {
    loader_->start(view, std::move(images), batch_size, key);
    return;
  }
  pass_ = std::move(images);
  batch_size_ = batch_size;
  position_ = 0;
  loader_->start(view, own_rows(pass_, batch_size), dist::Rows(ranks_, batch_size).count(), key);
}

// Of each batch; all but the last are of one size.
std::vector<int64_t> ImageSet::own_rows(const std::vector<int64_t>& images,
                                        int64_t batch_size) const {
  std::vector<int64_t> own;
  const auto count = static_cast<int64_t>(images.size());
  for (int64_t first = 0; first < count; first += batch_size) {
    const dist::Rows rows(ranks_, std::min(batch_size, count - first));
    const auto begin = images.begin() + first + rows.held_first();
    own.insert(own.end(), begin, begin + rows.held());
  }
  return own;
}

at::Tensor ImageSet::next_numbers() {
  const int64_t count = std::min(batch_size_, static_cast<int64_t>(pass_.size()) - position_);
  at::Tensor numbers = at::tensor(
      at::IntArrayRef(pass_).slice(static_cast<size_t>(position_), static_cast<size_t>(count)));
  position_ += count;
  return numbers;
}

bool ImageSet::next(methods::Batch& batch) {
  data::LoadedBatch loaded;
  if (!loader_->next(loaded)) {
    return false;
  }
  const at::Tensor numbers = reads_own_rows_ ? next_numbers() : loaded.indices;
  const int64_t n = numbers.size(0);
  const at::Device device = normalization_.device();
  at::Tensor labels = at::empty({n}, at::TensorOptions(at::kLong).pinned_memory(device.is_cuda()));
  int64_t* out = labels.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    const auto image = static_cast<size_t>(numbers.const_data_ptr<int64_t>()[i]);
    out[i] = class_number_[static_cast<size_t>(store_->labels()[image])];
  }
  const dist::Rows rows(ranks_, n);
  if (!reads_own_rows_ && !loaded.raw) {
    loaded.images = rows.own(loaded.images);  // before they travel
  }
  const at::Tensor images = loaded.images_on(device);
  const at::Tensor own = !reads_own_rows_ && loaded.raw ? rows.own(images) : images;
  batch = {normalization_(own), labels.to(device, /*non_blocking=*/true), numbers, rows};
  return true;
}

}  // namespace ntkcl::train
