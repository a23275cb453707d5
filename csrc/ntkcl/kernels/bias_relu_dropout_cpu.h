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

// How many rows are summed into one partial bias gradient: a function of the width alone.
int64_t bias_relu_dropout_chunk_rows(int64_t width);

// dx of one chunk of rows; partial (width) is set to dx's column sums.
template <class T>
void bias_relu_dropout_backward_cpu(const BiasReluDropoutBackward<T>& args, int64_t chunk,
                                    double* partial);

// dbias from the partials (chunks, width).
template <class T>
void bias_relu_dropout_dbias_cpu(const BiasReluDropoutBackward<T>& args, const double* partials,
                                 int64_t chunks);

}  // namespace ntkcl::kernels
