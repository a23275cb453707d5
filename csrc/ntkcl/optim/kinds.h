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

// "sam": SGD with momentum on gradients a step up the slope. "sam+": steps are damped by
// alignment, tensor by tensor or by one cosine (gamma = "global"). See ops/sam_step.h.
std::unique_ptr<Optimizer> make_sam(const OptimizerOptions& options,
                                    std::vector<ParameterGroup> groups);

}  // namespace ntkcl::optim
