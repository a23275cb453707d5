#include "ntkcl/ops/section_cosine.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <algorithm>

#include "ntkcl/kernels/section_cosine_cpu.h"
#include "ntkcl/ops/checks.h"
#include "ntkcl/ops/element_type.h"
#include "ntkcl/ops/schema.h"

namespace ntkcl::ops {
namespace {

void check_operands(const char* op, const at::Tensor& x, const at::Tensor& prototypes,
                    const at::Tensor& weights) {
  check_floating(op, "x", x);
  NTKCL_OP_CHECK(x.dim() == 2, op, "expected x of shape (B, S*C), got ", x.sym_sizes());
  check_like(op, "prototypes", prototypes, "x", x);
  NTKCL_OP_CHECK(prototypes.dim() == 2 && prototypes.sym_size(1) == x.sym_size(1), op,
                 "expected prototypes of shape (n, ", x.sym_size(1), ") as x has ", x.sym_size(1),
                 " columns, got ", prototypes.sym_sizes());
  check_like(op, "weights", weights, "x", x);
  NTKCL_OP_CHECK(weights.dim() == 1 && weights.sym_size(0) >= 1, op,
                 "expected weights of shape (S), one per section, got ", weights.sym_sizes());
  NTKCL_OP_CHECK(x.sym_size(1) % weights.sym_size(0) == 0, op, "expected x with columns in ",
                 weights.sym_size(0), " sections of equal width, got ", x.sym_size(1), " columns");
}

void check_section_cosine_backward(const at::Tensor& grad, const at::Tensor& x,
                                   const at::Tensor& prototypes, const at::Tensor& weights) {
  const char* op = "section_cosine_backward";
  check_operands(op, x, prototypes, weights);
  check_like(op, "grad", grad, "x", x);
  NTKCL_OP_CHECK(grad.dim() == 2 && grad.sym_size(0) == x.sym_size(0) &&
                     grad.sym_size(1) == prototypes.sym_size(0),
                 op, "expected grad of shape (", x.sym_size(0), ", ", prototypes.sym_size(0),
                 "), got ", grad.sym_sizes());
}

at::Tensor section_cosine_meta(const at::Tensor& x, const at::Tensor& prototypes,
                               const at::Tensor& weights) {
  check_operands("section_cosine", x, prototypes, weights);
  return at::empty_symint({x.sym_size(0), prototypes.sym_size(0)}, x.options());
}

std::tuple<at::Tensor, at::Tensor> section_cosine_backward_meta(const at::Tensor& grad,
                                                                const at::Tensor& x,
                                                                const at::Tensor& prototypes,
                                                                const at::Tensor& weights) {
  check_section_cosine_backward(grad, x, prototypes, weights);
  return {at::empty_symint(x.sym_sizes(), x.options()),
          at::empty_symint(weights.sym_sizes(), weights.options())};
}

// The rows of x with each section normalised, times its weight where weights are defined.
at::Tensor normalized(const detail::SectionKernels& kernels, const at::Tensor& x,
                      const at::Tensor& weights, int64_t sections) {
  at::Tensor unit = at::empty(x.sizes(), x.options());
  if (unit.numel() > 0) {
    kernels.normalize(x.contiguous(), weights, unit, sections);
  }
  return unit;
}

// Segments per thread at least, so that a thread has about GRAIN_SIZE elements.
int64_t segment_grain(int64_t width) {
  return std::max<int64_t>(1, at::internal::GRAIN_SIZE / width);
}

void normalize_cpu(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& unit,
                   int64_t sections) {
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const kernels::NormalizeSections<T> args{
        .x = elements<T>(x),
        .weights = weights.defined() ? elements<T>(weights) : nullptr,
        .unit = mutable_elements<T>(unit),
        .rows = x.size(0),
        .sections = sections,
        .width = x.size(1) / sections};
    at::parallel_for(
        0, args.rows * sections, segment_grain(args.width),
        [&](int64_t first, int64_t last) { kernels::normalize_sections_cpu(args, first, last); });
  });
}

void project_cpu(const at::Tensor& pulled, const at::Tensor& x, const at::Tensor& weights,
                 const at::Tensor& dx, const at::Tensor& along) {
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const kernels::ProjectSections<T> args{.pulled = elements<T>(pulled),
                                           .x = elements<T>(x),
                                           .weights = elements<T>(weights),
                                           .dx = mutable_elements<T>(dx),
                                           .along = mutable_elements<kernels::Compute<T>>(along),
                                           .rows = x.size(0),
                                           .sections = weights.size(0),
                                           .width = x.size(1) / weights.size(0)};
    at::parallel_for(
        0, args.rows * args.sections, segment_grain(args.width),
        [&](int64_t first, int64_t last) { kernels::project_sections_cpu(args, first, last); });
  });
}

constexpr detail::SectionKernels kCpuKernels{&normalize_cpu, &project_cpu};

at::Tensor section_cosine_cpu(const at::Tensor& x, const at::Tensor& prototypes,
                              const at::Tensor& weights) {
  return detail::section_cosine(kCpuKernels, x, prototypes, weights);
}

std::tuple<at::Tensor, at::Tensor> section_cosine_backward_cpu(const at::Tensor& grad,
                                                               const at::Tensor& x,
                                                               const at::Tensor& prototypes,
                                                               const at::Tensor& weights) {
  return detail::section_cosine_backward(kCpuKernels, grad, x, prototypes, weights);
}

}  // namespace

namespace detail {

// The sum over sections of products of unit vectors is one product of whole rows.
at::Tensor section_cosine(const SectionKernels& kernels, const at::Tensor& x,
                          const at::Tensor& prototypes, const at::Tensor& weights) {
  check_operands("section_cosine", x, prototypes, weights);
  const int64_t sections = weights.size(0);
  const at::Tensor left = normalized(kernels, x, weights.contiguous(), sections);
  const at::Tensor right = normalized(kernels, prototypes, {}, sections);
  return at::mm(left, right.t());
}

std::tuple<at::Tensor, at::Tensor> section_cosine_backward(const SectionKernels& kernels,
                                                           const at::Tensor& grad,
                                                           const at::Tensor& x,
                                                           const at::Tensor& prototypes,
                                                           const at::Tensor& weights) {
  check_section_cosine_backward(grad, x, prototypes, weights);
  // A backward pass may run inside torch.autocast, which would change the product's type.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t sections = weights.size(0);
  const at::Tensor right = normalized(kernels, prototypes, {}, sections);
  const at::Tensor pulled = at::mm(grad, right);  // (B, S*C)
  const at::Tensor dx = at::empty(x.sizes(), x.options());
  const at::Tensor along =
      at::zeros({x.size(0), sections}, x.options().dtype(compute_type(x.scalar_type())));
  if (x.numel() > 0) {
    kernels.project(pulled, x.contiguous(), weights.contiguous(), dx, along);
  }
  return {dx, along.sum(0).to(weights.scalar_type())};
}

}  // namespace detail

at::Tensor section_cosine(const at::Tensor& x, const at::Tensor& prototypes,
                          const at::Tensor& weights) {
  static const auto op =
      find_operator<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>(
          "section_cosine");
  return op.call(x, prototypes, weights);
}

std::tuple<at::Tensor, at::Tensor> section_cosine_backward(const at::Tensor& grad,
                                                           const at::Tensor& x,
                                                           const at::Tensor& prototypes,
                                                           const at::Tensor& weights) {
  static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&)>(
      "section_cosine_backward");
  return op.call(grad, x, prototypes, weights);
}

TORCH_LIBRARY_IMPL(ntkcl, Meta, m) {
  m.impl("section_cosine", &section_cosine_meta);
  m.impl("section_cosine_backward", &section_cosine_backward_meta);
}

TORCH_LIBRARY_IMPL(ntkcl, CPU, m) {
  m.impl("section_cosine", &section_cosine_cpu);
  m.impl("section_cosine_backward", &section_cosine_backward_cpu);
}

}  // namespace ntkcl::ops
