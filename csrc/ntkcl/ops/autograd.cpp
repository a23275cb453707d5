#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ntkcl/ops/attention.h"
#include "ntkcl/ops/bias_relu_dropout.h"
#include "ntkcl/ops/checks.h"
#include "ntkcl/ops/composed_linear.h"
#include "ntkcl/ops/dissimilarity.h"
#include "ntkcl/ops/feature_fusion.h"
#include "ntkcl/ops/gelu.h"
#include "ntkcl/ops/parallel_adapter.h"
#include "ntkcl/ops/projection.h"
#include "ntkcl/ops/residual_layer_norm.h"
#include "ntkcl/ops/section_cosine.h"
#include "ntkcl/ops/token_mix_prompts.h"

// The autograd functions of all operators, in one file because custom_function.h costs 10 s.
namespace ntkcl::ops {
namespace {

using at::AutoDispatchBelowADInplaceOrView;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Which of the first N inputs want a gradient; all of them are tensors.
template <size_t N>
std::array<bool, N> first_wanted(AutogradContext* context) {
  std::array<bool, N> wanted{};
  for (size_t i = 0; i < N; ++i) {
    wanted[i] = context->needs_input_grad(i);
  }
  return wanted;
}

// The gradients of the first inputs, those not wanted undefined, and as many more as `count` says.
template <size_t N>
variable_list as_results(const std::array<at::Tensor, N>& found, const std::array<bool, N>& wanted,
                         size_t count) {
  variable_list results(count);
  for (size_t i = 0; i < N; ++i) {
    if (wanted[i]) {
      results[i] = found[i];
    }
  }
  return results;
}

std::optional<at::Tensor> optional(const Variable& v) {
  return v.defined() ? std::optional<at::Tensor>(v) : std::nullopt;
}

struct AttentionFunction : Function<AttentionFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& qkv, int64_t heads,
                            const std::optional<at::Tensor>& gate, int64_t prompts) {
    const AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({qkv, gate.value_or(at::Tensor())});
    context->saved_data["heads"] = heads;
    context->saved_data["prompts"] = prompts;
    return attention(qkv, heads, gate, prompts);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const Variable& gate = saved[1];
    auto [dqkv, dgate] =
        attention_backward(grads[0], saved[0], context->saved_data["heads"].toInt(), optional(gate),
                           context->saved_data["prompts"].toInt());
    return {dqkv, Variable(), gate.defined() ? dgate : Variable(), Variable()};
  }
};

struct BiasReluDropoutFunction : Function<BiasReluDropoutFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& bias,
                            const std::optional<at::Tensor>& mask,
                            const std::optional<at::Tensor>& key, double p) {
    const AutoDispatchBelowADInplaceOrView guard;
    at::Tensor y = bias_relu_dropout(x, bias, mask, key, p);
    context->save_for_backward({y});
    context->saved_data["p"] = mask || key ? p : 0.0;
    context->saved_data["groups"] = bias.dim() == 2 ? bias.size(0) : int64_t{-1};
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const at::Tensor y = context->get_saved_variables()[0];
    auto [dx, dbias] = bias_relu_dropout_backward(grads[0], y, context->saved_data["p"].toDouble(),
                                                  context->saved_data["groups"].toInt());
    return {dx, dbias, Variable(), Variable(), Variable()};
  }
};

struct ComposedLinearFunction : Function<ComposedLinearFunction> {
  using Optional = std::optional<at::Tensor>;

  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const Optional& bias, const at::Tensor& down, const at::Tensor& up,
                            at::ArrayRef<double> scale, const Optional& old_down,
                            const Optional& old_up, const Optional& omega,
                            at::ArrayRef<double> omega_scale, bool composed,
                            const Optional& probe) {
    const AutoDispatchBelowADInplaceOrView guard;
    const LowRankModules m =
        low_rank_modules(down, up, scale, old_down, old_up, omega, omega_scale);
    const at::Tensor used = composed ? weight : composed_weight(weight, m);
    context->save_for_backward({x, used, down, up, old_down.value_or(at::Tensor()),
                                old_up.value_or(at::Tensor()), omega.value_or(at::Tensor())});
    context->saved_data["scale"] = m.scale;
    context->saved_data["bias"] = bias.has_value();
    context->saved_data["probe"] = probe.has_value();
    context->saved_data["entries"] = probe.has_value() && probe->dim() > 1;
    context->saved_data["omega_scale"] = m.omega_scale;
    return composed_linear(x, used, bias, m, /*composed=*/true, probe);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const LowRankModules m =
        low_rank_modules(saved[2], saved[3], context->saved_data["scale"].toDoubleVector(),
                         optional(saved[4]), optional(saved[5]), optional(saved[6]),
                         context->saved_data["omega_scale"].toDoubleVector());
    // The engine counts the tensors that were given; the result has a place for every argument.
    const bool bias = context->saved_data["bias"].toBool(), old = m.omega.has_value();
    const size_t down = bias ? 3 : 2, after_up = down + 2;
    std::array<bool, kGradients> wanted{};
    wanted[kInput] = context->needs_input_grad(0);
    wanted[kWeight] = context->needs_input_grad(1);
    wanted[kBias] = bias && context->needs_input_grad(2);
    wanted[kDown] = context->needs_input_grad(down);
    wanted[kUp] = context->needs_input_grad(down + 1);
    wanted[kOmega] = old && context->needs_input_grad(after_up + 2);
    wanted[kImportance] = context->saved_data["probe"].toBool() &&
                          context->needs_input_grad(old ? after_up + 3 : after_up);
    const ComposedGradients found = composed_linear_backward(
        grads[0], saved[0], saved[1], m, wanted, context->saved_data["entries"].toBool());
    variable_list result(12);
    constexpr std::array<size_t, kGradients> kPlaces{0, 1, 2, 3, 4, 8, 11};
    for (size_t i = 0; i < kPlaces.size(); ++i) {
      if (wanted[i]) {
        result[kPlaces[i]] = found[i];
      }
    }
    return result;
  }
};

struct DissimilarityFunction : Function<DissimilarityFunction> {
  static variable_list forward(AutogradContext* context, const at::Tensor& features,
                               const at::Tensor& old, const at::Tensor& labels,
                               const at::Tensor& old_labels, std::string_view kind,
                               double temperature) {
    const AutoDispatchBelowADInplaceOrView guard;
    const auto [loss, unit, scale, pull] =
        dissimilarity(features, labels, old, old_labels, kind, temperature);
    context->save_for_backward({unit, scale, pull, labels});
    context->mark_non_differentiable({unit, scale, pull});
    context->set_materialize_grads(false);
    return {loss, unit, scale, pull};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    if (!grads[0].defined()) {
      return variable_list(6);
    }
    const variable_list saved = context->get_saved_variables();
    const auto wanted = first_wanted<2>(context);
    const at::Tensor all = dissimilarity_backward(grads[0], saved[0], saved[1], saved[2]);
    const c10::SymInt batch = saved[3].sym_size(0);
    return as_results<2>(
        {all.narrow_symint(0, 0, batch), all.narrow_symint(0, batch, all.sym_size(0) - batch)},
        wanted, 6);
  }
};

struct FeatureFusionFunction : Function<FeatureFusionFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& channel,
                            const at::Tensor& patch, const at::Tensor& weight,
                            const at::Tensor& bias, const std::optional<at::Tensor>& head_mask,
                            double p, double value_scale, double patch_scale) {
    const AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({channel, weight, head_mask.value_or(at::Tensor())});
    context->saved_data["scales"] = std::vector<double>{p, value_scale, patch_scale};
    return feature_fusion(channel, patch, weight, bias, head_mask, {p, value_scale, patch_scale});
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const auto scales = context->saved_data["scales"].toDoubleVector();
    const auto wanted = first_wanted<kFusionGradients>(context);
    return as_results(feature_fusion_backward(grads[0], saved[0], saved[1], optional(saved[2]),
                                              {scales[0], scales[1], scales[2]}, wanted),
                      wanted, 8);
  }
};

struct GeluFunction : Function<GeluFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x) {
    const AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({x});
    return ops::gelu(x);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    return {ops::gelu_backward(grads[0], context->get_saved_variables()[0])};
  }
};

struct ParallelAdapterFunction : Function<ParallelAdapterFunction> {
  static variable_list forward(AutogradContext* context, const at::Tensor& x,
                               const at::Tensor& down_weight, const at::Tensor& down_bias,
                               const at::Tensor& up_weight, const at::Tensor& up_bias, double scale,
                               bool residual, const std::optional<at::Tensor>& mask,
                               const std::optional<at::Tensor>& key, double p) {
    const AutoDispatchBelowADInplaceOrView guard;
    const auto [out, inner] = parallel_adapter(
        x, {down_weight, down_bias, up_weight, up_bias, scale, residual}, mask, key, p);
    context->save_for_backward({x, inner, down_weight, up_weight});
    context->saved_data["scale"] = scale;
    context->saved_data["residual"] = residual;
    context->saved_data["p"] = mask || key ? p : 0.0;
    context->mark_non_differentiable({inner});
    context->set_materialize_grads(false);
    return {out, inner};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    if (!grads[0].defined()) {
      return variable_list(10);
    }
    const variable_list saved = context->get_saved_variables();
    const auto wanted = first_wanted<kAdapterGradients>(context);
    const AdapterWeights weights{.down_weight = saved[2],
                                 .down_bias = {},
                                 .up_weight = saved[3],
                                 .up_bias = {},
                                 .scale = context->saved_data["scale"].toDouble(),
                                 .residual = context->saved_data["residual"].toBool()};
    return as_results(parallel_adapter_backward(grads[0], saved[0], saved[1], weights,
                                                context->saved_data["p"].toDouble(), wanted),
                      wanted, 10);
  }
};

struct ProjectionEnergyFunction : Function<ProjectionEnergyFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x,
                            const at::Tensor& basis) {
    const AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({x, basis});
    return projection_energy(x, basis);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const auto wanted = first_wanted<2>(context);
    const auto [dx, dbasis] = projection_energy_backward(grads[0], saved[0], saved[1], wanted);
    return as_results<2>({dx, dbasis}, wanted, 2);
  }
};

struct ResidualLayerNormFunction : Function<ResidualLayerNormFunction> {
  static variable_list forward(AutogradContext* context, const at::Tensor& x,
                               const std::optional<at::Tensor>& update, const at::Tensor& weight,
                               const at::Tensor& bias, double eps,
                               std::optional<at::ScalarType> dtype) {
    const AutoDispatchBelowADInplaceOrView guard;
    const auto [sum, out, mean, scale] = residual_layer_norm(x, update, weight, bias, eps, dtype);
    context->save_for_backward({update ? sum : x, mean, scale, weight});
    context->saved_data["update"] = update ? update->scalar_type() : x.scalar_type();
    context->saved_data["updated"] = update.has_value();
    context->mark_non_differentiable(update ? variable_list{mean, scale}
                                            : variable_list{sum, mean, scale});
    context->set_materialize_grads(false);
    return {sum, out, mean, scale};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const Variable &sum_grad = grads[0], &grad = grads[1];
    const auto type = context->saved_data["update"].toScalarType();
    const bool updated = context->saved_data["updated"].toBool();
    // The engine counts the tensors that were given; the result has a place for every argument.
    const size_t weight = updated ? 2 : 1;
    ResidualLayerNormGradients found;
    if (grad.defined()) {
      const bool affine =
          context->needs_input_grad(weight) || context->needs_input_grad(weight + 1);
      found = residual_layer_norm_backward(
          grad, sum_grad.defined() ? std::optional(sum_grad) : std::nullopt, saved[0], saved[1],
          saved[2], saved[3], updated ? std::optional(type) : std::nullopt, affine);
      if (!affine) {
        found.dweight = found.dbias = Variable();
      }
    } else if (sum_grad.defined()) {
      found.dx = sum_grad;
    }
    const bool of_update = updated && found.dx.defined();
    return {found.dx,      of_update ? found.of_update().to(type) : Variable(),
            found.dweight, found.dbias,
            Variable(),    Variable()};
  }
};

struct SectionCosineFunction : Function<SectionCosineFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x,
                            const at::Tensor& prototypes, const at::Tensor& weights) {
    const AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({x, prototypes, weights});
    return section_cosine(x, prototypes, weights);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &prototypes = saved[1], &weights = saved[2];
    Variable dx, dprototypes, dweights;
    if (context->needs_input_grad(1)) {
      std::tie(dprototypes, dweights) =
          section_cosine_backward(grads[0].t(), prototypes, x, weights);
    }
    // The gradient of the weights comes with either.
    if (context->needs_input_grad(0) ||
        (context->needs_input_grad(2) && !context->needs_input_grad(1))) {
      std::tie(dx, dweights) = section_cosine_backward(grads[0], x, prototypes, weights);
    }
    return {dx, dprototypes, dweights};
  }
};

struct SignedProjectionFunction : Function<SignedProjectionFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x,
                            const at::Tensor& direction) {
    const AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({x, direction});
    return signed_projection(x, direction);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const auto wanted = first_wanted<2>(context);
    const auto [dx, ddirection] = signed_projection_backward(grads[0], saved[0], saved[1], wanted);
    return as_results<2>({dx, ddirection}, wanted, 2);
  }
};

struct TokenMixPromptsFunction : Function<TokenMixPromptsFunction> {
  static variable_list forward(AutogradContext* context, const at::Tensor& x,
                               const at::Tensor& weight, const at::Tensor& norm_weight,
                               const at::Tensor& norm_bias, int64_t carried, double scale,
                               double eps, bool insert) {
    const AutoDispatchBelowADInplaceOrView guard;
    const auto [out, mixed, mean, norm_scale] =
        token_mix_prompts(x, {weight, norm_weight, norm_bias, carried, scale, eps, insert});
    context->save_for_backward({x, mixed, mean, norm_scale, weight, norm_weight});
    context->saved_data["carried"] = carried;
    context->saved_data["scale"] = scale;
    context->saved_data["insert"] = insert;
    context->mark_non_differentiable({mixed, mean, norm_scale});
    context->set_materialize_grads(false);
    return {out, mixed, mean, norm_scale};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    if (!grads[0].defined()) {
      return variable_list(8);
    }
    const variable_list saved = context->get_saved_variables();
    const auto wanted = first_wanted<kPromptGradients>(context);
    const PromptMixing mixing{.weight = saved[4],
                              .norm_weight = saved[5],
                              .norm_bias = {},
                              .carried = context->saved_data["carried"].toInt(),
                              .scale = context->saved_data["scale"].toDouble(),
                              .insert = context->saved_data["insert"].toBool()};
    return as_results(
        token_mix_prompts_backward(grads[0], std::nullopt, saved[0],
                                   {{}, saved[1], saved[2], saved[3]}, mixing, wanted),
        wanted, 8);
  }
};

at::Tensor attention_autograd(const at::Tensor& qkv, int64_t heads,
                              const std::optional<at::Tensor>& gate, int64_t prompts) {
  return AttentionFunction::apply(qkv, heads, gate, prompts);
}

at::Tensor bias_relu_dropout_autograd(const at::Tensor& x, const at::Tensor& bias,
                                      const std::optional<at::Tensor>& mask,
                                      const std::optional<at::Tensor>& key, double p) {
  return BiasReluDropoutFunction::apply(x, bias, mask, key, p);
}

at::Tensor composed_linear_autograd(const at::Tensor& x, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias, const at::Tensor& down,
                                    const at::Tensor& up, at::ArrayRef<double> scale,
                                    const std::optional<at::Tensor>& old_down,
                                    const std::optional<at::Tensor>& old_up,
                                    const std::optional<at::Tensor>& omega,
                                    at::ArrayRef<double> omega_scale, bool composed,
                                    const std::optional<at::Tensor>& probe) {
  return ComposedLinearFunction::apply(x, weight, bias, down, up, scale, old_down, old_up, omega,
                                       omega_scale, composed, probe);
}

detail::FourTensors dissimilarity_autograd(const at::Tensor& features, const at::Tensor& labels,
                                           const at::Tensor& old, const at::Tensor& old_labels,
                                           std::string_view kind, double temperature) {
  const variable_list results =
      DissimilarityFunction::apply(features, old, labels, old_labels, kind, temperature);
  return {results[0], results[1], results[2], results[3]};
}

at::Tensor feature_fusion_autograd(const at::Tensor& channel, const at::Tensor& patch,
                                   const at::Tensor& weight, const at::Tensor& bias,
                                   const std::optional<at::Tensor>& head_mask, double p,
                                   double value_scale, double patch_scale) {
  return FeatureFusionFunction::apply(channel, patch, weight, bias, head_mask, p, value_scale,
                                      patch_scale);
}

at::Tensor gelu_autograd(const at::Tensor& x) {
  return GeluFunction::apply(x);
}

std::tuple<at::Tensor, at::Tensor> parallel_adapter_autograd(
    const at::Tensor& x, const at::Tensor& down_weight, const at::Tensor& down_bias,
    const at::Tensor& up_weight, const at::Tensor& up_bias, double scale, bool residual,
    const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& key, double p) {
  const variable_list results = ParallelAdapterFunction::apply(
      x, down_weight, down_bias, up_weight, up_bias, scale, residual, mask, key, p);
  return {results[0], results[1]};
}

at::Tensor projection_energy_autograd(const at::Tensor& x, const at::Tensor& basis) {
  return ProjectionEnergyFunction::apply(x, basis);
}

detail::FourTensors residual_layer_norm_autograd(const at::Tensor& x,
                                                 const std::optional<at::Tensor>& update,
                                                 const at::Tensor& weight, const at::Tensor& bias,
                                                 double eps, std::optional<at::ScalarType> dtype) {
  const variable_list results =
      ResidualLayerNormFunction::apply(x, update, weight, bias, eps, dtype);
  return {results[0], results[1], results[2], results[3]};
}

at::Tensor section_cosine_autograd(const at::Tensor& x, const at::Tensor& prototypes,
                                   const at::Tensor& weights) {
  return SectionCosineFunction::apply(x, prototypes, weights);
}

at::Tensor signed_projection_autograd(const at::Tensor& x, const at::Tensor& direction) {
  return SignedProjectionFunction::apply(x, direction);
}

detail::FourTensors token_mix_prompts_autograd(const at::Tensor& x, const at::Tensor& weight,
                                               const at::Tensor& norm_weight,
                                               const at::Tensor& norm_bias, int64_t carried,
                                               double scale, double eps, bool insert) {
  const variable_list results = TokenMixPromptsFunction::apply(x, weight, norm_weight, norm_bias,
                                                               carried, scale, eps, insert);
  return {results[0], results[1], results[2], results[3]};
}

constexpr const char* kSteps[] = {"adam_step_", "sam_ascend_", "sam_step_", "sgd_step_"};

// What an operator's schema says that it changes.
std::vector<at::Tensor> changed_by(const c10::OperatorHandle& op, const c10::Stack& stack) {
  const auto& arguments = op.schema().arguments();
  std::vector<at::Tensor> changed;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].alias_info() && arguments[i].alias_info()->isWrite()) {
      const auto list = torch::jit::peek(stack, i, arguments.size()).toTensorVector();
      changed.insert(changed.end(), list.begin(), list.end());
    }
  }
  return changed;
}

std::string name_of(const c10::OperatorHandle& op) {
  return op.schema().name().substr(sizeof("ntkcl::") - 1);
}

// Steps of optimisers record no gradients.
void step_autograd(const c10::OperatorHandle& op, c10::Stack* stack) {
  for (const at::Tensor& tensor : changed_by(op, *stack)) {
    NTKCL_OP_CHECK(!(at::GradMode::is_enabled() && tensor.requires_grad() && tensor.grad_fn()),
                   name_of(op), "expected to change leaves of the autograd graph, got what ",
                   tensor.grad_fn()->name(), " made");
  }
  const at::AutoDispatchBelowAutograd guard;
  op.callBoxed(stack);
}

// What they change counts as changed, so that a graph that still needs the values before says so in
// its backward pass.
void step_in_place(const c10::OperatorHandle& op, c10::Stack* stack) {
  const std::vector<at::Tensor> changed = changed_by(op, *stack);
  for (const at::Tensor& tensor : changed) {
    NTKCL_OP_CHECK(!tensor.is_inference() || c10::InferenceMode::is_enabled(), name_of(op),
                   "expected tensors made outside of torch.inference_mode, or a step inside it");
  }
  {
    const AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(stack);
  }
  for (const at::Tensor& tensor : changed) {
    if (!tensor.is_inference()) {
      torch::autograd::impl::bump_version(tensor);
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(ntkcl, Autograd, m) {
  m.impl("attention", &attention_autograd);
  m.impl("bias_relu_dropout", &bias_relu_dropout_autograd);
  m.impl("composed_linear", &composed_linear_autograd);
  m.impl("dissimilarity", &dissimilarity_autograd);
  m.impl("feature_fusion", &feature_fusion_autograd);
  m.impl("gelu", &gelu_autograd);
  m.impl("parallel_adapter", &parallel_adapter_autograd);
  m.impl("projection_energy", &projection_energy_autograd);
  m.impl("residual_layer_norm", &residual_layer_norm_autograd);
  m.impl("section_cosine", &section_cosine_autograd);
  m.impl("signed_projection", &signed_projection_autograd);
  m.impl("token_mix_prompts", &token_mix_prompts_autograd);
  m.impl("float8_rows", torch::autograd::autogradNotImplementedFallback());
  for (const char* op : kSteps) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&step_autograd>());
  }
  // Second derivatives are an error when asked for, not silently zero.
  for (const char* op :
       {"attention_backward", "bias_relu_dropout_backward", "composed_linear_backward",
        "dissimilarity_backward", "feature_fusion_backward", "gelu_backward",
        "parallel_adapter_backward", "projection_energy_backward", "residual_layer_norm_backward",
        "section_cosine_backward", "signed_projection_backward", "token_mix_prompts_backward"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

TORCH_LIBRARY_IMPL(ntkcl, ADInplaceOrView, m) {
  for (const char* op : kSteps) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&step_in_place>());
  }
}

}  // namespace ntkcl::ops
