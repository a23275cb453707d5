#include <set>
#include <thread>

#include <ATen/ATen.h>

#include "ntkcl/core/philox.h"
#include "ntkcl/data/loader.h"
#include "testing.h"

namespace ntkcl::data {
namespace {

using testing::message_of;

std::vector<uint8_t> noise(int64_t count, uint64_t key) {
  PhiloxStream draws(key);
  std::vector<uint8_t> bytes(static_cast<size_t>(count));
  for (uint8_t& byte : bytes) {
    byte = static_cast<uint8_t>(draws.bits());
  }
  return bytes;
}

// Images of one pixel value each; some are missing or corrupt.
class FaultyStore final : public ImageStore {
 public:
  FaultyStore(int64_t size, std::set<int64_t> corrupt, std::set<int64_t> missing = {})
      : ImageStore(std::vector<int64_t>(static_cast<size_t>(size))),
        corrupt_(std::move(corrupt)),
        missing_(std::move(missing)) {}

 private:
  std::string do_name(int64_t index) const override { return "image " + std::to_string(index); }
  Image do_load(int64_t index) const override {
    if (corrupt_.count(index)) {
      throw CorruptImage(do_name(index) + " is corrupt");
    }
    if (missing_.count(index)) {
      throw FileNotFound(do_name(index) + " is missing");
    }
    return {2, 3, std::vector<uint8_t>(18, static_cast<uint8_t>(index))};
  }

  std::set<int64_t> corrupt_;
  std::set<int64_t> missing_;
};

std::vector<int64_t> first_indices(int64_t n) {
  std::vector<int64_t> indices;
  for (int64_t i = 0; i < n; ++i) {
    indices.push_back(i);
  }
  return indices;
}

LoaderOptions with_threads(int64_t threads, std::string on_corrupt = "stop") {
  LoaderOptions options;
  options.threads = threads;
  options.on_corrupt = std::move(on_corrupt);
  return options;
}

const Transform kResize({"resize", 4});

TEST_CASE("a window of a resized image equals that part of the whole", "[data]") {
  PhiloxStream draws(5);
  const auto side = [&] { return static_cast<int64_t>(1 + draws.below(50)); };
  for (int i = 0; i < 400; ++i) {
    const int64_t height = side(), width = side(), out_height = side(), out_width = side();
    const auto input = noise(3 * height * width, i);
    const auto top = static_cast<int64_t>(draws.below(out_height));
    const auto left = static_cast<int64_t>(draws.below(out_width));
    const kernels::Window window{top, left, static_cast<int64_t>(1 + draws.below(out_height - top)),
                                 static_cast<int64_t>(1 + draws.below(out_width - left))};
    const kernels::ImageView view{input.data(), height, width, 3 * width};
    const auto filter = i % 2 ? kernels::Filter::kBicubic : kernels::Filter::kBilinear;
    const kernels::Box box{0, 0, static_cast<float>(width), static_cast<float>(height)};
    std::vector<uint8_t> whole(3 * out_height * out_width);
    std::vector<uint8_t> part(3 * window.height * window.width);
    kernels::resample(view, filter, out_height, out_width, whole.data());
    kernels::resample(view, box, filter, out_height, out_width, window, part.data());
    bool same = true;
    for (int64_t y = 0; y < window.height; ++y) {
      const auto* expected = &whole[3 * ((top + y) * out_width + left)];
      same = same &&
             std::equal(expected, expected + 3 * window.width, part.begin() + 3 * y * window.width);
    }
    CHECK(same);
  }
}

TEST_CASE("a crop is resized without a look at the pixels around it", "[data]") {
  const auto pixels = noise(int64_t{3} * 20 * 30, 1);
  const kernels::ImageView whole{pixels.data(), 20, 30, 90};
  const kernels::ImageView crop = whole.crop(4, 7, 11, 13);
  std::vector<uint8_t> copied;
  for (int64_t y = 0; y < crop.height; ++y) {
    const uint8_t* row = crop.pixels + y * crop.row_bytes;
    copied.insert(copied.end(), row, row + 3 * crop.width);
  }
  std::vector<uint8_t> from_view(3 * 8 * 9);
  std::vector<uint8_t> from_copy(from_view.size());
  kernels::resample(crop, kernels::Filter::kBicubic, 8, 9, from_view.data());
  kernels::resample({copied.data(), 11, 13, 39}, kernels::Filter::kBicubic, 8, 9, from_copy.data());
  CHECK(from_view == from_copy);
}

TEST_CASE("the loader gives the same batches for any number of threads", "[data]") {
  const auto images = at::tensor(noise(int64_t{3} * 40 * 9 * 7, 3), at::kByte).view({40, 9, 7, 3});
  const auto store = make_array_store(images, std::vector<int64_t>(40));
  std::vector<at::Tensor> passes;
  for (const int64_t threads : {1, 2, 8}) {
    Loader loader(store, Transform({"cifar", 16}), with_threads(threads));
    loader.start(View::kAugmented, first_indices(40), 7, 11);
    std::vector<at::Tensor> batches;
    for (LoadedBatch batch; loader.next(batch);) {
      batches.push_back(batch.images);
    }
    CHECK(batches.size() == 6);
    passes.push_back(at::cat(batches));
  }
  CHECK(passes[0].equal(passes[1]));
  CHECK(passes[0].equal(passes[2]));
}

TEST_CASE("the loader can be restarted and dropped at any moment", "[data]") {
  const auto store = std::make_shared<FaultyStore>(200, std::set<int64_t>{});
  for (int consumed = 0; consumed < 6; ++consumed) {
    Loader loader(store, kResize, with_threads(4));
    LoadedBatch batch;
    loader.start(View::kTest, first_indices(200), 3, 0);
    for (int i = 0; i < consumed; ++i) {
      CHECK(loader.next(batch));
    }
    loader.start(View::kTest, {150, 20}, 1, 0);
    REQUIRE(loader.next(batch));
    CHECK(batch.indices.item<int64_t>() == 150);
    CHECK(batch.images.eq(150).all().item<bool>());
  }
}

TEST_CASE("the first failure in the order of the batch is thrown, after the batches before it",
          "[data]") {
  const auto store = std::make_shared<FaultyStore>(40, std::set<int64_t>{31, 17, 18});
  for (const int64_t threads : {1, 4}) {
    Loader loader(store, kResize, with_threads(threads));
    loader.start(View::kTest, first_indices(40), 8, 0);
    LoadedBatch batch;
    CHECK(loader.next(batch));
    CHECK(loader.next(batch));
    CHECK(message_of<CorruptImage>([&] { loader.next(batch); }) == "image 17 is corrupt");
    CHECK_FALSE(loader.next(batch));
  }
}

TEST_CASE("corrupt images are skipped where that is asked for, missing ones never", "[data]") {
  const auto store =
      std::make_shared<FaultyStore>(12, std::set<int64_t>{0, 4, 5, 6, 7}, std::set<int64_t>{11});
  Loader loader(store, kResize, with_threads(3, "skip"));
  loader.start(View::kTest, first_indices(12), 4, 0);
  LoadedBatch batch;
  REQUIRE(loader.next(batch));
  CHECK(batch.indices.equal(at::tensor({1, 2, 3}, at::kLong)));
  CHECK(batch.images.size(0) == 3);
  CHECK(message_of<FileNotFound>([&] { loader.next(batch); }) == "image 11 is missing");
  CHECK(loader.skipped() == 5);
  CHECK(loader.skipped_names().front() == "image 0");
}

}  // namespace
}  // namespace ntkcl::data
