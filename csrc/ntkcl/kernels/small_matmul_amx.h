#pragma once

#include "ntkcl/kernels/small_matmul_cpu.h"

namespace ntkcl::kernels {

// Whether this processor multiplies tiles of bfloat16 pairs (Intel AMX) and the system lets this
// process use them, which is asked for once.
bool has_amx();

// small_matmul_cpu by such tiles. As in all products of pairs, numbers below float32's least normal
// one count as 0. An assertion fails where there are none.
void small_matmul_amx(const SmallMatmul<BFloat16Pair>& args);

}  // namespace ntkcl::kernels
