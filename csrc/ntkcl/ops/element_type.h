#pragma once

#include <ATen/core/Tensor.h>

#include "ntkcl/core/error.h"
#include "ntkcl/kernels/element.h"

// From tensors to the kernels' element types.
namespace ntkcl::ops {

// Calls function(T{}) with T = float, double or kernels::BFloat16.
template <class Function>
void with_element_type(at::ScalarType type, Function&& function) {
  switch (type) {
    case at::kFloat:
      return function(float{});
    case at::kDouble:
      return function(double{});
    default:
      NTKCL_ASSERT(type == at::kBFloat16);
      return function(kernels::BFloat16{});
  }
}

// The type of the arithmetic, kernels::Compute<T>, as a tensor's.
inline at::ScalarType compute_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// A contiguous tensor's elements.
template <class T>
const T* elements(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* mutable_elements(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace ntkcl::ops
