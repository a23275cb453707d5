#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <span>

#include "bindings.h"
#include "ntkcl/core/error.h"
#include "ntkcl/data/image_store.h"
#include "ntkcl/data/loader.h"
#include "ntkcl/data/transform.h"

namespace ntkcl::bindings {
namespace {

using namespace pybind11::literals;
using data::Image;
using data::ImageStore;
using data::Loader;
using data::Transform;
using Pixels = py::array_t<uint8_t, py::array::c_style>;
using Corners = std::array<float, 4>;  // left, top, right, bottom

kernels::ImageView view_of(const Pixels& array, const char* where) {
  NTKCL_CHECK(array.ndim() == 3 && array.shape(2) == 3 && array.size() > 0, where,
              "expected uint8 pixels (height, width, 3), got ", array.ndim(), " dimensions and ",
              array.size(), " values");
  return {array.data(), array.shape(0), array.shape(1), 3 * array.shape(1)};
}

Image image_of(const Pixels& array) {
  const kernels::ImageView view = view_of(array, "Transform");
  return {view.height, view.width, {view.pixels, view.pixels + array.size()}};
}

Pixels array_of(const Image& image) {
  Pixels array({image.height, image.width, int64_t{3}});
  std::copy(image.pixels.begin(), image.pixels.end(), array.mutable_data());
  return array;
}

// Work without the interpreter's lock.
template <class Work>
auto unlocked(Work work) {
  const py::gil_scoped_release release;
  return work();
}

Pixels resample(const Pixels& array, int64_t height, int64_t width, const std::string& filter,
                const std::optional<Corners>& corners) {
  const kernels::ImageView view = view_of(array, "resample");
  NTKCL_CHECK(height > 0 && width > 0, "resample", "expected a size of at least 1x1, got ", height,
              "x", width);
  NTKCL_CHECK(filter == "bilinear" || filter == "bicubic", "resample",
              "'filter': expected one of: bilinear, bicubic, got '", filter, "'");
  kernels::Box box{0, 0, static_cast<float>(view.width), static_cast<float>(view.height)};
  if (corners) {
    box = {(*corners)[0], (*corners)[1], (*corners)[2], (*corners)[3]};
    NTKCL_CHECK(box.left >= 0 && box.top >= 0 && box.left < box.right && box.top < box.bottom &&
                    box.right <= static_cast<float>(view.width) &&
                    box.bottom <= static_cast<float>(view.height),
                "resample", "'box': expected 0 <= left < right <= ", view.width,
                " and 0 <= top < bottom <= ", view.height, ", got (", box.left, ", ", box.top, ", ",
                box.right, ", ", box.bottom, ")");
  }
  Pixels output({height, width, int64_t{3}});
  uint8_t* target = output.mutable_data();
  unlocked([&] {
    kernels::resample(view, box,
                      filter == "bilinear" ? kernels::Filter::kBilinear : kernels::Filter::kBicubic,
                      height, width, {0, 0, height, width}, target);
  });
  return output;
}

Pixels decode_image(const py::bytes& encoded, const std::string& name) {
  const auto text = static_cast<std::string_view>(encoded);
  const std::span bytes(reinterpret_cast<const uint8_t*>(text.data()), text.size());
  return array_of(unlocked([&] { return data::decode_image(bytes, name); }));
}

void start(Loader& loader, const std::string& view, std::vector<int64_t> indices,
           int64_t batch_size, uint64_t key) {
  NTKCL_CHECK(view == "augmented" || view == "test", "Loader",
              "'view': expected one of: augmented, test, got '", view, "'");
  unlocked([&] {
    loader.start(view == "test" ? data::View::kTest : data::View::kAugmented, std::move(indices),
                 batch_size, key);
  });
}

std::optional<std::pair<at::Tensor, at::Tensor>> next(Loader& loader) {
  data::LoadedBatch batch;
  if (!unlocked([&] { return loader.next(batch); })) {
    return std::nullopt;
  }
  return unlocked([&] { return std::pair{batch.images_on(at::kCPU), batch.indices}; });
}

void init_stores(py::module_& m) {
  py::class_<ImageStore, std::shared_ptr<ImageStore>>(
      m, "ImageStore", "A fixed list of labelled images; make one with make_*_store.")
      .def("__len__", &ImageStore::size)
      .def_property_readonly("labels", &ImageStore::labels, "The class index of each image.")
      .def("name", &ImageStore::name, "index"_a, "What messages call the image.")
      .def(
          "load",
          [](const ImageStore& store, int64_t index) {
            return array_of(unlocked([&] { return store.load(index); }));
          },
          "index"_a, "The decoded pixels, uint8 (height, width, 3).");
  py::class_<data::ZipEntry>(m, "ZipEntry", "An entry of a zip archive's central directory.")
      .def(py::init([](std::string name, int64_t offset, int64_t compressed_size, int64_t size,
                       int64_t method, uint32_t crc32) {
             return data::ZipEntry{std::move(name), offset, compressed_size, size, method, crc32};
           }),
           "name"_a, "offset"_a, "compressed_size"_a, "size"_a, "method"_a, "crc32"_a);
  m.def("make_file_store", &data::make_file_store, "paths"_a, "labels"_a,
        "One encoded image file per path.");
  m.def("make_zip_store", &data::make_zip_store, "zip_path"_a, "entries"_a, "labels"_a,
        "Images inside a zip archive; entries are read when asked for.");
  m.def("make_array_store", &data::make_array_store, "images"_a, "labels"_a,
        "Images in memory, uint8 (n, height, width, 3).");
}

void init_transform(py::module_& m) {
  py::class_<Transform>(m, "Transform", "Random training views and fixed test views of images.")
      .def(py::init([](std::string kind, int64_t image_size) {
             return Transform({std::move(kind), image_size});
           }),
           "kind"_a, "image_size"_a)
      .def(
          "train",
          [](const Transform& transform, const Pixels& array, uint64_t key) {
            const Image image = image_of(array);
            return array_of(unlocked([&] { return transform.train(image, key); }));
          },
          "array"_a, "key"_a, "The random view of `array` that `key` gives.")
      .def(
          "test",
          [](const Transform& transform, const Pixels& array) {
            const Image image = image_of(array);
            return array_of(unlocked([&] { return transform.test(image); }));
          },
          "array"_a, "The view of `array` for evaluation.");
}

void init_loader(py::module_& m) {
  py::class_<Loader>(m, "Loader", "Decodes and transforms batches ahead of their use.")
      .def(py::init([](std::shared_ptr<ImageStore> store, const Transform& transform,
                       int64_t threads, int64_t prefetch, std::string on_corrupt,
                       std::string augment_on) {
             data::LoaderOptions options;
             options.threads = threads;
             options.prefetch = prefetch;
             options.on_corrupt = std::move(on_corrupt);
             options.augment_on = std::move(augment_on);
             return std::make_unique<Loader>(std::move(store), transform, std::move(options));
           }),
           "store"_a, "transform"_a, "threads"_a = 2, "prefetch"_a = 4, "on_corrupt"_a = "stop",
           "augment_on"_a = "threads")
      .def("start", &start, "view"_a, "indices"_a, "batch_size"_a, "key"_a,
           "Begins a pass; view is 'augmented' or 'test'.")
      .def("next", &next,
           "The next (images uint8 (b, 3, S, S), indices int64 (b)), or None at the end.")
      .def_property_readonly("skipped", &Loader::skipped, "How many corrupt images were skipped.")
      .def_property_readonly("skipped_names", &Loader::skipped_names);
}

}  // namespace

void init_data(py::module_& m) {
  init_stores(m);
  init_transform(m);
  init_loader(m);
  m.def("resample", &resample, "array"_a, "height"_a, "width"_a, "filter"_a, "box"_a = py::none(),
        "Resizes uint8 pixels (height, width, 3), or the box (left, top, right, bottom) of them,\n"
        "equal to Pillow's Image.resize bit for bit. filter: 'bilinear' or 'bicubic'.");
  m.def("decode_image", &decode_image, "encoded"_a, "name"_a,
        "Decodes a JPEG, PNG, BMP or WebP to uint8 (height, width, 3), as Pillow's\n"
        "convert('RGB'). ValueError naming `name` when corrupt or truncated.");
}

}  // namespace ntkcl::bindings
