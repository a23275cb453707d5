#pragma once

#include <cstdint>

namespace ntkcl::kernels {

constexpr int64_t kKeepBlock = 256;  // elements drawn at a time

// keep[j] = 1 where element block * kKeepBlock + j is kept (kernels/keep.h), else 0. Always writes
// kKeepBlock bytes. About 0.4 ns an element without AVX-512, 0.1 to 0.2 ns with it.
void philox_keep_block(uint64_t key, uint32_t threshold, int64_t block, uint8_t* keep);

}  // namespace ntkcl::kernels
