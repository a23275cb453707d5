#pragma once

#include "ntkcl/kernels/small_matmul_cpu.h"

namespace ntkcl::kernels {

// Whether this processor multiplies tiles of bfloat16 pairs (Intel AMX) and the system lets this
// process use them, which is asked for once.
bool has_amx();

// small_matmul_cpu by such tiles. Numbers below float32's least normal one count as 0 in it.
void small_matmul_amx(const SmallMatmul<BFloat16Pair>& args);

}  // namespace ntkcl::kernels
