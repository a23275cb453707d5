#include "ntkcl/kernels/philox_keep_mask_cpu.h"

#include "ntkcl/kernels/keep.h"
#include "ntkcl/kernels/multiversion.h"

namespace ntkcl::kernels {

// The ten rounds of core/philox.h on all counters of a block side by side, so that the compiler
// makes vector code of the inner loops.
NTKCL_MULTIVERSION
void philox_keep_block(uint64_t key, uint32_t threshold, int64_t block,
                       uint8_t* __restrict__ keep) {
  constexpr int kCounters = kKeepBlock / 4;
  uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
  const uint64_t first = static_cast<uint64_t>(block) * kCounters;
  for (int i = 0; i < kCounters; ++i) {
    c0[i] = static_cast<uint32_t>(first + i);
    c1[i] = static_cast<uint32_t>((first + i) >> 32);
    c2[i] = 0;
    c3[i] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(key);
  uint32_t k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kCounters; ++i) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c0[i];
      const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2[i];
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(p1);
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kCounters; ++i) {
    keep[4 * i + 0] = is_kept(c0[i], threshold);
    keep[4 * i + 1] = is_kept(c1[i], threshold);
    keep[4 * i + 2] = is_kept(c2[i], threshold);
    keep[4 * i + 3] = is_kept(c3[i], threshold);
  }
}

}  // namespace ntkcl::kernels
