#pragma once

#include <functional>

#include "ntkcl/nn/vision_transformer.h"
#include "ntkcl/ops/parallel_adapter.h"

namespace ntkcl::nn {

// Told a tensor by name. It may copy into a view; ValueError if it puts another shape in its place.
using NamedTensorFn = std::function<void(const std::string& name, at::Tensor& tensor)>;

// Dropout of one layer's hidden units: a mask (1 = keep), or a key of the counter generator, or
// neither for none. Kept values are divided by 1 - p.
struct Dropout {
  double p = 0.0;
  at::Tensor mask{};  // uint8, the shape of what is dropped
  at::Tensor key{};   // int64 scalar, for the units of all images together
  // Where the images are but some of those: which is their first, and how many there are; 0: all.
  int64_t first = 0, rows = 0;
};

// Tells `fn` block `block` of a stacked tensor, as a view.
void visit_block(const std::string& name, const at::Tensor& stacked, int64_t block,
                 const NamedTensorFn& fn);

// One adapter per block, parallel to the MLP (NTK-CL section 2, "channel"; RAA section 2.1):
//
//   y = h + MLP(LN2(h)) + s * ( W_up drop(relu(W_down h + b_down)) + b_up )
//
// The adapters of all L blocks lie in one tensor a kind, so that an optimiser sees four tensors.
struct AdapterList {
  at::Tensor down_weight;  // (L, r, C)
  at::Tensor down_bias;    // (L, r)
  at::Tensor up_weight;    // (L, C, r)
  at::Tensor up_bias;      // (L, C)

  static AdapterList zeros(int64_t blocks, int64_t rank, int64_t width,
                           const at::TensorOptions& options);

  int64_t rank() const { return down_weight.size(1); }
  std::vector<at::Tensor> tensors() const;
  // The weight matrices, which a regulariser pulls.
  std::vector<at::Tensor> weights() const;
  // Each block's tensors, as views that `fn` may copy into, under `prefix` + "{block}.down.weight"
  // and so on.
  void visit(const std::string& prefix, const NamedTensorFn& fn);
};

// An adapter, or several, of ops/parallel_adapter.h: hidden (..., T, C) with the images along
// `image_dim`, tokens along the next. A mask may have more tokens than `hidden`, whose first those
// are: the last block computes the class token alone.
at::Tensor adapter(const at::Tensor& hidden, const ops::AdapterWeights& weights,
                   const Dropout& dropout, int64_t image_dim = 0);

// One pass with adapters: class features (B, C). `dropout` holds one entry per block, or none.
at::Tensor channel_pass(const VisionTransformer& vit, const Prefix& prefix,
                        const AdapterList& adapters, double scale,
                        const std::vector<Dropout>& dropout = {}, Trace* trace = nullptr);

}  // namespace ntkcl::nn
