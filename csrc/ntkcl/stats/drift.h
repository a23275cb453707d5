#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

// How far the prototypes of old classes moved while a new task was learned, estimated from the new
// task's images alone: the average movement of those near the prototype.
//
//   before, after  (n, D)  features of the same images before and after training
//   prototypes     (k, D)  of the old classes, as they were before training
//   returns        (k, D)  what to add to the prototypes, in their type
//
// Arithmetic is float64; the features may be of any floating type. ValueError for shapes that do
// not fit or no image at all.
namespace ntkcl::stats {

// NTK-CL specification 8 item 8, for each section of C = section_width numbers on its own, with
// b, p, a the sections of before, prototype and after, and b^ = b / |b|:
//   shift_k = sum_i w_ki (a_i - b_i),   w_ki = softmax_i(-|b^_i - p^_k|^2 / (2 tau^2))
at::Tensor section_drift(const at::Tensor& before, const at::Tensor& after,
                         const at::Tensor& prototypes, int64_t section_width, double tau);

// RAA 5.2, on raw features:
//   shift_k = sum_i w_ki (a_i - b_i) / sum_i w_ki,   w_ki = exp(-|b_i - p_k|^2 / (2 sigma^2)) +
//   floor
at::Tensor gaussian_drift(const at::Tensor& before, const at::Tensor& after,
                          const at::Tensor& prototypes, double sigma, double floor = 1e-5);

}  // namespace ntkcl::stats
