#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

// Class prototypes: the mean feature of each class.
namespace ntkcl::stats {

// Means of consecutive classes, gathered batch by batch. Sums are float64 and do not depend on the
// order of work within a batch, so equal batches give equal bits on every run.
class ClassMeans {
 public:
  // Classes first_class .. first_class + classes - 1, features of `width` numbers.
  ClassMeans(int64_t first_class, int64_t classes, int64_t width);

  // features (b, width), any floating type, on one device throughout; labels (b), int64, of these
  // classes. ValueError for shapes or labels that do not fit.
  void add(const at::Tensor& features, const at::Tensor& labels);

  at::Tensor counts() const;  // (classes), int64, host: images of each class
  // (classes, width) in `dtype`, on the features' device; row i is class first_class + i.
  // ValueError naming the classes without an image, NumericalError if a feature was NaN or
  // infinite.
  at::Tensor result(at::ScalarType dtype) const;

 private:
  int64_t first_class_;
  at::Tensor sums_;    // (classes, width), float64
  at::Tensor counts_;  // (classes), int64, host
};

}  // namespace ntkcl::stats
