#include "ntkcl/ops/philox_keep_mask.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "ntkcl/kernels/keep.h"
#include "ntkcl/kernels/philox_keep_mask_cpu.h"
#include "ntkcl/ops/checks.h"
#include "ntkcl/ops/element_type.h"
#include "ntkcl/ops/schema.h"

namespace ntkcl::ops {
namespace detail {

void check_philox_keep_mask(const at::Tensor& key, c10::SymIntArrayRef size, double p) {
  const char* op = "philox_keep_mask";
  check_key(op, key);
  for (const c10::SymInt& length : size) {
    NTKCL_OP_CHECK(length >= 0, op, "expected a size without negative lengths, got ", size);
  }
  check_dropout_probability(op, p);
}

}  // namespace detail

namespace {

at::Tensor philox_keep_mask_meta(const at::Tensor& key, c10::SymIntArrayRef size, double p) {
  detail::check_philox_keep_mask(key, size, p);
  return at::empty_symint(size, key.options().dtype(at::kByte));
}

at::Tensor philox_keep_mask_cpu(const at::Tensor& key, at::IntArrayRef size, double p) {
  detail::check_philox_keep_mask(key, c10::fromIntArrayRefSlow(size), p);
  at::Tensor mask = at::empty(size, key.options().dtype(at::kByte));
  const int64_t n = mask.numel();
  const uint64_t bits = static_cast<uint64_t>(*elements<int64_t>(key));
  const uint32_t threshold = kernels::keep_threshold(p);
  uint8_t* keep = mutable_elements<uint8_t>(mask);
  constexpr int64_t kBlock = kernels::kKeepBlock;
  at::parallel_for(0, (n + kBlock - 1) / kBlock, at::internal::GRAIN_SIZE / kBlock,
                   [&](int64_t first, int64_t last) {
                     for (int64_t block = first; block < last; ++block) {
                       if ((block + 1) * kBlock <= n) {
                         kernels::philox_keep_block(bits, threshold, block, keep + block * kBlock);
                       } else {
                         uint8_t drawn[kBlock];
                         kernels::philox_keep_block(bits, threshold, block, drawn);
                         std::copy_n(drawn, n - block * kBlock, keep + block * kBlock);
                       }
                     }
                   });
  return mask;
}

}  // namespace

at::Tensor philox_keep_mask(const at::Tensor& key, at::IntArrayRef size, double p) {
  static const auto op =
      find_operator<at::Tensor(const at::Tensor&, c10::SymIntArrayRef, double)>("philox_keep_mask");
  return op.call(key, c10::fromIntArrayRefSlow(size), p);
}

TORCH_LIBRARY_IMPL(ntkcl, Meta, m) {
  m.impl("philox_keep_mask", &philox_keep_mask_meta);
}

TORCH_LIBRARY_IMPL(ntkcl, CPU, m) {
  m.impl("philox_keep_mask", &philox_keep_mask_cpu);
}

}  // namespace ntkcl::ops
