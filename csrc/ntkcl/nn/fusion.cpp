#include "ntkcl/nn/fusion.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "ntkcl/core/error.h"
#include "ntkcl/ops/feature_fusion.h"

namespace ntkcl::nn {
namespace {

constexpr double kSectionNormEps = 1e-6;

at::Tensor pair(const at::Tensor& a, const at::Tensor& b) {
  return at::cat({a, b}, 1);
}

}  // namespace

const std::vector<std::string>& Fusion::kinds() {
  static const std::vector<std::string> names{"attention", "concat", "multimodal",     "vae",
                                              "lstm",      "gru",    "cross_attention"};
  return names;
}

Fusion::Fusion(std::string kind, int64_t width, int64_t section, int64_t heads,
               const at::TensorOptions& options)
    : kind_(std::move(kind)), width_(width), section_(section), heads_(heads), options_(options) {
  NTKCL_CHECK(std::count(kinds().begin(), kinds().end(), kind_), "fusion", "unknown kind '", kind_,
              "'");
  const int64_t d = width_;
  const int64_t split = kind_ == "cross_attention" ? section_ : d;
  NTKCL_CHECK(!drops_heads() || (heads_ > 0 && split % heads_ == 0), "fusion",
              "heads: expected a divisor of ", split, ", got ", heads_);
  const double bound = 1.0 / std::sqrt(static_cast<double>(d));
  if (kind_ == "attention") {
    add_linear("query", d, d, false);
    add_linear("key", d, d, false);
    add_linear("value", d, d);
  } else if (kind_ == "concat") {
    add_linear("fc1", d, 2 * d);
  } else if (kind_ == "multimodal") {
    add_linear("fc1", d, d);
    add_linear("fc2", d, 3 * d);
    parameters_.push_back({"interact", at::zeros({d}, options_), -1.0, false, true});
  } else if (kind_ == "vae") {
    add_linear("encoder.0", d, 2 * d);
    add_linear("encoder.2", d / 2, d);
    add_linear("decoder.0", d, d / 2);
    add_linear("decoder.2", d, d);
  } else if (kind_ == "lstm" || kind_ == "gru") {
    const int64_t gates = kind_ == "lstm" ? 4 * d : 3 * d;
    for (const char* name : {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}) {
      parameters_.push_back({name, at::zeros({gates, d}, options_), bound, true, true});
    }
    for (const char* name : {"rnn.bias_ih_l0", "rnn.bias_hh_l0"}) {
      parameters_.push_back({name, at::zeros({gates}, options_), bound, false, true});
    }
  } else {
    const double section_bound = 1.0 / std::sqrt(static_cast<double>(section_));
    for (const char* name : {"query.weight", "key.weight", "value.weight", "out.weight"}) {
      const bool out = std::string_view(name) == "out.weight";
      parameters_.push_back(
          {name, at::zeros({section_, section_}, options_), out ? 0.0 : section_bound, true, true});
    }
  }
}

void Fusion::add_linear(const std::string& name, int64_t out, int64_t in, bool live) {
  const double bound = 1.0 / std::sqrt(static_cast<double>(in));
  parameters_.push_back({name + ".weight", at::zeros({out, in}, options_), bound, true, live});
  parameters_.push_back({name + ".bias", at::zeros({out}, options_), bound, false, live});
}

const at::Tensor& Fusion::get(const std::string& name) const {
  const auto found = std::find_if(parameters_.begin(), parameters_.end(),
                                  [&](const Parameter& p) { return p.name == name; });
  NTKCL_ASSERT(found != parameters_.end());
  return found->value;
}

at::Tensor Fusion::linear(const at::Tensor& x, const std::string& name) const {
  return at::linear(x, get(name + ".weight"), get(name + ".bias"));
}

at::Tensor Fusion::operator()(const at::Tensor& channel, const at::Tensor& patch,
                              const at::Tensor& head_mask, double p) const {
  if (kind_ == "attention") {
    return ops::feature_fusion(channel, patch, get("value.weight"), get("value.bias"),
                               head_mask.defined() ? std::optional(head_mask) : std::nullopt,
                               {.p = p});
  }
  if (kind_ == "concat") {
    return 0.5 * at::relu(linear(pair(channel, patch), "fc1")) + channel + patch;
  }
  if (kind_ == "multimodal") {
    const at::Tensor i = at::relu(linear(channel * patch, "fc1")) * get("interact");
    return 0.1 * at::relu(linear(at::cat({channel, patch, i}, 1), "fc2")) + channel + patch;
  }
  if (kind_ == "vae") {
    const at::Tensor code =
        linear(at::relu(linear(pair(channel, patch), "encoder.0")), "encoder.2");
    const at::Tensor decoded = linear(at::relu(linear(code, "decoder.0")), "decoder.2");
    return 0.1 * decoded + channel + patch;
  }
  if (kind_ == "cross_attention") {
    at::Tensor head_scale;  // (B, heads): 0 or 1 / (1 - p)
    if (head_mask.defined()) {
      head_scale = head_mask.to(channel.scalar_type()) / (1.0 - p);
    }
    return 0.5 * cross_attention(channel, patch, head_scale) + channel + 0.1 * patch;
  }
  return recurrent(channel, patch) + channel + patch;
}

at::Tensor Fusion::recurrent(const at::Tensor& channel, const at::Tensor& patch) const {
  const at::Tensor zero = at::zeros_like(channel);
  const auto &wi = get("rnn.weight_ih_l0"), &wh = get("rnn.weight_hh_l0");
  const auto &bi = get("rnn.bias_ih_l0"), &bh = get("rnn.bias_hh_l0");
  if (kind_ == "gru") {
    return at::gru_cell(patch, at::gru_cell(channel, zero, wi, wh, bi, bh), wi, wh, bi, bh);
  }
  const auto [h1, c1] = at::lstm_cell(channel, {zero, zero}, wi, wh, bi, bh);
  return std::get<0>(at::lstm_cell(patch, {h1, c1}, wi, wh, bi, bh));
}

at::Tensor Fusion::cross_attention(const at::Tensor& channel, const at::Tensor& patch,
                                   const at::Tensor& head_scale) const {
  const int64_t b = channel.size(0), s = width_ / section_, c = section_;
  const auto normalised = [&](const at::Tensor& x) {
    return at::layer_norm(x.view({b, s, c}), {c}, {}, {}, kSectionNormEps);
  };
  const auto heads = [&](const at::Tensor& x, const std::string& weight) {  // (B, H, T, C / H)
    return at::linear(x, get(weight)).view({b, x.size(1), heads_, -1}).transpose(1, 2);
  };
  const at::Tensor queries = normalised(patch);
  const at::Tensor all = at::cat({normalised(channel), queries}, 1);  // (B, 2S, C)
  at::Tensor mixed = at::scaled_dot_product_attention(
      heads(queries, "query.weight"), heads(all, "key.weight"), heads(all, "value.weight"));
  if (head_scale.defined()) {
    mixed = mixed * head_scale.view({b, heads_, 1, 1});
  }
  mixed = mixed.transpose(1, 2).reshape({b, s, c});
  return at::linear(mixed, get("out.weight")).reshape({b, width_});
}

}  // namespace ntkcl::nn
