// Sharpness-aware minimisation: SAM (Foret et al., ICLR 2021) and RAA's SAM+ (specification 4.1).
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "ntkcl/core/error.h"
#include "ntkcl/optim/gradient_clipping.h"
#include "ntkcl/optim/kinds.h"

namespace ntkcl::optim {
namespace {

// cos(v, e) from <v, e>, |v| and |e|, divided in float64; 0 where either is zero.
at::Tensor cosine(const at::Tensor& product, const at::Tensor& v_norm, const at::Tensor& e_norm) {
  const at::Tensor lengths = v_norm.to(at::kDouble) * e_norm.to(at::kDouble);
  return at::where(lengths.gt(0), product.to(at::kDouble) / lengths, 0.0);
}

class Sam : public Optimizer {
 public:
  Sam(const OptimizerOptions& options, std::vector<ParameterGroup> groups)
      : Optimizer(std::move(groups)), options_(options), momentum_(zeros_like_parameters()) {
    NTKCL_CHECK(options_.gamma == "tensor" || options_.gamma == "global", "optimizer",
                "expected gamma 'tensor' or 'global', got '", options_.gamma, "'");
    for (size_t g = 0; g < this->groups().size(); ++g) {
      const auto& parameters = this->groups()[g].parameters;
      parameters_.insert(parameters_.end(), parameters.begin(), parameters.end());
    }
  }

  int passes() const override { return 2; }

  void step(const GradientFn& gradients) override {
    if (parameters_.empty()) {
      gradients(0);
      gradients(1);
      return;
    }
    const std::vector<at::Tensor> ascent = perturbation(compute_gradients(gradients, 0));
    const TensorLists computed = gradients_at(ascent, gradients);
    const c10::NoGradGuard no_grad;
    for (size_t g = 0; g < groups().size(); ++g) {
      if (!groups()[g].parameters.empty()) {
        move_momentum(g, computed[g]);
      }
    }
    descend(options_.kind == "sam" ? std::vector<at::Tensor>() : gammas(ascent));
  }

  void visit_state(const StateFn& visitor) override { visit_lists("momentum", momentum_, visitor); }

 private:
  static std::vector<at::Tensor> flat(const TensorLists& lists) {
    std::vector<at::Tensor> all;
    for (const auto& list : lists) {
      all.insert(all.end(), list.begin(), list.end());
    }
    return all;
  }

  // Steps 2 and 3: e_j = rho g_j / n, n one norm over all tensors.
  std::vector<at::Tensor> perturbation(const TensorLists& lists) const {
    const c10::NoGradGuard no_grad;
    const std::vector<at::Tensor> all = flat(lists);
    return at::_foreach_mul(all, options_.rho / (total_norm(all) + 1e-16));
  }

  // Step 4: the gradients at theta + e. Parameters are back at theta afterwards, to the bit, also
  // when the gradient function fails.
  TensorLists gradients_at(const std::vector<at::Tensor>& ascent, const GradientFn& gradients) {
    const auto add = [&] {
      const c10::NoGradGuard no_grad;
      std::vector<at::Tensor> before;
      for (const at::Tensor& parameter : parameters_) {
        before.push_back(parameter.clone());
      }
      at::_foreach_add_(parameters_, ascent);
      return before;
    };
    const std::vector<at::Tensor> before = add();
    const auto restore = [&] {
      const c10::NoGradGuard no_grad;
      at::_foreach_copy_(parameters_, before);
    };
    try {
      TensorLists computed = compute_gradients(gradients, 1);
      restore();
      return computed;
    } catch (...) {
      restore();
      throw;
    }
  }

  // Step 5: v <- momentum v + (g + decay theta).
  void move_momentum(size_t g, const std::vector<at::Tensor>& gradients) {
    at::_foreach_mul_(momentum_[g], options_.momentum);
    at::_foreach_add_(momentum_[g], gradients);
    const double decay = decay_of(g, options_.weight_decay);
    if (decay != 0) {
      at::_foreach_add_(momentum_[g], groups()[g].parameters, decay);
    }
  }

  // A tensor of group g as rows, one for each tensor that it stacks.
  at::Tensor rows(size_t g, const at::Tensor& tensor) const {
    int64_t count = 1;
    for (int64_t d = 0; d < groups()[g].stacked_dims; ++d) {
      count *= tensor.size(d);
    }
    return tensor.reshape({count, -1});
  }

  // Steps 6 and 7, (rows) of every parameter.
  std::vector<at::Tensor> gammas(const std::vector<at::Tensor>& ascent) const {
    std::vector<at::Tensor> products, v_norms, e_norms;
    std::vector<int64_t> counts;
    for (size_t g = 0; g < momentum_.size(); ++g) {
      for (const at::Tensor& momentum : momentum_[g]) {
        const at::Tensor v = rows(g, momentum), e = rows(g, ascent[products.size()]);
        products.push_back(at::linalg_vecdot(v, e));
        v_norms.push_back(at::linalg_vector_norm(v, 2, {1}));
        e_norms.push_back(at::linalg_vector_norm(e, 2, {1}));
        counts.push_back(v.size(0));
      }
    }
    const at::Tensor product = at::cat(products), v_norm = at::cat(v_norms);
    at::Tensor cos;
    if (options_.gamma == "global") {
      cos = cosine(product.sum(), at::linalg_vector_norm(v_norm),
                   at::linalg_vector_norm(at::cat(e_norms)))
                .expand_as(product);
    } else {
      cos = cosine(product, v_norm, at::cat(e_norms));
    }
    return sam_plus_gamma(cos, options_.tau).to(product.scalar_type()).split_with_sizes(counts);
  }

  // Step 8: theta_j <- theta_j - lr gamma_j v_j; gamma 1 where none is given.
  void descend(const std::vector<at::Tensor>& gamma) {
    size_t j = 0;
    for (size_t g = 0; g < groups().size(); ++g) {
      const auto& parameters = groups()[g].parameters;
      if (gamma.empty() && !parameters.empty()) {
        at::_foreach_add_(parameters, momentum_[g], -learning_rate(g));
        continue;
      }
      for (size_t i = 0; i < parameters.size(); ++i) {
        rows(g, parameters[i])
            .addcmul_(rows(g, momentum_[g][i]), gamma[j++].unsqueeze(1), -learning_rate(g));
      }
    }
  }

  OptimizerOptions options_;
  std::vector<at::Tensor> parameters_;  // of all groups
  TensorLists momentum_;
};

}  // namespace

at::Tensor sam_plus_gamma(const at::Tensor& cos, double tau) {
  return at::clamp(tau * -at::expm1(cos - 1), 0, 1);  // rounding can give cos > 1
}

std::unique_ptr<Optimizer> make_sam(const OptimizerOptions& options,
                                    std::vector<ParameterGroup> groups) {
  return std::make_unique<Sam>(options, std::move(groups));
}

}  // namespace ntkcl::optim
