#pragma once

#include <ATen/ATen.h>

// Results of backward operators, which are asked for one by one.
namespace ntkcl::ops {

// What stands for a result that is not wanted: (0), of like's type.
inline at::Tensor unwanted(const at::Tensor& like) {
  return at::empty({0}, like.options());
}

// Room for a result of this shape and like's type, where it is wanted.
inline at::Tensor empty_if(bool wanted, c10::SymIntArrayRef sizes, const at::Tensor& like) {
  return wanted ? at::empty_symint(sizes, like.options()) : unwanted(like);
}

}  // namespace ntkcl::ops
