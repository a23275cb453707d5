#pragma once

#include <cstdint>
#include <string>

#include "ntkcl/core/options.h"
#include "ntkcl/data/image.h"

namespace ntkcl::data {

struct TransformOptions {
  std::string kind = "inception";
  int64_t image_size = 224;

  template <class Visitor>
  void visit(Visitor& v) {
    v("transform", kind, one_of({"inception", "cifar", "cars", "resize"}),
      "how images are cropped and resized");
    v("image_size", image_size, at_least(1).at_most(4096), "side of the network's input in pixels");
  }
};

// A view of an image: a rectangle of it is resized, a square of that kept, mirrored, made brighter.
struct ViewPlan {
  kernels::Window crop;           // of the image
  int64_t height = 0, width = 0;  // to which it is resized
  int64_t top = 0, left = 0;      // where the square begins
  kernels::Filter filter = kernels::Filter::kBicubic;
  bool mirrored = false;
  float brightness = 1;
};

// Crops and resizes to S x S, S = image_size, on 8-bit pixels as torchvision does on PIL images
// (NTK-CL section 6, LoRAC-IPC section 10, RAA section 6).
//
// kind       train                                                     test
// inception  random resized crop, scale (0.05, 1), bilinear; flip      short side, centre crop
// cifar      random resized crop, scale (0.08, 1), bicubic; flip;      short side, centre crop
//            brightness factor uniform in 1 +- 63/255
// cars       round(S 300/224) square, bicubic; random crop S; flip     short side, centre crop
// resize     whole image to S x S, bicubic                             the same
//
// Ratio of the crops (3/4, 4/3) uniform in its logarithm, probability of a flip 0.5; short side:
// resized to round(S 256/224), bicubic. Note: draws come from PhiloxStream(key) in this order:
// per try of a crop uniform() for the area, uniform() for the log ratio, and once it fits
// below(rows + 1), below(columns + 1) for its corner; uniform() < 0.5 flips; uniform() for the
// brightness.
class Transform {
 public:
  explicit Transform(TransformOptions options);

  int64_t image_size() const { return options_.image_size; }
  // Random views; the same key gives the same view.
  Image train(const Image& image, uint64_t key) const;
  Image test(const Image& image) const;
  // The same in two parts: what is done to an image of this size, and doing it.
  ViewPlan plan_train(int64_t height, int64_t width, uint64_t key) const;
  ViewPlan plan_test(int64_t height, int64_t width) const;
  Image make_view(const Image& image, const ViewPlan& plan) const;

 private:
  TransformOptions options_;
};

}  // namespace ntkcl::data
