#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "ntkcl/kernels/sam_step.h"

namespace ntkcl::ops {

// Sharpness-aware minimisation: SAM (Foret et al., ICLR 2021) and RAA's SAM+ (specification 4.1).
// A step asks for gradients twice, g at theta and g' up the slope:
//
//   sam_ascend_:  saved <- theta;  theta <- theta + rho g / (n + 1e-16), n one norm over all g
//   sam_step_:    v <- momentum v + g' + weight_decay saved;  theta <- saved - lr gamma v
//
// gamma is 1 (SAM, without tau) or clamp(tau (1 - exp(cos(v, g) - 1)), 0, 1) (SAM+; the cosine 0
// where v or g is): of every tensor, or by one cosine over all of them (together). The step up the
// slope, which for rho > 0 has g's angles, is kept nowhere, and theta comes back to the bit.
//
//   parameters        float32 or float64, contiguous, all of one type and device; changed
//   saved             beside parameters: as many, of their shapes, types and devices; contiguous;
//                     changed by sam_ascend_, and read by sam_step_
//   momenta           beside parameters, contiguous; changed
//   first_gradients   g, beside parameters; may be empty without tau
//   gradients         g', beside parameters
//   lr, weight_decay, stacked_dims
//                     a number for each parameter; the last: leading dimensions over which it is a
//                     stack of tensors, its rows, that SAM+ tells apart
//   -> gamma of every row of every parameter, (rows) of their type
// No two tensors that are changed may overlap. No gradients are recorded, and nothing is read back
// to the host. Errors: ValueError (shapes, devices, layouts, ranges), TypeError (element types);
// nothing is changed then.
//
// Note: RAA's text means to damp steps towards rising loss, but takes the cosine with +v where the
// step is -v, so what is damped is descent exactly against the ascent direction. As published.
void sam_ascend_(at::TensorList parameters, at::TensorList saved, at::TensorList gradients,
                 double rho);
at::Tensor sam_step_(at::TensorList parameters, at::TensorList momenta, at::TensorList saved,
                     at::TensorList first_gradients, at::TensorList gradients,
                     at::ArrayRef<double> lr, at::ArrayRef<double> weight_decay,
                     at::IntArrayRef stacked_dims, double momentum, std::optional<double> tau,
                     bool together);

// SAM+'s gamma of cosines: clamp(tau (1 - exp(cos - 1)), 0, 1).
at::Tensor sam_plus_gamma(const at::Tensor& cos, double tau);

namespace detail {

struct SamLists {
  at::TensorList parameters{}, momenta{}, saved{}, first_gradients{}, gradients{};
};
struct SamOptions {
  at::ArrayRef<double> lr, weight_decay;
  at::IntArrayRef stacked_dims;
  double momentum;
  std::optional<double> tau;
  bool together;
};

void check_sam_ascend(const SamLists& lists, double rho);
void check_sam_step(const SamLists& lists, const SamOptions& options);

// How many rows each parameter stacks.
std::vector<int64_t> rows_of(at::TensorList parameters, at::IntArrayRef stacked_dims);

// (rows) float64 of sums (rows, 3) float64: <v, g>, |v|^2 and |g|^2 of each row.
at::Tensor gammas_of(const at::Tensor& sums, double tau, bool together);

// The kernels' arguments, and the copies that some of them point to.
template <class T>
struct SamTensors {
  // Of sam_ascend_, which has no options, or of sam_step_.
  explicit SamTensors(const SamLists& lists, const SamOptions* options = nullptr);

  std::vector<at::Tensor> first_gradients, gradients;  // dense
  std::vector<kernels::SamTensor<T>> tensors;
};

}  // namespace detail
}  // namespace ntkcl::ops
