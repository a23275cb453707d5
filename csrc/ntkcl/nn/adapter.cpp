#include "ntkcl/nn/adapter.h"

#include <ATen/ATen.h>

#include "ntkcl/core/error.h"
#include "ntkcl/ops/philox_keep_mask.h"

namespace ntkcl::nn {

AdapterList AdapterList::zeros(int64_t blocks, int64_t rank, int64_t width,
                               const at::TensorOptions& options) {
  return {at::zeros({blocks, rank, width}, options), at::zeros({blocks, rank}, options),
          at::zeros({blocks, width, rank}, options), at::zeros({blocks, width}, options)};
}

std::vector<at::Tensor> AdapterList::tensors() const {
  return {down_weight, down_bias, up_weight, up_bias};
}

std::vector<at::Tensor> AdapterList::weights() const {
  return {down_weight, up_weight};
}

void visit_block(const std::string& name, const at::Tensor& stacked, int64_t block,
                 const NamedTensorFn& fn) {
  at::Tensor slice = stacked.detach().select(0, block);
  const auto sizes = slice.sizes().vec();
  fn(name, slice);
  NTKCL_CHECK(slice.sizes() == at::IntArrayRef(sizes), "state", name, ": expected ",
              at::IntArrayRef(sizes), ", got ", slice.sizes());
}

void AdapterList::visit(const std::string& prefix, const NamedTensorFn& fn) {
  for (int64_t l = 0; l < down_weight.size(0); ++l) {
    const std::string block = prefix + std::to_string(l) + ".";
    for (const auto& [name, stacked] :
         {std::pair<const char*, at::Tensor&>{"down.weight", down_weight},
          {"down.bias", down_bias},
          {"up.weight", up_weight},
          {"up.bias", up_bias}}) {
      visit_block(block + name, stacked, l, fn);
    }
  }
}

at::Tensor adapter(const at::Tensor& hidden, const ops::AdapterWeights& weights,
                   const Dropout& dropout, int64_t image_dim) {
  std::optional<at::Tensor> mask, key;
  if (dropout.mask.defined()) {
    const int64_t tokens = image_dim + 1;
    mask = dropout.mask.narrow(tokens, 0, hidden.size(tokens)).to(hidden.device());
  } else if (dropout.key.defined() && dropout.rows == 0) {
    key = dropout.key;
  } else if (dropout.key.defined()) {
    // Of the mask of all images those of these.
    auto sizes = hidden.sizes().vec();
    sizes.back() = weights.down_weight.size(-2);
    sizes[static_cast<size_t>(image_dim)] = dropout.rows;
    const at::Tensor here =
        dropout.key.to(hidden.device(), dropout.key.scalar_type(), /*non_blocking=*/true);
    mask = ops::philox_keep_mask(here, sizes, dropout.p)
               .narrow(image_dim, dropout.first, hidden.size(image_dim));
  }
  return ops::parallel_adapter(hidden, weights, mask, key, dropout.p).out;
}

at::Tensor channel_pass(const VisionTransformer& vit, const Prefix& prefix,
                        const AdapterList& adapters, double scale,
                        const std::vector<Dropout>& dropout, Trace* trace) {
  const int64_t depth = vit.depth();
  NTKCL_CHECK(adapters.down_weight.size(0) == depth && adapters.down_weight.size(2) == vit.width(),
              "channel_pass", "expected adapters for ", depth, " blocks of width ", vit.width(),
              ", got ", adapters.down_weight.sizes());
  NTKCL_CHECK(dropout.empty() || static_cast<int64_t>(dropout.size()) == depth, "channel_pass",
              "expected dropout for ", depth, " blocks, got ", dropout.size());
  const auto down_weight = adapters.down_weight.unbind(0);
  const auto down_bias = adapters.down_bias.unbind(0);
  const auto up_weight = adapters.up_weight.unbind(0);
  const auto up_bias = adapters.up_bias.unbind(0);

  Residual x;
  for (int64_t l = 0; l < depth; ++l) {
    const auto i = static_cast<size_t>(l);
    const bool last = l + 1 == depth && !trace;
    x = l == 0 ? Residual{prefix.hidden, prefix.mlp}
               : vit.mlp(l, vit.attention(l, x, {.class_token_only = last}));
    x.stream = adapter(x.stream,
                       {.down_weight = down_weight[i],
                        .down_bias = down_bias[i],
                        .up_weight = up_weight[i],
                        .up_bias = up_bias[i],
                        .scale = scale,
                        .residual = true},
                       dropout.empty() ? Dropout{} : dropout[i]);
    if (trace) {
      trace->blocks.push_back(x.value());
    }
  }
  return vit.class_feature(x.value());
}

}  // namespace ntkcl::nn
