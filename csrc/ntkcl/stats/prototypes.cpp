#include "ntkcl/stats/prototypes.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <string>

#include "ntkcl/core/error.h"

namespace ntkcl::stats {
namespace {

constexpr const char* kWhere = "prototypes";

}  // namespace

ClassMeans::ClassMeans(int64_t first_class, int64_t classes, int64_t width)
    : first_class_(first_class) {
  NTKCL_CHECK(first_class >= 0 && classes >= 1 && width >= 1, kWhere,
              "expected a first class >= 0, at least one class and a width >= 1, got ", first_class,
              ", ", classes, " and ", width);
  sums_ = at::zeros({classes, width}, at::kDouble);
  counts_ = at::zeros({classes}, at::kLong);
}

void ClassMeans::add(const at::Tensor& features, const at::Tensor& labels) {
  NTKCL_CHECK(
      features.dim() == 2 && features.size(1) == sums_.size(1) && features.is_floating_point(),
      kWhere, "expected floating point features (b, ", sums_.size(1), "), got ",
      features.toString(), features.sizes());
  NTKCL_CHECK(
      labels.dim() == 1 && labels.size(0) == features.size(0) && labels.scalar_type() == at::kLong,
      kWhere, "expected int64 labels (", features.size(0), "), got ", labels.toString(),
      labels.sizes());
  if (labels.numel() == 0) {
    return;
  }
  const c10::NoGradGuard no_grad;
  const int64_t classes = sums_.size(0);
  const at::Tensor rows = labels.cpu() - first_class_;
  const auto [low, high] = at::aminmax(rows);
  NTKCL_CHECK(low.item<int64_t>() >= 0 && high.item<int64_t>() < classes, kWhere,
              "expected labels in ", first_class_, " .. ", first_class_ + classes - 1, ", got ",
              low.item<int64_t>() + first_class_, " .. ", high.item<int64_t>() + first_class_);
  counts_ += at::bincount(rows, {}, classes);
  sums_ = sums_.to(features.device());
  // A product with the one-hot labels: unlike atomic additions, always in the same order.
  const at::Tensor one_hot =
      at::arange(classes, rows.options()).unsqueeze(1).eq(rows).to(at::kDouble);
  sums_.addmm_(one_hot.to(features.device()), features.to(at::kDouble));
}

at::Tensor ClassMeans::counts() const {
  return counts_.clone();
}

at::Tensor ClassMeans::result(at::ScalarType dtype) const {
  const at::Tensor empty = counts_.eq(0).nonzero().flatten();
  std::string names;
  for (int64_t i = 0; i < empty.numel(); ++i) {
    names += (i ? ", " : "") + std::to_string(first_class_ + empty[i].item<int64_t>());
  }
  NTKCL_CHECK(names.empty(), kWhere, "expected an image of every class, got none of class ", names);
  if (!sums_.isfinite().all().item<bool>()) {
    NTKCL_FAIL(NumericalError, kWhere, "expected finite features, got NaN or infinity");
  }
  return sums_.div(counts_.to(sums_.device()).unsqueeze(1)).to(dtype);
}

}  // namespace ntkcl::stats
