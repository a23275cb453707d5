#include "ntkcl/nn/composed_lora.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <memory>

#include "ntkcl/core/error.h"
#include "ntkcl/ops/composed_linear.h"

namespace ntkcl::nn {
namespace {

constexpr const char* kWhere = "lora";

// A kind's matrices (g * out, in) or biases (g * out) of a block, one below the other.
at::Tensor of_kind(const BlockTensors& block, LoraGroup::Kind kind) {
  switch (kind) {
    case LoraGroup::Kind::kAttention:
      return at::cat({block.qkv, block.proj});
    case LoraGroup::Kind::kFc1:
      return block.fc1;
    case LoraGroup::Kind::kFc2:
      break;
  }
  return block.fc2;
}

// Of matrices first .. first + count of a block's group; what the graph sees of it.
struct Slice {
  at::Tensor weight, bias, down, up, old_down, old_up, omega, probe;
  std::vector<double> scale, omega_scale;

  Slice matrices(int64_t first, int64_t count) const {
    const auto cut = [&](const at::Tensor& t) {
      return t.defined() ? t.narrow(0, first, count) : t;
    };
    const auto part = [&](const std::vector<double>& v) {
      return std::vector<double>(v.begin() + first, v.begin() + first + count);
    };
    const int64_t out = weight.size(1);
    return {cut(weight),   bias.narrow(0, first * out, count * out),
            cut(down),     cut(up),
            cut(old_down), cut(old_up),
            cut(omega),    cut(probe),
            part(scale),   part(omega_scale)};
  }

  bool trained() const {
    const auto any = [](const std::vector<double>& v) {
      return std::any_of(v.begin(), v.end(), [](double s) { return s != 0; });
    };
    return any(scale) || (omega.size(1) > 0 && any(omega_scale));
  }
};

BlockProducts::Product product_of(Slice s) {
  if (!s.trained()) {  // no graph begins here
    const at::Tensor weight = s.weight.flatten(0, 1);
    return [weight, bias = s.bias](const at::Tensor& x) { return at::linear(x, weight, bias); };
  }
  return [s = std::move(s)](const at::Tensor& x) {
    ops::LowRankModules modules{.down = s.down, .up = s.up, .scale = s.scale};
    if (s.omega.size(1) > 0) {
      modules.old_down = s.old_down;
      modules.old_up = s.old_up;
      modules.omega = s.omega;
      modules.omega_scale = s.omega_scale;
    }
    return ops::composed_linear(x, s.weight, s.bias, modules, /*composed=*/true,
                                s.probe.defined() ? std::optional(s.probe) : std::nullopt);
  };
}

}  // namespace

ComposedLora::ComposedLora(const VisionTransformer& vit, bool mlp, int64_t blocks, int64_t rank)
    : vit_(vit), rank_(rank) {
  NTKCL_CHECK(1 <= blocks && blocks <= vit.depth(), kWhere, "'lora_depth': expected 1 to the ",
              vit.depth(), " blocks of the backbone, got ", blocks);
  NTKCL_CHECK(1 <= rank && rank <= vit.width(), kWhere,
              "'rank': expected 1 to the smaller side of the matrices, ", vit.width(), ", got ",
              rank);
  using Kind = LoraGroup::Kind;
  groups_.push_back({.kind = Kind::kAttention, .name = "attention", .first_type = 0});
  if (mlp) {
    groups_.push_back({.kind = Kind::kFc1, .name = "fc1", .first_type = 4});
    groups_.push_back({.kind = Kind::kFc2, .name = "fc2", .first_type = 5});
  }
  for (LoraGroup& group : groups_) {
    std::vector<at::Tensor> weights, biases;
    for (int64_t l = 0; l < blocks; ++l) {
      weights.push_back(of_kind(vit.weights(l), group.kind));
      biases.push_back(of_kind(vit.biases(l), group.kind));
    }
    const int64_t g = group.kind == Kind::kAttention ? 4 : 1;
    const int64_t out = weights[0].size(0) / g, in = weights[0].size(1);
    // Modules and what is composed of them are in the type of all that is trained.
    group.pretrained = at::stack(weights).view({blocks, g, out, in}).to(vit.options());
    group.bias = at::stack(biases);
    const auto zeros = [&](at::IntArrayRef sizes) { return at::zeros(sizes, vit.options()); };
    group.down = zeros({blocks, g, in, rank});
    group.up = zeros({blocks, g, rank, out});
    group.old_down = zeros({blocks, g, in, 0});
    group.old_up = zeros({blocks, g, 0, out});
    group.omega = zeros({blocks, g, 0});
  }
}

int64_t ComposedLora::types() const {
  return groups_.back().first_type + groups_.back().types();
}

int64_t ComposedLora::blocks() const {
  return groups_.front().pretrained.size(0);
}

void ComposedLora::begin(const InitFn& init) {
  for (LoraGroup& group : groups_) {
    group.down = at::empty_like(group.down);
    group.up = at::zeros_like(group.up);
    for (int64_t l = 0; l < blocks(); ++l) {
      for (int64_t j = 0; j < group.types(); ++j) {
        group.down[l][j].copy_(init(group.first_type + j, l, group.old_down[l][j]));
      }
    }
    for (const at::Tensor* parameter : {&group.down, &group.up, &group.omega}) {
      parameter->requires_grad_(true);
    }
  }
}

void ComposedLora::finish() {
  const at::NoGradGuard no_grad;
  for (LoraGroup& group : groups_) {
    group.old_down = at::cat({group.old_down, group.down}, 3);
    group.old_up = at::cat({group.old_up, group.up}, 2);
    group.omega = at::cat({group.omega, group.omega.new_ones({blocks(), group.types(), 1})}, 2);
  }
}

void ComposedLora::train(const at::Tensor& current, const at::Tensor& old) {
  NTKCL_ASSERT(current.sizes() == at::IntArrayRef({types(), blocks()}) &&
               old.sizes() == current.sizes());
  const at::NoGradGuard no_grad;
  constants_.clear();
  for (const LoraGroup& group : groups_) {
    const auto scales = [&](const at::Tensor& table) {
      return (table.narrow(0, group.first_type, group.types()).t() / rank_).contiguous();
    };
    const auto by_block = [](const at::Tensor& scale) {
      std::vector<std::vector<double>> rows;
      for (const at::Tensor& row : scale.to(at::kDouble).unbind(0)) {
        const double* values = row.const_data_ptr<double>();
        rows.emplace_back(values, values + row.numel());
      }
      return rows;
    };
    Constants constants;
    const at::Tensor scale = scales(current), omega_scale = scales(old);
    constants.scales = by_block(scale);
    constants.omega_scales = by_block(omega_scale);
    constants.scale = scale.to(group.down.options());
    constants.omega_scale = omega_scale.to(group.down.options());
    // What is not trained is merged: W0 + s sum_i omega_i A_i B_i.
    const bool merges = group.modules() > 0 && old.eq(0).any().item<bool>();
    const at::Tensor merged = 1.0 / static_cast<double>(rank_) - constants.omega_scale;
    constants.weight = group.pretrained;
    if (merges) {
      constants.weight =
          ops::compose_weight(group.pretrained.flatten(0, 1),
                              {.old_down = group.old_down.flatten(0, 1),
                               .old_up = group.old_up.flatten(0, 1),
                               .omega = (group.omega * merged.unsqueeze(2)).flatten(0, 1)});
      constants.weight = constants.weight.view_as(group.pretrained);
    }
    constants_.push_back(std::move(constants));
  }
}

at::Tensor ComposedLora::compose(const LoraGroup& group, const Constants& constants) const {
  const at::NoGradGuard no_grad;
  const at::Tensor weight = ops::compose_weight(
      constants.weight.flatten(0, 1),
      {.down = group.down.flatten(0, 1),
       .up = group.up.flatten(0, 1),
       .scale = constants.scale.flatten(),
       .old_down = group.old_down.flatten(0, 1),
       .old_up = group.old_up.flatten(0, 1),
       .omega = (group.omega * constants.omega_scale.unsqueeze(2)).flatten(0, 1)});
  return weight.view_as(group.pretrained).to(vit_.product_type());
}

std::vector<BlockProducts> ComposedLora::products(const Probes& probes) const {
  NTKCL_ASSERT(constants_.size() == groups_.size());
  std::vector<BlockProducts> products(static_cast<size_t>(blocks()));
  for (size_t i = 0; i < groups_.size(); ++i) {
    const LoraGroup& group = groups_[i];
    const auto weight = compose(group, constants_[i]).unbind(0), bias = group.bias.unbind(0);
    const auto down = group.down.unbind(0), up = group.up.unbind(0);
    const auto old_down = group.old_down.unbind(0), old_up = group.old_up.unbind(0);
    const auto omega = group.omega.unbind(0);
    for (size_t l = 0; l < products.size(); ++l) {
      Slice s{weight[l],
              bias[l],
              down[l],
              up[l],
              old_down[l],
              old_up[l],
              omega[l],
              {},
              constants_[i].scales[l],
              constants_[i].omega_scales[l]};
      if (!probes.empty()) {
        s.probe = probes[i][l];
      }
      BlockProducts& of_block = products[l];
      if (group.kind == LoraGroup::Kind::kFc1) {
        of_block.fc1 = product_of(std::move(s));
      } else if (group.kind == LoraGroup::Kind::kFc2) {
        of_block.fc2 = product_of(std::move(s));
      } else {
        of_block.proj = product_of(s.matrices(3, 1));
        if (static_cast<int64_t>(l) + 1 == vit_.depth()) {  // the class token alone leaves
          of_block.query = product_of(s.matrices(0, 1));
          of_block.key_value = product_of(s.matrices(1, 2));
        } else {
          of_block.qkv = product_of(s.matrices(0, 3));
        }
      }
    }
  }
  return products;
}

std::vector<BlockTensors> ComposedLora::merged(const std::vector<at::Tensor>& omega) const {
  NTKCL_ASSERT(omega.size() == groups_.size());
  const at::NoGradGuard no_grad;
  std::vector<BlockTensors> blocks_of(static_cast<size_t>(blocks()));
  for (size_t i = 0; i < groups_.size(); ++i) {
    const LoraGroup& group = groups_[i];
    const int64_t columns = omega[i].size(2) * rank_;
    const at::Tensor weight =
        ops::compose_weight(group.pretrained.flatten(0, 1),
                            {.old_down = group.old_down.narrow(3, 0, columns).flatten(0, 1),
                             .old_up = group.old_up.narrow(2, 0, columns).flatten(0, 1),
                             .omega = omega[i].flatten(0, 1) / static_cast<double>(rank_)})
            .view_as(group.pretrained);
    for (int64_t l = 0; l < blocks(); ++l) {
      BlockTensors& of_block = blocks_of[static_cast<size_t>(l)];
      const at::Tensor own = weight[l];
      if (group.kind == LoraGroup::Kind::kFc1) {
        of_block.fc1 = own[0];
      } else if (group.kind == LoraGroup::Kind::kFc2) {
        of_block.fc2 = own[0];
      } else {
        of_block.qkv = own.narrow(0, 0, 3).flatten(0, 1);
        of_block.proj = own[3];
      }
    }
  }
  return blocks_of;
}

}  // namespace ntkcl::nn
