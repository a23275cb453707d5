#pragma once

#include "ntkcl/kernels/residual_layer_norm.h"

// For NTKCL_FOR_LAYER_NORM_TYPES; rows [first, last). The caller splits the work over threads; the
// result does not depend on how.
namespace ntkcl::kernels {

template <class S, class U, class O>
void residual_layer_norm_cpu(const ResidualLayerNorm<S, U, O>& args, int64_t first, int64_t last);

template <class S, class U, class O>
void residual_layer_norm_backward_cpu(const ResidualLayerNormBackward<S, U, O>& args, int64_t first,
                                      int64_t last);

}  // namespace ntkcl::kernels
