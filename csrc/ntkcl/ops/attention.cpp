#include "ntkcl/ops/attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <cmath>

#include "ntkcl/kernels/attention_cpu.h"
#include "ntkcl/ops/checks.h"
#include "ntkcl/ops/element_type.h"
#include "ntkcl/ops/schema.h"

namespace ntkcl::ops {
namespace {

using Gate = std::optional<at::Tensor>;

void check_attention(const char* op, const at::Tensor& qkv, int64_t heads, const Gate& gate,
                     int64_t prompts) {
  check_floating(op, "qkv", qkv);
  NTKCL_OP_CHECK(heads >= 1, op, "expected at least 1 head, got ", heads);
  NTKCL_OP_CHECK(qkv.dim() == 3 && qkv.sym_size(2) > 0 && qkv.sym_size(2) % (3 * heads) == 0, op,
                 "expected qkv of shape (B, T, 3*C) with C a multiple of ", heads, " heads, got ",
                 qkv.sym_sizes());
  if (gate) {
    check_like(op, "gate", *gate, "qkv", qkv);
    NTKCL_OP_CHECK(gate->dim() == 1 && gate->sym_size(0) == heads, op, "expected gate of shape [",
                   heads, "], got ", gate->sym_sizes());
    NTKCL_OP_CHECK(prompts >= 1 && qkv.sym_size(1) > prompts, op, "expected 1 to ",
                   qkv.sym_size(1) - 1, " prompts beside a class token, got ", prompts);
  } else {
    NTKCL_OP_CHECK(prompts == 0, op, "expected a gate, as there are ", prompts, " prompts");
  }
}

void check_attention_backward(const at::Tensor& grad, const at::Tensor& qkv, int64_t heads,
                              const Gate& gate, int64_t prompts) {
  const char* op = "attention_backward";
  check_attention(op, qkv, heads, gate, prompts);
  check_like(op, "grad", grad, "qkv", qkv);
  const c10::SymDimVector shape{qkv.sym_size(0), qkv.sym_size(1), qkv.sym_size(2) / 3};
  NTKCL_OP_CHECK(grad.sym_sizes() == c10::SymIntArrayRef(shape), op, "expected grad of shape ",
                 c10::SymIntArrayRef(shape), ", got ", grad.sym_sizes());
}

at::Tensor attention_meta(const at::Tensor& qkv, int64_t heads, const Gate& gate, int64_t prompts) {
  check_attention("attention", qkv, heads, gate, prompts);
  return at::empty_symint({qkv.sym_size(0), qkv.sym_size(1), qkv.sym_size(2) / 3}, qkv.options());
}

std::tuple<at::Tensor, at::Tensor> attention_backward_meta(const at::Tensor& grad,
                                                           const at::Tensor& qkv, int64_t heads,
                                                           const Gate& gate, int64_t prompts) {
  check_attention_backward(grad, qkv, heads, gate, prompts);
  return {at::empty_symint(qkv.sym_sizes(), qkv.options()),
          at::empty({gate ? heads : 0}, qkv.options())};
}

// ---- CPU ----

kernels::AttentionSizes sizes_of(const at::Tensor& qkv, int64_t heads, int64_t prompts) {
  return {.batch = qkv.size(0),
          .heads = heads,
          .tokens = qkv.size(1),
          .prompts = prompts,
          .width = qkv.size(2) / (3 * heads)};
}

// Calls run(first, last, scratch) for ranges of the heads of all images, from several threads.
template <class Run>
void over_heads(const kernels::AttentionSizes& sizes, int64_t scratch_bytes, const Run& run) {
  at::parallel_for(0, sizes.batch * sizes.heads, 1, [&](int64_t first, int64_t last) {
    const at::Tensor scratch = at::empty({scratch_bytes}, at::kByte);
    run(first, last, reinterpret_cast<std::byte*>(mutable_elements<uint8_t>(scratch)));
  });
}

at::Tensor attention_cpu(const at::Tensor& given, int64_t heads, const Gate& gate,
                         int64_t prompts) {
  check_attention("attention", given, heads, gate, prompts);
  const at::Tensor qkv = given.contiguous();
  const at::Tensor out = at::empty({qkv.size(0), qkv.size(1), qkv.size(2) / 3}, qkv.options());
  if (out.numel() == 0) {
    return out;
  }
  const at::Tensor gate_dense = gate ? gate->contiguous() : at::Tensor();
  with_element_type(qkv.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const kernels::Attention<T> args{.sizes = sizes_of(qkv, heads, prompts),
                                     .qkv = elements<T>(qkv),
                                     .gate = gate ? elements<T>(gate_dense) : nullptr,
                                     .out = mutable_elements<T>(out)};
    over_heads(args.sizes, kernels::attention_scratch<T>(args.sizes),
               [&](int64_t first, int64_t last, std::byte* scratch) {
                 kernels::attention_cpu(args, first, last, scratch);
               });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> attention_backward_cpu(const at::Tensor& grad,
                                                          const at::Tensor& given, int64_t heads,
                                                          const Gate& gate, int64_t prompts) {
  check_attention_backward(grad, given, heads, gate, prompts);
  const at::Tensor qkv = given.contiguous(), grad_dense = grad.contiguous();
  const at::Tensor dqkv = at::empty(qkv.sizes(), qkv.options());
  if (qkv.numel() == 0) {
    return {dqkv, at::zeros({gate ? heads : 0}, qkv.options())};
  }
  const at::Tensor gate_dense = gate ? gate->contiguous() : at::Tensor();
  const at::Tensor dgate = at::empty({gate ? qkv.size(0) : 0, heads}, at::kDouble);
  with_element_type(qkv.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const kernels::AttentionBackward<T> args{
        .sizes = sizes_of(qkv, heads, prompts),
        .grad = elements<T>(grad_dense),
        .qkv = elements<T>(qkv),
        .gate = gate ? elements<T>(gate_dense) : nullptr,
        .dqkv = mutable_elements<T>(dqkv),
        .dgate = gate ? mutable_elements<double>(dgate) : nullptr};
    over_heads(args.sizes, kernels::attention_backward_scratch<T>(args.sizes),
               [&](int64_t first, int64_t last, std::byte* scratch) {
                 kernels::attention_backward_cpu(args, first, last, scratch);
               });
  });
  return {dqkv, gate ? dgate.sum(0).to(qkv.scalar_type()) : at::empty({0}, qkv.options())};
}

// ---- Torch's operators, for CUDA ----

// The packed projection by head, (B, H, n, d) each: queries of all tokens, keys and values of the
// prompts and of the other tokens. `scale` is in the queries.
struct Parts {
  at::Tensor queries, keys, values, prompt_keys, prompt_values;
  double scale;

  Parts(const at::Tensor& qkv, int64_t heads, int64_t prompts)
      : scale(1.0 / std::sqrt(static_cast<double>(qkv.size(2) / (3 * heads)))) {
    const at::Tensor x = qkv.unflatten(2, {3, heads, -1}).permute({2, 0, 3, 1, 4});
    queries = x[0] * scale;
    keys = without(x[1], prompts);
    values = without(x[2], prompts);
    if (prompts > 0) {
      prompt_keys = x[1].narrow(2, 1, prompts);
      prompt_values = x[2].narrow(2, 1, prompts);
    }
  }

  static at::Tensor without(const at::Tensor& x, int64_t prompts) {
    return prompts == 0
               ? x
               : at::cat({x.narrow(2, 0, 1), x.narrow(2, 1 + prompts, x.size(2) - 1 - prompts)}, 2);
  }

  // Of gradients of (other tokens, prompts): in the tokens' order.
  static at::Tensor together(const at::Tensor& others, const at::Tensor& prompts) {
    return prompts.defined()
               ? at::cat({others.narrow(2, 0, 1), prompts, others.narrow(2, 1, others.size(2) - 1)},
                         2)
               : others;
  }

  at::Tensor weights(const at::Tensor& of) const {
    return at::softmax(at::matmul(queries, of.transpose(2, 3)), -1);
  }
};

at::Tensor by_head(const at::Tensor& gate) {
  return gate.view({-1, 1, 1});
}

at::Tensor attention_of_torch(const at::Tensor& qkv, int64_t heads, const Gate& gate,
                              int64_t prompts) {
  check_attention("attention", qkv, heads, gate, prompts);
  const Parts parts(qkv, heads, prompts);
  at::Tensor mixed = at::matmul(parts.weights(parts.keys), parts.values);
  if (gate) {
    const at::Tensor of_prompts = at::matmul(parts.weights(parts.prompt_keys), parts.prompt_values);
    mixed = mixed + by_head(*gate) * of_prompts;
  }
  return mixed.transpose(1, 2).flatten(2).contiguous();
}

std::tuple<at::Tensor, at::Tensor> attention_backward_of_torch(const at::Tensor& grad,
                                                               const at::Tensor& qkv, int64_t heads,
                                                               const Gate& gate, int64_t prompts) {
  check_attention_backward(grad, qkv, heads, gate, prompts);
  // A backward pass may run inside torch.autocast, which would change the products' type.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Parts parts(qkv, heads, prompts);
  const at::Tensor dmixed = grad.unflatten(2, {heads, -1}).transpose(1, 2);  // (B, H, T, d)
  // Through one softmax: the gradients of keys, values and, times scale, queries.
  struct Gradients {
    at::Tensor keys, values, queries, weighted;
  };
  const auto through = [&](const at::Tensor& keys, const at::Tensor& values,
                           const at::Tensor& dout) -> Gradients {
    const at::Tensor weights = parts.weights(keys);
    const at::Tensor dweights = at::matmul(dout, values.transpose(2, 3));
    const at::Tensor dscores =
        at::_softmax_backward_data(dweights, weights, -1, weights.scalar_type());
    return {at::matmul(dscores.transpose(2, 3), parts.queries),
            at::matmul(weights.transpose(2, 3), dout), at::matmul(dscores, keys),
            dweights * weights};
  };
  Gradients all = through(parts.keys, parts.values, dmixed);
  at::Tensor dgate = at::empty({0}, qkv.options());
  if (gate) {
    // dgate = sum of dout v^T * weights, before the gate.
    const at::Tensor scale = by_head(*gate);
    const Gradients of_prompts = through(parts.prompt_keys, parts.prompt_values, dmixed);
    dgate = of_prompts.weighted.sum({0, 2, 3}, false, compute_type(qkv.scalar_type()))
                .to(qkv.scalar_type());
    all = {Parts::together(all.keys, scale * of_prompts.keys),
           Parts::together(all.values, scale * of_prompts.values),
           all.queries + scale * of_prompts.queries, at::Tensor()};
  }
  const at::Tensor dqkv = at::stack({all.queries * parts.scale, all.keys, all.values});
  return {dqkv.permute({1, 3, 0, 2, 4}).flatten(2).contiguous(), dgate};
}

}  // namespace

at::Tensor attention(const at::Tensor& qkv, int64_t heads, const Gate& gate, int64_t prompts) {
  static const auto op =
      find_operator<at::Tensor(const at::Tensor&, int64_t, const Gate&, int64_t)>("attention");
  return op.call(qkv, heads, gate, prompts);
}

std::tuple<at::Tensor, at::Tensor> attention_backward(const at::Tensor& grad, const at::Tensor& qkv,
                                                      int64_t heads, const Gate& gate,
                                                      int64_t prompts) {
  static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, int64_t, const Gate&, int64_t)>("attention_backward");
  return op.call(grad, qkv, heads, gate, prompts);
}

TORCH_LIBRARY_IMPL(ntkcl, Meta, m) {
  m.impl("attention", &attention_meta);
  m.impl("attention_backward", &attention_backward_meta);
}

TORCH_LIBRARY_IMPL(ntkcl, CPU, m) {
  m.impl("attention", &attention_cpu);
  m.impl("attention_backward", &attention_backward_cpu);
}

TORCH_LIBRARY_IMPL(ntkcl, CUDA, m) {
  m.impl("attention", &attention_of_torch);
  m.impl("attention_backward", &attention_backward_of_torch);
}

}  // namespace ntkcl::ops
