#pragma once

#include <memory>
#include <vector>

#include "ntkcl/optim/optimizer.h"

// One maker per kind of optimiser, for make_optimizer.
namespace ntkcl::optim {

// v <- momentum v + (g + decay theta); theta <- theta - lr v; no v without momentum.
std::unique_ptr<Optimizer> make_sgd(const OptimizerOptions& options,
                                    std::vector<ParameterGroup> groups);

// Adam (Kingma and Ba, 2015), decay added to the gradient; "adamw": AdamW (Loshchilov and Hutter,
// 2019), theta <- (1 - lr decay) theta first.
std::unique_ptr<Optimizer> make_adam(const OptimizerOptions& options,
                                     std::vector<ParameterGroup> groups);

// "sam": gradients at theta + e, e the step of length rho up the gradient; then as SGD with
// momentum. "sam+" (RAA specification 4.1): the step of tensor j is scaled by gamma_j of
// cos(v_j, e_j), or all by the gamma of one cosine over all tensors (gamma = "global").
std::unique_ptr<Optimizer> make_sam(const OptimizerOptions& options,
                                    std::vector<ParameterGroup> groups);

// SAM+'s factor on a step: clamp(tau (1 - exp(cos - 1)), 0, 1).
// Note: RAA's text means to damp steps towards rising loss, but takes the cosine with +v where the
// step is -v, so what is damped is descent exactly against the ascent direction. As published.
at::Tensor sam_plus_gamma(const at::Tensor& cos, double tau);

}  // namespace ntkcl::optim
