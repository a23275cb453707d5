#include "ntkcl/ops/sam_step.h"

#include <torch/library.h>

#include <cmath>
#include <numeric>

#include "ntkcl/kernels/sam_step_cpu.h"
#include "ntkcl/ops/checks.h"
#include "ntkcl/ops/element_type.h"
#include "ntkcl/ops/schema.h"
#include "ntkcl/ops/tensor_lists.h"

namespace ntkcl::ops {
namespace detail {
namespace {

template <class Numbers>
void check_numbers(const char* op, const char* name, const Numbers& numbers,
                   at::TensorList parameters) {
  NTKCL_OP_CHECK(numbers.size() == parameters.size(), op, "expected ", parameters.size(),
                 " numbers in ", name, ", one for each parameter, got ", numbers.size());
}

void check_options(const char* op, const SamOptions& options, at::TensorList parameters) {
  check_numbers(op, "lr", options.lr, parameters);
  check_numbers(op, "weight_decay", options.weight_decay, parameters);
  check_numbers(op, "stacked_dims", options.stacked_dims, parameters);
  for (size_t i = 0; i < parameters.size(); ++i) {
    check_not_negative(op, "lr", options.lr[i]);
    check_not_negative(op, "weight_decay", options.weight_decay[i]);
    const int64_t dims = options.stacked_dims[i];
    NTKCL_OP_CHECK(0 <= dims && dims <= parameters[i].dim(), op, "expected stacked_dims[", i,
                   "] from 0 to ", parameters[i].dim(), ", got ", dims);
  }
  check_fraction(op, "momentum", options.momentum);
  NTKCL_OP_CHECK(!options.tau || *options.tau > 0, op, "expected tau > 0, got ", *options.tau);
}

}  // namespace

void check_sam_ascend(const SamLists& lists, double rho) {
  const char* op = "sam_ascend_";
  check_not_negative(op, "rho", rho);
  check_parameters(op, lists.parameters);
  check_beside(op, "saved", lists.saved, lists.parameters, /*dense=*/true);
  check_beside(op, "gradients", lists.first_gradients, lists.parameters);
}

void check_sam_step(const SamLists& lists, const SamOptions& options) {
  const char* op = "sam_step_";
  check_parameters(op, lists.parameters);
  check_beside(op, "momenta", lists.momenta, lists.parameters, /*dense=*/true);
  check_beside(op, "saved", lists.saved, lists.parameters, /*dense=*/true);
  if (options.tau || !lists.first_gradients.empty()) {
    check_beside(op, "first_gradients", lists.first_gradients, lists.parameters);
  }
  check_beside(op, "gradients", lists.gradients, lists.parameters);
  check_options(op, options, lists.parameters);
}

std::vector<int64_t> rows_of(at::TensorList parameters, at::IntArrayRef stacked_dims) {
  std::vector<int64_t> rows;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const at::IntArrayRef stack =
        parameters[i].sizes().slice(0, static_cast<size_t>(stacked_dims[i]));
    rows.push_back(c10::multiply_integers(stack));
  }
  return rows;
}

at::Tensor gammas_of(const at::Tensor& sums, double tau, bool together) {
  const at::Tensor all = together ? sums.sum(0, /*keepdim=*/true).expand_as(sums) : sums;
  const at::Tensor lengths = all.select(1, 1).sqrt() * all.select(1, 2).sqrt();
  const at::Tensor cosines = at::where(lengths.gt(0), all.select(1, 0) / lengths, 0.0);
  return sam_plus_gamma(cosines, tau);
}

template <class T>
SamTensors<T>::SamTensors(const SamLists& lists, const SamOptions* options)
    : first_gradients(contiguous(lists.first_gradients)), gradients(contiguous(lists.gradients)) {
  const auto rows = options ? rows_of(lists.parameters, options->stacked_dims)
                            : std::vector<int64_t>(lists.parameters.size(), 1);
  int64_t first_row = 0;
  for (size_t i = 0; i < lists.parameters.size(); ++i) {
    kernels::SamTensor<T> tensor{.parameter = mutable_elements<T>(lists.parameters[i]),
                                 .saved = mutable_elements<T>(lists.saved[i]),
                                 .size = lists.parameters[i].numel(),
                                 .rows = rows[i],
                                 .first_row = first_row};
    if (!first_gradients.empty() && (!options || options->tau)) {
      tensor.first_gradient = elements<T>(first_gradients[i]);
    }
    if (options) {
      tensor.momentum = mutable_elements<T>(lists.momenta[i]);
      tensor.gradient = elements<T>(gradients[i]);
      tensor.lr = static_cast<T>(options->lr[i]);
      tensor.decay = static_cast<T>(options->weight_decay[i]);
    }
    tensors.push_back(tensor);
    first_row += rows[i];
  }
}
template struct SamTensors<float>;
template struct SamTensors<double>;

}  // namespace detail

namespace {

using detail::SamLists;
using detail::SamOptions;

template <class T>
void ascend(const SamLists& lists, double rho) {
  const detail::SamTensors<T> arguments(lists);
  const std::vector<Part> parts = parts_of(lists.parameters);
  std::vector<double> squares(parts.size());
  for_each_part(parts, [&](const Part& part, size_t i) {
    const T* gradient = arguments.tensors[part.tensor].first_gradient;
    squares[i] = kernels::square_sum_cpu(gradient, part.first, part.last);
  });
  const double norm = std::sqrt(std::accumulate(squares.begin(), squares.end(), 0.0));
  const T scale = static_cast<T>(rho / (norm + 1e-16));
  for_each_part(parts, [&](const Part& part, size_t) {
    kernels::sam_ascend_cpu(arguments.tensors[part.tensor], scale, part.first, part.last);
  });
}

void sam_ascend_cpu(at::TensorList parameters, at::TensorList saved, at::TensorList gradients,
                    double rho) {
  const SamLists lists{.parameters = parameters, .saved = saved, .first_gradients = gradients};
  detail::check_sam_ascend(lists, rho);
  check_apart("sam_ascend_", {parameters, saved});
  with_parameter_type(parameters[0], [&](auto element) { ascend<decltype(element)>(lists, rho); });
}

template <class T>
at::Tensor step(const SamLists& lists, const SamOptions& options) {
  const std::vector<int64_t> rows = detail::rows_of(lists.parameters, options.stacked_dims);
  const int64_t count = std::accumulate(rows.begin(), rows.end(), int64_t{0});
  const detail::SamTensors<T> arguments(lists, &options);
  const std::vector<Part> parts = parts_of(lists.parameters, rows);
  const auto row_of = [&](const Part& part) {
    return static_cast<size_t>(arguments.tensors[part.tensor].first_row + part.row);
  };

  std::vector<kernels::Alignment> found(parts.size());
  for_each_part(parts, [&](const Part& part, size_t i) {
    found[i] = kernels::sam_momentum_cpu(arguments.tensors[part.tensor],
                                         static_cast<T>(options.momentum), part.first, part.last);
  });
  at::Tensor gammas = at::ones({count}, at::kDouble);
  if (options.tau) {
    const at::Tensor sums = at::zeros({count, 3}, at::kDouble);
    auto* of_row = static_cast<kernels::Alignment*>(sums.mutable_data_ptr());
    for (size_t i = 0; i < parts.size(); ++i) {
      of_row[row_of(parts[i])] += found[i];
    }
    gammas = detail::gammas_of(sums, *options.tau, options.together);
  }

  gammas = gammas.to(lists.parameters[0].scalar_type());
  const T* gamma = elements<T>(gammas);
  for_each_part(parts, [&](const Part& part, size_t) {
    kernels::sam_descend_cpu(arguments.tensors[part.tensor], gamma[row_of(part)], part.first,
                             part.last);
  });
  return gammas;
}

at::Tensor sam_step_cpu(at::TensorList parameters, at::TensorList momenta, at::TensorList saved,
                        at::TensorList first_gradients, at::TensorList gradients,
                        at::ArrayRef<double> lr, at::ArrayRef<double> weight_decay,
                        at::IntArrayRef stacked_dims, double momentum, std::optional<double> tau,
                        bool together) {
  const SamLists lists{parameters, momenta, saved, first_gradients, gradients};
  const SamOptions options{lr, weight_decay, stacked_dims, momentum, tau, together};
  detail::check_sam_step(lists, options);
  check_apart("sam_step_", {parameters, momenta});
  return with_parameter_type(parameters[0],
                             [&](auto element) { return step<decltype(element)>(lists, options); });
}

void sam_ascend_meta(at::TensorList parameters, at::TensorList saved, at::TensorList gradients,
                     double rho) {
  detail::check_sam_ascend({.parameters = parameters, .saved = saved, .first_gradients = gradients},
                           rho);
}

at::Tensor sam_step_meta(at::TensorList parameters, at::TensorList momenta, at::TensorList saved,
                         at::TensorList first_gradients, at::TensorList gradients,
                         at::ArrayRef<double> lr, at::ArrayRef<double> weight_decay,
                         at::IntArrayRef stacked_dims, double momentum, std::optional<double> tau,
                         bool together) {
  detail::check_sam_step({parameters, momenta, saved, first_gradients, gradients},
                         {lr, weight_decay, stacked_dims, momentum, tau, together});
  c10::SymInt rows = 0;
  for (size_t i = 0; i < parameters.size(); ++i) {
    c10::SymInt stacked = 1;
    for (int64_t d = 0; d < stacked_dims[i]; ++d) {
      stacked *= parameters[i].sym_size(d);
    }
    rows += stacked;
  }
  return at::empty_symint({rows}, parameters[0].options().requires_grad(false));
}

}  // namespace

at::Tensor sam_plus_gamma(const at::Tensor& cos, double tau) {
  return at::clamp(tau * -at::expm1(cos - 1), 0, 1);  // rounding can give cos > 1
}

void sam_ascend_(at::TensorList parameters, at::TensorList saved, at::TensorList gradients,
                 double rho) {
  static const auto op = find_operator<decltype(sam_ascend_cpu)>("sam_ascend_");
  op.call(parameters, saved, gradients, rho);
}

at::Tensor sam_step_(at::TensorList parameters, at::TensorList momenta, at::TensorList saved,
                     at::TensorList first_gradients, at::TensorList gradients,
                     at::ArrayRef<double> lr, at::ArrayRef<double> weight_decay,
                     at::IntArrayRef stacked_dims, double momentum, std::optional<double> tau,
                     bool together) {
  static const auto op = find_operator<decltype(sam_step_cpu)>("sam_step_");
  return op.call(parameters, momenta, saved, first_gradients, gradients, lr, weight_decay,
                 stacked_dims, momentum, tau, together);
}

TORCH_LIBRARY_IMPL(ntkcl, Meta, m) {
  m.impl("sam_ascend_", &sam_ascend_meta);
  m.impl("sam_step_", &sam_step_meta);
}

TORCH_LIBRARY_IMPL(ntkcl, CPU, m) {
  m.impl("sam_ascend_", &sam_ascend_cpu);
  m.impl("sam_step_", &sam_step_cpu);
}

}  // namespace ntkcl::ops
