#pragma once

#include <array>
#include <functional>

#include "ntkcl/nn/vision_transformer.h"

namespace ntkcl::nn {

// Matrices that LoRA may adapt, in the order that every list of them has. Those of attention are
// C x C; written (in, out), the transpose of a stored linear weight.
inline constexpr std::array<const char*, 6> kMatrixTypes{"q", "k", "v", "o", "f1", "f2"};

// The modules of matrices of one shape in the first L blocks: q, k, v and o together (g = 4), fc1
// or fc2 (g = 1). Tensors of many blocks are stacked, so that an optimiser sees few of them.
struct LoraGroup {
  enum class Kind { kAttention, kFc1, kFc2 };

  Kind kind = Kind::kAttention;
  const char* name = "";    // "attention", "fc1", "fc2"
  int64_t first_type = 0;   // place of its first in kMatrixTypes
  at::Tensor pretrained{};  // (L, g, out, in) W0
  at::Tensor bias{};        // (L, g * out), in the type of products
  at::Tensor down{}, up{};  // (L, g, in, r), (L, g, r, out): A_t, B_t of the current module
  at::Tensor old_down{};    // (L, g, in, t r): A_0 ... A_{t-1} side by side
  at::Tensor old_up{};      // (L, g, t r, out)
  at::Tensor omega{};       // (L, g, t): weights of the old modules

  int64_t types() const { return pretrained.size(1); }
  int64_t modules() const { return omega.size(2); }
};

// Low-rank modules in a frozen transformer, one for each task, all of them in one composed weight
// (LoRAC, arXiv 2504.13407, section 2): with s = 1 / r
//
//   W = W0 + s ( sum_{i<t} omega_i A_i B_i + A_t B_t )
//
// Note: tables of matrices are (types, L), type by type in the order of kMatrixTypes.
class ComposedLora {
 public:
  // In the first `blocks` blocks; with or without the two matrices of the MLP. ValueError for a
  // rank above the smaller side of a matrix, or more blocks than there are.
  ComposedLora(const VisionTransformer& vit, bool mlp, int64_t blocks, int64_t rank);

  int64_t rank() const { return rank_; }
  int64_t types() const;                                         // 4 or 6
  int64_t blocks() const;                                        // L
  int64_t modules() const { return groups_.front().modules(); }  // t
  std::vector<LoraGroup>& groups() { return groups_; }
  const std::vector<LoraGroup>& groups() const { return groups_; }

  // Begins a module: A as `init` draws it (in, r), beside the old ones of its matrix (in, t r);
  // B = 0; both require gradients as omega does.
  using InitFn = std::function<at::Tensor(int64_t type, int64_t block, const at::Tensor& old)>;
  void begin(const InitFn& init);
  // The current module joins the old ones with omega 1.
  void finish();

  // Which parts are trained, (types, L) of 0 or 1 on the CPU: a current module of 0 takes no part;
  // old ones of 0 keep the weights that they have, merged into W0 once.
  void train(const at::Tensor& current, const at::Tensor& old);

  // The products of every block, of weights composed in one batched product for each shape. They
  // build the graph of down, up and omega, and of probes[group][block] where given, (g) or (g, out,
  // in), whose gradient is the importance of each matrix or entry (ops::composed_linear).
  using Probes = std::vector<std::vector<at::Tensor>>;
  std::vector<BlockProducts> products(const Probes& probes = {}) const;

  // The matrices with the first modules alone, of weights omega[group] (L, g, modules).
  std::vector<BlockTensors> merged(const std::vector<at::Tensor>& omega) const;

 private:
  // What is constant while a module is trained, of one group.
  struct Constants {
    at::Tensor weight;              // (L, g, out, in): W0 and what is merged
    at::Tensor scale, omega_scale;  // (L, g): s or 0
    std::vector<std::vector<double>> scales, omega_scales;  // the same, for each block
  };
  at::Tensor compose(const LoraGroup& group, const Constants& constants) const;

  const VisionTransformer& vit_;
  int64_t rank_;
  std::vector<LoraGroup> groups_;
  std::vector<Constants> constants_;  // of each group
};

}  // namespace ntkcl::nn
