#include "ntkcl/nn/adapter_branches.h"

#include <ATen/ATen.h>

#include "ntkcl/core/error.h"

namespace ntkcl::nn {
namespace {

// A list of each kind's tensors after `fn`.
template <class List, class Fn>
List map(const BranchList& b, Fn fn) {
  return {fn(b.down_weight), fn(b.down_bias), fn(b.up_weight), fn(b.up_bias)};
}

}  // namespace

BranchList BranchList::zeros(int64_t branches, int64_t blocks, int64_t rank, int64_t width,
                             const at::TensorOptions& options) {
  return {at::zeros({branches, blocks, rank, width}, options),
          at::zeros({branches, blocks, rank}, options),
          at::zeros({branches, blocks, width, rank}, options),
          at::zeros({branches, blocks, width}, options)};
}

std::vector<at::Tensor> BranchList::tensors() const {
  return {down_weight, down_bias, up_weight, up_bias};
}

AdapterList BranchList::branch(int64_t i) const {
  return map<AdapterList>(*this, [&](const at::Tensor& t) { return t.select(0, i); });
}

BranchList BranchList::range(int64_t first, int64_t branches) const {
  return map<BranchList>(*this, [&](const at::Tensor& t) { return t.narrow(0, first, branches); });
}

BranchList BranchList::detached() const {
  return map<BranchList>(*this, [](const at::Tensor& t) { return t.detach(); });
}

BranchList BranchList::joined(const BranchList& others) const {
  return {at::cat({down_weight, others.down_weight}), at::cat({down_bias, others.down_bias}),
          at::cat({up_weight, others.up_weight}), at::cat({up_bias, others.up_bias})};
}

AdapterList BranchList::mean() const {
  return map<AdapterList>(*this, [](const at::Tensor& t) { return t.mean(0); });
}

BranchList BranchList::mixed(const at::Tensor& alpha) const {
  return map<BranchList>(*this, [&](const at::Tensor& t) {
    std::vector<int64_t> sizes(static_cast<size_t>(t.dim()), 1);
    sizes[0] = t.size(0);
    sizes[1] = t.size(1);
    return (t * alpha.t().view(sizes)).sum(0, /*keepdim=*/true);
  });
}

void BranchList::visit(const std::string& prefix, const NamedTensorFn& fn) {
  for (int64_t i = 0; i < branches(); ++i) {
    branch(i).visit(prefix + std::to_string(i) + ".", fn);
  }
}

at::Tensor stream_adapters(const at::Tensor& hidden, const Streams& streams, int64_t block,
                           const Dropout& dropout) {
  const BranchList& a = streams.adapters;
  const int64_t s = a.branches();
  at::Tensor own = adapter(hidden.narrow(0, 0, s),
                           {.down_weight = a.down_weight.select(1, block),
                            .down_bias = a.down_bias.select(1, block),
                            .up_weight = a.up_weight.select(1, block),
                            .up_bias = a.up_bias.select(1, block)},
                           dropout, /*image_dim=*/1);
  if (!streams.shares.defined()) {
    return own;
  }
  at::Tensor mixture =
      (own * streams.shares.select(0, block).view({s, 1, 1, 1})).sum(0, /*keepdim=*/true);
  if (!streams.others.empty()) {
    mixture = mixture + streams.others[static_cast<size_t>(block)];
  }
  return at::cat({own, mixture});
}

at::Tensor stream_block(const VisionTransformer& vit, const at::Tensor& x, const Streams& streams,
                        int64_t block, double scale, const Dropout& dropout, at::Tensor* added) {
  const bool last = block + 1 == vit.depth();
  const Residual after =
      vit.mlp(block, vit.attention(block, {x.flatten(0, 1)}, {.class_token_only = last}));
  const at::Tensor plain = after.value().view({x.size(0), x.size(1), after.stream.size(1), -1});
  const at::Tensor a = stream_adapters(after.stream.view(plain.sizes()), streams, block, dropout);
  if (added) {
    *added = a;
  }
  return at::add(plain, a, scale);
}

at::Tensor stream_pass(const VisionTransformer& vit, const Prefix& prefix, const Streams& streams,
                       double scale, const std::vector<Dropout>& dropout,
                       std::vector<at::Tensor>* added) {
  const int64_t depth = vit.depth();
  const BranchList& a = streams.adapters;
  NTKCL_CHECK(a.down_weight.size(1) == depth && a.down_weight.size(3) == vit.width(), "stream_pass",
              "expected adapters for ", depth, " blocks of width ", vit.width(), ", got ",
              a.down_weight.sizes());
  NTKCL_CHECK(dropout.empty() || static_cast<int64_t>(dropout.size()) == depth, "stream_pass",
              "expected dropout for ", depth, " blocks, got ", dropout.size());
  if (added) {
    added->resize(static_cast<size_t>(depth));
  }
  at::Tensor x;
  for (int64_t l = 0; l < depth; ++l) {
    const auto i = static_cast<size_t>(l);
    const Dropout of_block = dropout.empty() ? Dropout{} : dropout[i];
    at::Tensor* a_of_block = added ? &(*added)[i] : nullptr;
    if (l > 0) {
      x = stream_block(vit, x, streams, l, scale, of_block, a_of_block);
      continue;
    }
    // The first block up to its adapters is the same for all streams.
    const at::Tensor h = prefix.hidden.unsqueeze(0).expand({streams.count(), -1, -1, -1});
    const at::Tensor first = stream_adapters(h, streams, 0, of_block);
    if (a_of_block) {
      *a_of_block = first;
    }
    x = at::add(prefix.hidden + prefix.mlp, first, scale);
  }
  return vit.class_feature(x.flatten(0, 1)).view({x.size(0), x.size(1), -1});
}

}  // namespace ntkcl::nn
