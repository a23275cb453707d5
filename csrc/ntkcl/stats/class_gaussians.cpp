#include "ntkcl/stats/class_gaussians.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <limits>

#include "ntkcl/core/error.h"

namespace ntkcl::stats {
namespace {

constexpr const char* kWhere = "class_gaussians";

}  // namespace

ClassGaussians::ClassGaussians(int64_t width, const at::TensorOptions& options)
    : means_(at::zeros({0, width}, options)) {
  const at::Tensor lower = at::tril_indices(width, width, 0, at::kLong).to(options.device());
  places_ = lower[0] * width + lower[1];
}

void ClassGaussians::add_class(const at::Tensor& rows, double eps) {
  const int64_t width = means_.size(1);
  NTKCL_CHECK(
      rows.dim() == 2 && rows.size(0) >= 1 && rows.size(1) == width && rows.is_floating_point(),
      kWhere, "expected floating point rows (n, ", width, ") of at least one image, got ",
      rows.toString(), rows.sizes());
  NTKCL_CHECK(eps >= 0, kWhere, "expected eps >= 0, got ", eps);
  const c10::NoGradGuard no_grad;
  const at::Tensor x = rows.to(at::kDouble);
  const at::Tensor mean = x.mean(0);
  const at::Tensor centred = x - mean;
  at::Tensor covariance = at::eye(width, x.options()) * eps;
  if (x.size(0) > 1) {
    covariance.addmm_(centred.t(), centred, 1, 1.0 / static_cast<double>(x.size(0) - 1));
  }
  if (!covariance.isfinite().all().item<bool>()) {
    NTKCL_FAIL(NumericalError, kWhere, "class ", classes(), " in the order of learning: expected ",
               "finite features, got NaN or infinity after training; a smaller learning rate may ",
               "help");
  }
  const auto [factor, info] = at::linalg_cholesky_ex(covariance);
  // A singular matrix may pass by rounding; NaN fails the comparison.
  const double rounding = std::numeric_limits<double>::epsilon() * static_cast<double>(width);
  const at::Tensor pivots = factor.diagonal().square();
  const bool regular = (pivots.min() > rounding * covariance.diagonal().max()).item<bool>();
  if (info.item<int64_t>() != 0 || !regular) {
    NTKCL_FAIL(NumericalError, kWhere, "class ", classes(), " in the order of learning: the ",
               "covariance of its ", x.size(0), " features of ", width,
               " numbers is not positive definite with ", eps,
               " on the diagonal; expected a larger covariance_eps");
  }
  means_ = at::cat({means_, mean.to(means_.scalar_type()).unsqueeze(0)});
  factors_.push_back(factor.flatten().index_select(0, places_).to(means_.scalar_type()));
}

void ClassGaussians::keep(int64_t count) {
  if (count < classes()) {
    means_ = means_.narrow(0, 0, count).clone();
    factors_.resize(static_cast<size_t>(count));
  }
}

void ClassGaussians::move(const at::Tensor& shift) {
  NTKCL_CHECK(shift.dim() == 2 && shift.size(0) <= classes() && shift.size(1) == means_.size(1),
              kWhere, "expected shifts of at most ", means_.sizes(), ", got ", shift.sizes());
  const c10::NoGradGuard no_grad;
  means_ = means_.clone();
  means_.narrow(0, 0, shift.size(0)).add_(shift);
}

at::Tensor ClassGaussians::factor(int64_t number) const {
  NTKCL_CHECK(0 <= number && number < classes(), kWhere, "expected a class from 0 to ",
              classes() - 1, ", got ", number);
  const int64_t width = means_.size(1);
  const at::Tensor dense = at::zeros({width * width}, means_.options());
  return dense.index_copy_(0, places_, factors_[static_cast<size_t>(number)]).view({width, width});
}

at::Tensor ClassGaussians::draw(int64_t number, double scale, const at::Tensor& normals) const {
  return at::addmm(means_[number], normals, factor(number).t(), scale);
}

void ClassGaussians::visit_state(const std::string& prefix, const StateFn& visitor) {
  const int64_t packed = places_.size(0);
  at::Tensor factors =
      factors_.empty() ? at::zeros({0, packed}, means_.options()) : at::stack(factors_);
  visitor(prefix + "means", means_);
  visitor(prefix + "factors", factors);
  NTKCL_CHECK(means_.dim() == 2 && factors.dim() == 2 && means_.size(0) == factors.size(0) &&
                  means_.size(1) * (means_.size(1) + 1) / 2 == packed && factors.size(1) == packed,
              "state", prefix, "*: expected means (n, C) and factors (n, ", packed, "), got ",
              means_.sizes(), " and ", factors.sizes());
  factors_ = factors.unbind();
}

}  // namespace ntkcl::stats
