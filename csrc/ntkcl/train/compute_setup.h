#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "ntkcl/nn/vision_transformer.h"
#include "ntkcl/train/activation_memory.h"
#include "ntkcl/train/options.h"

namespace ntkcl::train {

// Where and in what the arithmetic runs. ValueError for a device that is not there.
at::Device resolve_device(const std::string& name);
at::ScalarType resolve_precision(const std::string& name);
// The type of the frozen backbone's products where it is not that of all else.
std::optional<at::ScalarType> resolve_products(const std::string& name);

// The backbone as a run computes with it.
nn::VisionTransformer prepare_backbone(const nn::VisionTransformer& backbone,
                                       const TrainOptions& options);

// Whether at::linear in float32 with torch's matmul precision "medium" still computes in float32 on
// this processor: with AMX it means bf16, elsewhere it only chooses the faster GEMM library.
// Decided by comparing one product with float64.
bool medium_matmul_is_float32();

// Sets thread count, determinism, matmul library and CPU memory for a run, and restores them at its
// end. Torch's filling of new tensors, meant to show reads of memory never written, is off: it
// costs 5 % of a step.
class ComputeScope {
 public:
  ComputeScope(const TrainOptions& options, at::Device device);
  ~ComputeScope();
  ComputeScope(const ComputeScope&) = delete;
  ComputeScope& operator=(const ComputeScope&) = delete;

 private:
  int threads_;
  bool deterministic_, deterministic_warn_only_, fill_uninitialized_;
  std::string matmul_precision_;
  std::optional<ActivationMemory> memory_;
};

}  // namespace ntkcl::train
