#pragma once

#include "ntkcl/kernels/bias_relu_dropout.h"
#include "ntkcl/kernels/element.h"
#include "ntkcl/kernels/philox_keep_mask_cpu.h"

// For T in float, double, BFloat16. The caller splits the work over threads; the result does not
// depend on how.
namespace ntkcl::kernels {

// Elements [first_block, last_block) * kKeepBlock of y, cut off at its end.
template <class T>
void bias_relu_dropout_cpu(const BiasReluDropout<T>& args, int64_t first_block, int64_t last_block);

// The rows of each group are summed in so many chunks: a function of the sizes alone.
int64_t bias_relu_dropout_chunks_cpu(int64_t group_rows, int64_t width);

// dx of one of the groups * chunks chunks of rows; partial (width) is set to dx's column sums.
template <class T>
void bias_relu_dropout_backward_cpu(const BiasReluDropoutBackward<T>& args, int64_t chunk,
                                    double* partial);

// dbias from the partials (groups, chunks, width).
template <class T>
void bias_relu_dropout_dbias_cpu(const BiasReluDropoutBackward<T>& args, const double* partials,
                                 int64_t chunks);

}  // namespace ntkcl::kernels
