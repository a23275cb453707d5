#pragma once

#include "ntkcl/nn/adapter.h"

namespace ntkcl::nn {

// How the channel feature F_c and the patch feature F_p (both (B, D)) become the third
// representation F_m (B, D). NTK-CL section 3:
//
//   attention        0.5 drophead(W_v F_c + b_v) + F_c + 0.1 F_p   (attention over one token is the
//                    identity; queries and keys exist only as parameters that decay)
//   concat           0.5 relu(W [F_c, F_p]) + F_c + F_p
//   multimodal       0.1 relu(W2 [F_c, F_p, relu(W1 (F_c * F_p)) * v]) + F_c + F_p
//   vae              0.1 decode(encode([F_c, F_p])) + F_c + F_p, bottleneck D / 2
//   lstm, gru        last hidden state over the sequence (F_c, F_p), + F_c + F_p
//   cross_attention  0.5 drophead-attention over the C-wide sections + F_c + 0.1 F_p (section 8.2)
class Fusion {
 public:
  struct Parameter {
    std::string name;  // "value.weight"
    at::Tensor value;
    double bound = 0;     // initialisation: U(-bound, bound); 0: zeros; negative: N(0, 1)
    bool weight = false;  // under the regulariser
    bool live = true;     // false: the loss never reaches it (queries and keys of `attention`)
  };

  // ValueError for an unknown kind, or heads that do not divide the width they split.
  Fusion(std::string kind, int64_t width, int64_t section, int64_t heads,
         const at::TensorOptions& options);

  static const std::vector<std::string>& kinds();

  std::vector<Parameter>& parameters() { return parameters_; }
  const std::vector<Parameter>& parameters() const { return parameters_; }
  int64_t heads() const { return heads_; }
  // Has a dropout over heads, whose mask is (B, heads).
  bool drops_heads() const { return kind_ == "attention" || kind_ == "cross_attention"; }

  // `head_mask` (B, heads), 1 = keep, kept heads divided by 1 - p; undefined: no dropout.
  at::Tensor operator()(const at::Tensor& channel, const at::Tensor& patch,
                        const at::Tensor& head_mask = {}, double p = 0.0) const;

 private:
  const at::Tensor& get(const std::string& name) const;
  at::Tensor linear(const at::Tensor& x, const std::string& name) const;
  void add_linear(const std::string& name, int64_t out, int64_t in, bool live = true);
  at::Tensor recurrent(const at::Tensor& channel, const at::Tensor& patch) const;
  at::Tensor cross_attention(const at::Tensor& channel, const at::Tensor& patch,
                             const at::Tensor& head_scale) const;

  std::string kind_;
  int64_t width_, section_, heads_;
  at::TensorOptions options_;
  std::vector<Parameter> parameters_;
};

}  // namespace ntkcl::nn
