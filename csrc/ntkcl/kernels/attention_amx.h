#pragma once

#include <cstddef>

#include "ntkcl/kernels/attention.h"

// attention_cpu of bfloat16 by tiles (Intel AMX).
namespace ntkcl::kernels {

// Whether it is done so: the processor multiplies tiles of bfloat16 pairs, the system lets this
// process use them (it is asked once), a head's width is a multiple of 32, and its tokens are at
// most 1024, as scratch memory grows as their square.
bool attention_has_tiles(const AttentionSizes& sizes);

// As in attention_cpu.h; only where attention_has_tiles().
int64_t attention_amx_scratch(const AttentionSizes& sizes);
int64_t attention_backward_amx_scratch(const AttentionSizes& sizes);
void attention_amx(const Attention<BFloat16>& args, int64_t first, int64_t last,
                   std::byte* scratch);
void attention_backward_amx(const AttentionBackward<BFloat16>& args, int64_t first, int64_t last,
                            std::byte* scratch);

}  // namespace ntkcl::kernels
