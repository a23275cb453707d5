#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#ifdef __CUDACC__
#define NTKCL_HOST_DEVICE __host__ __device__
#else
#define NTKCL_HOST_DEVICE
#endif

// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as
// 1, 2, 3", SC 2011). A number is a function of (key, counter) alone, so draws do not depend on
// the number of threads or ranks, on the device, or on what was drawn before.
namespace ntkcl {

struct Philox4 {
  uint32_t v[4];
};

// The 128 random bits at `counter` of the stream `key`.
NTKCL_HOST_DEVICE constexpr Philox4 philox(uint64_t key, uint64_t counter_low,
                                           uint64_t counter_high = 0) {
  Philox4 c{{static_cast<uint32_t>(counter_low), static_cast<uint32_t>(counter_low >> 32),
             static_cast<uint32_t>(counter_high), static_cast<uint32_t>(counter_high >> 32)}};
  uint32_t k0 = static_cast<uint32_t>(key);
  uint32_t k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c.v[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c.v[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.v[1] ^ k0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.v[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Uniform in [0, 1) with 24 bits: exact in float, the same on every device.
NTKCL_HOST_DEVICE constexpr float uniform24(uint32_t bits) {
  return static_cast<float>(bits >> 8) * (1.0f / 16777216.0f);
}

// Uniform in [0, 1) with 53 bits.
NTKCL_HOST_DEVICE constexpr double uniform53(uint32_t high, uint32_t low) {
  return static_cast<double>(((uint64_t{high} << 32) | low) >> 11) * (1.0 / 9007199254740992.0);
}

// A new key from a key and up to two 64-bit labels: a tree of independent streams
// (seed -> purpose -> task -> epoch -> step -> layer).
NTKCL_HOST_DEVICE constexpr uint64_t philox_subkey(uint64_t key, uint64_t label,
                                                   uint64_t second = 0) {
  const Philox4 bits = philox(key, label, second ^ 0x6E746B636C6B6579ull);
  return (uint64_t{bits.v[0]} << 32) | bits.v[1];
}

// FNV-1a, to make a label of a purpose's name.
constexpr uint64_t purpose_label(std::string_view purpose) {
  uint64_t hash = 14695981039346656037ull;
  for (const char c : purpose) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211ull;
  }
  return hash;
}

// A sequence of draws from one stream, for host code.
class PhiloxStream {
 public:
  explicit PhiloxStream(uint64_t key) : key_(key) {}

  uint32_t bits() {
    if (used_ == 4) {
      block_ = philox(key_, counter_++);
      used_ = 0;
    }
    return block_.v[used_++];
  }
  double uniform() {
    const uint32_t high = bits();
    return uniform53(high, bits());
  }
  // Uniform in 0 .. n-1 without bias (rejection); n > 0.
  uint64_t below(uint64_t n) {
    const uint64_t limit = n * (UINT64_MAX / n);
    for (;;) {
      const uint64_t high = bits();
      const uint64_t draw = (high << 32) | bits();
      if (draw < limit) {
        return draw % n;
      }
    }
  }

 private:
  uint64_t key_;
  uint64_t counter_ = 0;
  Philox4 block_{};
  int used_ = 4;
};

}  // namespace ntkcl
