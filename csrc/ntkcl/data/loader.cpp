#include "ntkcl/data/loader.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include <ATen/ATen.h>

#include "ntkcl/core/philox.h"

namespace ntkcl::data {
namespace {

// (height, width, 3) to (3, height, width).
void write_planes(const Image& view, uint8_t* planes) {
  const int64_t pixels = view.height * view.width;
  for (int64_t channel = 0; channel < 3; ++channel) {
    for (int64_t i = 0; i < pixels; ++i) {
      planes[channel * pixels + i] = view.pixels[3 * i + channel];
    }
  }
}

// A batch that the threads fill.
struct PendingBatch {
  at::Tensor images;
  // In the place of images, where the device makes the views.
  std::vector<std::vector<uint8_t>> crops;
  std::vector<ViewPlan> plans;
  std::vector<int64_t> indices;
  std::vector<std::exception_ptr> errors;  // one per image, null when it succeeded
  int64_t missing = 0;                     // images not done yet
};

}  // namespace

// Note: batches are opened by the consumer (start, next) and filled by the threads, image by image
// in order; `mutex_` guards every member below it. Pixels and errors of one image are written by
// one thread alone, without the lock.
class Loader::Impl {
 public:
  Impl(std::shared_ptr<const ImageStore> store, Transform transform, LoaderOptions options)
      : store_(std::move(store)), transform_(std::move(transform)), options_(std::move(options)) {
    NTKCL_CHECK(store_ != nullptr, "Loader", "expected an image store, got none");
    apply(values_of(options_), options_, "Loader");
  }
  ~Impl() { cancel(); }

  void start(View view, std::vector<int64_t> indices, int64_t batch_size, uint64_t key) {
    cancel();
    NTKCL_CHECK(batch_size > 0, "Loader", "expected a batch size of at least 1, got ", batch_size);
    for (const int64_t index : indices) {
      check_index(index);
    }
    view_ = view;
    indices_ = std::move(indices);
    batch_size_ = batch_size;
    key_ = key;
    stop_ = false;
    opened_ = taken_ = delivered_ = 0;
    for (int64_t i = 0; i < options_.prefetch; ++i) {
      open_batch();
    }
    const auto threads = std::min<int64_t>(options_.threads, static_cast<int64_t>(indices_.size()));
    for (int64_t i = 0; i < threads; ++i) {
      threads_.emplace_back([this] { work(); });
    }
  }

  bool next(LoadedBatch& batch) {
    while (!pending_.empty()) {
      PendingBatch filled = take_batch();
      const std::vector<int64_t> kept = settle_errors(filled);
      if (!kept.empty()) {
        batch = assemble(filled, kept);
        return true;
      }
    }
    cancel();
    return false;
  }

  int64_t position() const { return std::min(delivered_ * batch_size_, total()); }

  at::Tensor skipped_images() const {
    return at::tensor(std::vector<int64_t>(skipped_.begin(), skipped_.end()), at::kLong);
  }

  void count_as_skipped(const at::Tensor& images) {
    NTKCL_CHECK(images.dim() == 1 && images.scalar_type() == at::kLong, "Loader",
                "expected int64 indices (n), got ", images.toString(), images.sizes());
    const at::Tensor host = images.cpu().contiguous();
    for (const int64_t index : at::IntArrayRef(host.const_data_ptr<int64_t>(), host.numel())) {
      check_index(index);
      skipped_.insert(index);
    }
  }

  std::vector<std::string> skipped_names() const {
    std::vector<std::string> names;
    for (const int64_t index : skipped_) {
      names.push_back(store_->name(index));
    }
    return names;
  }

 private:
  void check_index(int64_t index) const {
    NTKCL_CHECK(index >= 0 && index < store_->size(), "Loader", "expected indices in 0 .. ",
                store_->size() - 1, ", got ", index);
  }
  bool on_device() const { return options_.augment_on == "device"; }
  int64_t total() const { return static_cast<int64_t>(indices_.size()); }

  // Adds the next batch to those to be filled, if one is left. The lock is held, or no thread runs.
  void open_batch() {
    const int64_t count = std::min(batch_size_, total() - opened_);
    if (count == 0) {
      return;
    }
    const int64_t size = transform_.image_size();
    PendingBatch batch;
    if (on_device()) {
      batch.crops.resize(count);
      batch.plans.resize(count);
    } else {
      batch.images = at::empty({count, 3, size, size},
                               at::dtype(at::kByte).pinned_memory(options_.pin_memory));
    }
    batch.indices.assign(indices_.begin() + opened_, indices_.begin() + opened_ + count);
    batch.errors.resize(count);
    batch.missing = count;
    pending_.push_back(std::move(batch));
    opened_ += count;
  }

  // Waits for the first batch, takes it and opens another.
  PendingBatch take_batch() {
    std::unique_lock lock(mutex_);
    batch_done_.wait(lock, [this] { return pending_.front().missing == 0; });
    PendingBatch batch = std::move(pending_.front());
    pending_.pop_front();
    ++delivered_;
    open_batch();
    work_opened_.notify_all();
    return batch;
  }

  // The positions of the images that succeeded; throws the first failure unless it may be skipped.
  std::vector<int64_t> settle_errors(const PendingBatch& batch) {
    std::vector<int64_t> kept;
    for (size_t i = 0; i < batch.errors.size(); ++i) {
      if (!batch.errors[i]) {
        kept.push_back(static_cast<int64_t>(i));
        continue;
      }
      try {
        std::rethrow_exception(batch.errors[i]);
      } catch (const CorruptImage&) {
        if (options_.on_corrupt != "skip") {
          cancel();
          throw;
        }
        skipped_.insert(batch.indices[i]);
      } catch (...) {
        cancel();
        throw;
      }
    }
    return kept;
  }

  LoadedBatch assemble(PendingBatch& batch, const std::vector<int64_t>& kept) const {
    at::Tensor indices = at::tensor(batch.indices, at::kLong);
    if (on_device()) {
      return assemble_raw(batch, kept, indices);
    }
    if (kept.size() == batch.indices.size()) {
      return {batch.images, indices};
    }
    const at::Tensor rows = at::tensor(kept, at::kLong);
    return {batch.images.index_select(0, rows), indices.index_select(0, rows)};
  }

  LoadedBatch assemble_raw(PendingBatch& batch, const std::vector<int64_t>& kept,
                           const at::Tensor& indices) const {
    std::vector<std::vector<uint8_t>> crops;
    std::vector<ViewPlan> plans;
    for (const int64_t i : kept) {
      crops.push_back(std::move(batch.crops[i]));
      plans.push_back(batch.plans[i]);
    }
    return {at::Tensor(), indices.index_select(0, at::tensor(kept, at::kLong)),
            RawViews(crops, plans, transform_.image_size(), options_.pin_memory)};
  }

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      work_opened_.wait(lock, [this] { return stop_ || taken_ < opened_ || taken_ == total(); });
      if (stop_ || taken_ == total()) {
        return;
      }
      const int64_t position = taken_++;
      // Stays where it is: a batch leaves the queue when it is filled, and only from the front.
      PendingBatch& batch = pending_[position / batch_size_ - delivered_];
      lock.unlock();
      fill(batch, position % batch_size_);
      lock.lock();
      if (--batch.missing == 0) {
        batch_done_.notify_one();
      }
    }
  }

  void fill(PendingBatch& batch, int64_t i) const {
    try {
      const int64_t index = batch.indices[i];
      const Image image = store_->load(index);
      const ViewPlan plan =
          view_ == View::kAugmented
              ? transform_.plan_train(image.height, image.width, philox_subkey(key_, index))
              : transform_.plan_test(image.height, image.width);
      if (on_device()) {
        hand_over(image, plan, batch.crops[i], batch.plans[i]);
        return;
      }
      const Image view = transform_.make_view(image, plan);
      const int64_t bytes = batch.images.stride(0);
      write_planes(view, batch.images.mutable_data_ptr<uint8_t>() + i * bytes);
    } catch (...) {
      batch.errors[i] = std::current_exception();
    }
  }

  // For the device to make the view. What would cost much memory on the way is made here, and
  // handed over as a view of itself.
  void hand_over(const Image& image, const ViewPlan& plan, std::vector<uint8_t>& crop,
                 ViewPlan& of_crop) const {
    const int64_t size = transform_.image_size();
    if (is_cheap_to_hand_over(plan, size)) {
      crop = crop_of(image, plan);
      of_crop = plan;
      return;
    }
    crop = transform_.make_view(image, plan).pixels;
    of_crop = {.crop = {0, 0, size, size}, .height = size, .width = size};
  }

  void cancel() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    work_opened_.notify_all();
    for (std::thread& thread : threads_) {
      thread.join();
    }
    threads_.clear();
    pending_.clear();
  }

  // Fixed while threads run.
  std::shared_ptr<const ImageStore> store_;
  Transform transform_;
  LoaderOptions options_;
  View view_ = View::kTest;
  std::vector<int64_t> indices_;
  int64_t batch_size_ = 1;
  uint64_t key_ = 0;
  std::vector<std::thread> threads_;
  std::set<int64_t> skipped_;  // the consumer's alone

  std::mutex mutex_;
  std::condition_variable work_opened_;
  std::condition_variable batch_done_;
  std::deque<PendingBatch> pending_;
  int64_t opened_ = 0;     // images in batches opened so far
  int64_t taken_ = 0;      // images taken by threads
  int64_t delivered_ = 0;  // batches handed out
  bool stop_ = true;
};

at::Tensor LoadedBatch::images_on(at::Device device) const {
  return raw ? raw->on(device) : images.to(device, /*non_blocking=*/device.is_cuda());
}

Loader::Loader(std::shared_ptr<const ImageStore> store, Transform transform, LoaderOptions options)
    : impl_(std::make_unique<Impl>(std::move(store), std::move(transform), std::move(options))) {}

Loader::~Loader() = default;

void Loader::start(View view, std::vector<int64_t> indices, int64_t batch_size, uint64_t key) {
  impl_->start(view, std::move(indices), batch_size, key);
}

bool Loader::next(LoadedBatch& batch) {
  return impl_->next(batch);
}

int64_t Loader::position() const {
  return impl_->position();
}

int64_t Loader::skipped() const {
  return impl_->skipped_images().numel();
}

at::Tensor Loader::skipped_images() const {
  return impl_->skipped_images();
}

void Loader::count_as_skipped(const at::Tensor& images) {
  impl_->count_as_skipped(images);
}

std::vector<std::string> Loader::skipped_names() const {
  return impl_->skipped_names();
}

}  // namespace ntkcl::data
