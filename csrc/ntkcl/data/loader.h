#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "ntkcl/core/options.h"
#include "ntkcl/data/image_store.h"
#include "ntkcl/data/transform.h"
#include "ntkcl/data/views.h"

namespace ntkcl::data {

enum class View { kAugmented, kTest };

struct LoaderOptions {
  int64_t threads = 2;
  int64_t prefetch = 4;
  std::string on_corrupt = "stop";
  std::string augment_on = "threads";
  bool pin_memory = false;  // not an option of users: set by who copies batches to a GPU

  template <class Visitor>
  void visit(Visitor& v) {
    v("loader_threads", threads, at_least(1).at_most(256), "threads that decode and augment");
    v("prefetch", prefetch, at_least(1).at_most(1024), "batches prepared ahead");
    v("on_corrupt", on_corrupt, one_of({"stop", "skip"}),
      "what to do with an image that cannot be decoded; skipped ones are counted and named");
    v("augment_on", augment_on, one_of({"threads", "device"}),
      "who crops, resizes and mirrors decoded images: the loader's threads, or the device where it "
      "is a GPU; to the same bits");
  }
};

struct LoadedBatch {
  at::Tensor images;   // uint8 (b, 3, S, S), contiguous; undefined where the device augments
  at::Tensor indices;  // int64 (b), into the store
  std::optional<RawViews> raw{};

  // uint8 (b, 3, S, S). From pinned memory nothing waits for the copy.
  at::Tensor images_on(at::Device device) const;
};

// Reads, decodes and transforms batches ahead of their use.
//
// Note: the view of image i depends on the pass's key and on i alone (philox_subkey(key, i)), and
// batches come in the order of `indices`, so the number of threads changes nothing.
// One thread at a time may call start, next and the queries.
class Loader {
 public:
  Loader(std::shared_ptr<const ImageStore> store, Transform transform, LoaderOptions options);
  ~Loader();  // cancels
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  // Begins a pass over `indices` in batches of batch_size, the last one shorter. Cancels a pass
  // under way. ValueError for an index outside the store.
  void start(View view, std::vector<int64_t> indices, int64_t batch_size, uint64_t key);

  // Waits for the next batch; false at the end of the pass. Where an image of the batch failed, the
  // first failure in the batch's order is thrown and the pass is over. With on_corrupt = "skip" a
  // batch is shorter by its corrupt images, and left out when none remains.
  bool next(LoadedBatch& batch);

  // Images of the pass in the batches that next() has read, also in those that it left out.
  int64_t position() const;

  // Images skipped since construction, each counted once; int64 (n), indices into the store.
  int64_t skipped() const;
  at::Tensor skipped_images() const;
  std::vector<std::string> skipped_names() const;
  // Counts these as skipped, too. ValueError for an index outside the store.
  void count_as_skipped(const at::Tensor& images);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace ntkcl::data
