#pragma once

#include <cstddef>

#include "ntkcl/kernels/attention.h"

// attention_cpu of bfloat16 by tiles (Intel AMX), for heads whose width is a multiple of 32.
namespace ntkcl::kernels {

// Whether this processor multiplies tiles of bfloat16 pairs and the system lets this process use
// them, which is asked for once.
bool has_amx();

// Whether heads of this width are multiplied by tiles on this machine.
bool attention_has_tiles(const AttentionSizes& sizes);

// As in attention_cpu.h; only where attention_has_tiles().
int64_t attention_amx_scratch(const AttentionSizes& sizes);
int64_t attention_backward_amx_scratch(const AttentionSizes& sizes);
void attention_amx(const Attention<BFloat16>& args, int64_t first, int64_t last,
                   std::byte* scratch);
void attention_backward_amx(const AttentionBackward<BFloat16>& args, int64_t first, int64_t last,
                            std::byte* scratch);

}  // namespace ntkcl::kernels
