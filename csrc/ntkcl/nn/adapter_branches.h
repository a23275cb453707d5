#pragma once

#include <string>
#include <vector>

#include "ntkcl/nn/adapter.h"

// Several adapters side by side in every block, and passes in which each has a stream of its own
// (RAA: Deng et al., AAAI-26, section 2 of the specification).
namespace ntkcl::nn {

// n branches of adapters; a kind's tensors of all branches and blocks lie in one.
struct BranchList {
  at::Tensor down_weight;  // (n, L, r, C)  W
  at::Tensor down_bias;    // (n, L, r)     p
  at::Tensor up_weight;    // (n, L, C, r)  U
  at::Tensor up_bias;      // (n, L, C)     c

  static BranchList zeros(int64_t branches, int64_t blocks, int64_t rank, int64_t width,
                          const at::TensorOptions& options);

  int64_t branches() const { return down_weight.size(0); }
  std::vector<at::Tensor> tensors() const;
  AdapterList branch(int64_t i) const;                      // a view
  BranchList range(int64_t first, int64_t branches) const;  // a view
  BranchList detached() const;
  BranchList joined(const BranchList& others) const;
  // Mean of all; and in every block l the sum over i of alpha[l, i] times branch i's tensors, alpha
  // (L, n) (Eq. 5).
  AdapterList mean() const;
  BranchList mixed(const at::Tensor& alpha) const;  // one branch
  void visit(const std::string& prefix, const NamedTensorFn& fn);
};

// The streams of a pass: the same images, stream s with adapters of its own. `shares`, where
// defined, makes one more stream, which adds a mixture of what the others add (RAA 2.3, mode code):
//
//   sum_s shares[l, s] A_s(h_s) + others[l]
struct Streams {
  BranchList adapters;               // (s, L, ...)
  at::Tensor shares{};               // (L, s)
  std::vector<at::Tensor> others{};  // (b, T, C) of each block as it adds it, or none

  int64_t count() const { return adapters.branches() + (shares.defined() ? 1 : 0); }
};

// What the adapters of block `block` add, without their scale: hidden (streams, b, T, C), of which
// those of the mixture are not read -> (streams, b, T, C). Dropout over (s, b, T, r).
at::Tensor stream_adapters(const at::Tensor& hidden, const Streams& streams, int64_t block,
                           const Dropout& dropout);

// y = h + MLP(LN2(h)) + scale A(h), h = x + Attn(LN1(x)): x (streams, b, T, C) -> y of that shape,
// or of the class token alone in the last block. `added` receives the adapters' part.
at::Tensor stream_block(const VisionTransformer& vit, const at::Tensor& x, const Streams& streams,
                        int64_t block, double scale, const Dropout& dropout,
                        at::Tensor* added = nullptr);

// Class features (streams, b, C). `dropout` holds one entry per block, or none; `added` receives
// what the adapters of each block add, (streams, b, T, C), in the last of the class token alone.
at::Tensor stream_pass(const VisionTransformer& vit, const Prefix& prefix, const Streams& streams,
                       double scale, const std::vector<Dropout>& dropout = {},
                       std::vector<at::Tensor>* added = nullptr);

}  // namespace ntkcl::nn
