#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <vector>

namespace ntkcl::stats {

// A class as one Gaussian over features (RAA, section 5.1 of the specification): the mean and the
// unbiased covariance plus eps I, both computed in float64. Kept is the covariance's Cholesky
// factor, the lower triangle alone: C (C + 1) / 2 numbers a class.
class ClassGaussians {
 public:
  ClassGaussians(int64_t width, const at::TensorOptions& options);

  // A class of rows (n, C), n >= 1; one row has the covariance eps I. NumericalError where it is
  // not positive definite (eps 0 and fewer rows than numbers in a row) or not finite.
  void add_class(const at::Tensor& rows, double eps);
  // Forgets the classes from `count` on.
  void keep(int64_t count);
  // Adds to the means of the first classes, (k, C).
  void move(const at::Tensor& shift);

  int64_t classes() const { return means_.size(0); }
  const at::Tensor& means() const { return means_; }  // (n, C)
  at::Tensor factor(int64_t number) const;            // (C, C), lower, of a class
  // scale mean + L xi for each row xi of normals (m, C).
  at::Tensor draw(int64_t number, double scale, const at::Tensor& normals) const;

  // Tells "means" (n, C) and "factors" (n, C (C + 1) / 2), which may be replaced.
  using StateFn = std::function<void(const std::string& name, at::Tensor& tensor)>;
  void visit_state(const std::string& prefix, const StateFn& visitor);

 private:
  at::Tensor means_;                 // (n, C)
  std::vector<at::Tensor> factors_;  // of each class, (C (C + 1) / 2)
  at::Tensor places_;                // where the factor's numbers stand in the flat (C, C)
};

}  // namespace ntkcl::stats
