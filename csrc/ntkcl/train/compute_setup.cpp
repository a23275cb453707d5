#include "ntkcl/train/compute_setup.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include "ntkcl/core/error.h"

namespace ntkcl::train {
namespace {

std::string matmul_precision() {
  switch (at::globalContext().float32MatmulPrecision()) {
    case at::Float32MatmulPrecision::HIGHEST:
      return "highest";
    case at::Float32MatmulPrecision::HIGH:
      return "high";
    default:
      return "medium";
  }
}

}  // namespace

at::Device resolve_device(const std::string& name) {
  const bool there = at::hasCUDA() && at::detail::getCUDAHooks().deviceCount() > 0;
  if (name == "auto") {
    return there ? at::Device("cuda") : at::Device("cpu");
  }
  NTKCL_CHECK(name != "cuda" || there, "device", "expected a CUDA GPU, but torch sees none; ",
              "use device='cpu'");
  return at::Device(name);
}

at::ScalarType resolve_precision(const std::string& name) {
  return name == "float64" ? at::kDouble : at::kFloat;
}

std::optional<at::ScalarType> resolve_products(const std::string& name) {
  return name == "bfloat16" || name == "float8" ? std::optional(at::kBFloat16) : std::nullopt;
}

nn::VisionTransformer prepare_backbone(const nn::VisionTransformer& backbone,
                                       const TrainOptions& options) {
  const nn::VisionTransformer vit =
      backbone
          .to(resolve_precision(options.precision), resolve_device(options.device),
              resolve_products(options.precision))
          .recomputing(options.recompute);
  if (options.precision == "float8") {
    return vit.quantised();
  }
  return options.cpu_matmul == "auto" ? vit.packed() : vit;
}

bool medium_matmul_is_float32() {
  const at::NoGradGuard no_grad;
  // Entries of a fixed pattern with many significant bits.
  const at::Tensor a =
      at::arange(256 * 256, at::kDouble).mul(0.6180339887498949).frac().view({256, 256});
  const at::Tensor x = a.to(at::kFloat),
                   exact = at::matmul(x.to(at::kDouble), x.to(at::kDouble).t());
  const std::string before = matmul_precision();
  at::globalContext().setFloat32MatmulPrecision("medium");
  const at::Tensor y = at::linear(x, x);
  at::globalContext().setFloat32MatmulPrecision(before);
  const double error = ((y.to(at::kDouble) - exact).abs() / exact.abs()).max().item<double>();
  return error < 1e-5;  // float32: about 1e-6; bf16: about 1e-3
}

ComputeScope::ComputeScope(const TrainOptions& options, at::Device device)
    : threads_(at::get_num_threads()),
      deterministic_(at::globalContext().deterministicAlgorithms()),
      deterministic_warn_only_(at::globalContext().deterministicAlgorithmsWarnOnly()),
      fill_uninitialized_(at::globalContext().deterministicFillUninitializedMemory()),
      matmul_precision_(matmul_precision()) {
  if (options.threads > 0) {
    at::set_num_threads(static_cast<int>(options.threads));
  }
  at::globalContext().setDeterministicAlgorithms(options.deterministic, false);
  at::globalContext().setDeterministicFillUninitializedMemory(false);
  if (device.is_cpu()) {
    memory_.emplace();
    if (options.cpu_matmul == "auto") {
      at::globalContext().setFloat32MatmulPrecision(medium_matmul_is_float32() ? "medium"
                                                                               : "highest");
    }
  }
}

ComputeScope::~ComputeScope() {
  at::set_num_threads(threads_);
  at::globalContext().setDeterministicAlgorithms(deterministic_, deterministic_warn_only_);
  at::globalContext().setDeterministicFillUninitializedMemory(fill_uninitialized_);
  at::globalContext().setFloat32MatmulPrecision(matmul_precision_);
}

}  // namespace ntkcl::train
