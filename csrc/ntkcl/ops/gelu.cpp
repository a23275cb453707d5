#include "ntkcl/ops/gelu.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "ntkcl/kernels/gelu_cpu.h"
#include "ntkcl/ops/checks.h"
#include "ntkcl/ops/element_type.h"
#include "ntkcl/ops/schema.h"

namespace ntkcl::ops {
namespace detail {

void check_gelu(const at::Tensor& x) {
  check_floating("gelu", "x", x);
}

void check_gelu_backward(const at::Tensor& grad, const at::Tensor& x) {
  const char* op = "gelu_backward";
  check_floating(op, "x", x);
  check_like(op, "grad", grad, "x", x);
  check_same_shape(op, "grad", grad, "x", x);
}

}  // namespace detail

namespace {

// Calls run(first, last) for parts of n elements, from several threads. Parts begin at multiples of
// 64, so that the scalar rest of a loop is always the last elements of all.
template <class Run>
void over_elements(int64_t n, const Run& run) {
  constexpr int64_t kPart = 64, kGrain = 8192 / kPart;
  at::parallel_for(0, (n + kPart - 1) / kPart, kGrain, [&](int64_t begin, int64_t end) {
    run(begin * kPart, std::min(end * kPart, n));
  });
}

at::Tensor gelu_meta(const at::Tensor& x) {
  detail::check_gelu(x);
  return at::empty_symint(x.sym_sizes(), x.options());
}

at::Tensor gelu_backward_meta(const at::Tensor& grad, const at::Tensor& x) {
  detail::check_gelu_backward(grad, x);
  return at::empty_symint(x.sym_sizes(), x.options());
}

at::Tensor gelu_cpu(const at::Tensor& x) {
  detail::check_gelu(x);
  at::Tensor y = at::empty(x.sizes(), x.options());
  const at::Tensor x_dense = x.contiguous();
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const kernels::Gelu<T> args{
        .x = elements<T>(x_dense), .y = mutable_elements<T>(y), .size = y.numel()};
    over_elements(args.size,
                  [&](int64_t first, int64_t last) { kernels::gelu_cpu(args, first, last); });
  });
  return y;
}

at::Tensor gelu_backward_cpu(const at::Tensor& grad, const at::Tensor& x) {
  detail::check_gelu_backward(grad, x);
  at::Tensor dx = at::empty(x.sizes(), x.options());
  const at::Tensor grad_dense = grad.contiguous(), x_dense = x.contiguous();
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const kernels::GeluBackward<T> args{.grad = elements<T>(grad_dense),
                                        .x = elements<T>(x_dense),
                                        .dx = mutable_elements<T>(dx),
                                        .size = dx.numel()};
    over_elements(args.size, [&](int64_t first, int64_t last) {
      kernels::gelu_backward_cpu(args, first, last);
    });
  });
  return dx;
}

}  // namespace

at::Tensor gelu(const at::Tensor& x) {
  static const auto op = find_operator<at::Tensor(const at::Tensor&)>("gelu");
  return op.call(x);
}

at::Tensor gelu_backward(const at::Tensor& grad, const at::Tensor& x) {
  static const auto op =
      find_operator<at::Tensor(const at::Tensor&, const at::Tensor&)>("gelu_backward");
  return op.call(grad, x);
}

TORCH_LIBRARY_IMPL(ntkcl, Meta, m) {
  m.impl("gelu", &gelu_meta);
  m.impl("gelu_backward", &gelu_backward_meta);
}

TORCH_LIBRARY_IMPL(ntkcl, CPU, m) {
  m.impl("gelu", &gelu_cpu);
  m.impl("gelu_backward", &gelu_backward_cpu);
}

}  // namespace ntkcl::ops
