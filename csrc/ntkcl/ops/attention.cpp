#include "ntkcl/ops/attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <algorithm>
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

void check_attention_backward(const at::Tensor& grad, const at::Tensor& qkv,
                              const at::Tensor& weights, const at::Tensor& prompt_weights,
                              int64_t heads, const Gate& gate, int64_t prompts) {
  const char* op = "attention_backward";
  check_attention(op, qkv, heads, gate, prompts);
  const c10::SymInt batch = qkv.sym_size(0), tokens = qkv.sym_size(1);
  const auto check_shape = [&](const char* name, const at::Tensor& tensor,
                               const c10::SymDimVector& shape) {
    check_like(op, name, tensor, "qkv", qkv);
    NTKCL_OP_CHECK(tensor.sym_sizes() == c10::SymIntArrayRef(shape), op, "expected ", name,
                   " of shape ", c10::SymIntArrayRef(shape), ", got ", tensor.sym_sizes());
  };
  check_shape("grad", grad, {batch, tokens, qkv.sym_size(2) / 3});
  check_shape("weights", weights, {batch * heads, tokens, tokens - prompts});
  if (gate) {
    check_shape("prompt_weights", prompt_weights, {batch * heads, tokens, prompts});
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_meta(const at::Tensor& qkv, int64_t heads,
                                                              const Gate& gate, int64_t prompts) {
  check_attention("attention", qkv, heads, gate, prompts);
  const c10::SymInt batch = qkv.sym_size(0), tokens = qkv.sym_size(1);
  const auto made = [&](c10::SymDimVector shape) { return at::empty_symint(shape, qkv.options()); };
  return {made({batch, tokens, qkv.sym_size(2) / 3}),
          made({batch * heads, tokens, tokens - prompts}),
          gate ? made({batch * heads, tokens, prompts}) : made({0})};
}

std::tuple<at::Tensor, at::Tensor> attention_backward_meta(
    const at::Tensor& grad, const at::Tensor& qkv, const at::Tensor& weights,
    const at::Tensor& prompt_weights, int64_t heads, const Gate& gate, int64_t prompts) {
  check_attention_backward(grad, qkv, weights, prompt_weights, heads, gate, prompts);
  return {at::empty_symint(qkv.sym_sizes(), qkv.options()),
          at::empty({gate ? heads : 0}, qkv.options())};
}

// The rows that are attended to together: see kernels::HeadRows.
struct Rows {
  int64_t first, count;
};

// Sizes, and the steps that are not matrix products, on the CPU.
class CpuSteps {
 public:
  CpuSteps(const at::Tensor& qkv, int64_t heads, int64_t prompts)
      : layout_{.batch = qkv.size(0),
                .heads = heads,
                .tokens = qkv.size(1),
                .prompts = prompts,
                .width = qkv.size(2) / (3 * heads)} {}

  // Columns of packed tokens (B, T, n*C), from `column` on -> (B*H, rows, d), times scale.
  at::Tensor split(const at::Tensor& packed, int64_t column, Rows rows, double scale) const {
    const kernels::HeadRows layout = at_rows(packed, rows);
    const at::Tensor heads =
        at::empty({layout.batch * layout.heads, rows.count, layout.width}, packed.options());
    with_element_type(packed.scalar_type(), [&](auto element) {
      using T = decltype(element);
      const kernels::SplitHeads<T> args{.layout = layout,
                                        .packed = elements<T>(packed) + column,
                                        .heads = mutable_elements<T>(heads),
                                        .scale = static_cast<kernels::Compute<T>>(scale)};
      over_matrices(
          heads, [&](int64_t first, int64_t last) { kernels::split_heads_cpu(args, first, last); });
    });
    return heads;
  }

  // The other way round, into packed tokens.
  void merge(const at::Tensor& heads, Rows rows, double scale, const at::Tensor& packed,
             int64_t column) const {
    with_element_type(packed.scalar_type(), [&](auto element) {
      using T = decltype(element);
      const kernels::MergeHeads<T> args{.layout = at_rows(packed, rows),
                                        .heads = elements<T>(heads),
                                        .packed = mutable_elements<T>(packed) + column,
                                        .scale = static_cast<kernels::Compute<T>>(scale)};
      over_matrices(
          heads, [&](int64_t first, int64_t last) { kernels::merge_heads_cpu(args, first, last); });
    });
  }

  // May overwrite x.
  static at::Tensor softmax(const at::Tensor& x) {
    with_element_type(x.scalar_type(), [&](auto element) {
      using T = decltype(element);
      const kernels::Softmax<T> args{.x = mutable_elements<T>(x), .columns = x.size(-1)};
      over_rows(x, [&](int64_t first, int64_t last) { kernels::softmax_cpu(args, first, last); });
    });
    return x;
  }

  // The gradient of what y is the softmax of. May overwrite grad.
  static at::Tensor softmax_backward(const at::Tensor& y, const at::Tensor& grad) {
    with_element_type(y.scalar_type(), [&](auto element) {
      using T = decltype(element);
      const kernels::SoftmaxBackward<T> args{
          .y = elements<T>(y), .grad = mutable_elements<T>(grad), .columns = y.size(-1)};
      over_rows(y, [&](int64_t first, int64_t last) {
        kernels::softmax_backward_cpu(args, first, last);
      });
    });
    return grad;
  }

 private:
  kernels::HeadRows at_rows(const at::Tensor& packed, Rows rows) const {
    kernels::HeadRows layout = layout_;
    layout.stride = packed.size(2);
    layout.first = rows.first;
    layout.rows = rows.count;
    return layout;
  }

  template <class Function>
  static void over_matrices(const at::Tensor& heads, Function&& function) {
    at::parallel_for(0, heads.size(0), grain(heads.size(1) * heads.size(2)), function);
  }

  template <class Function>
  static void over_rows(const at::Tensor& x, Function&& function) {
    at::parallel_for(0, x.numel() / std::max<int64_t>(1, x.size(-1)), grain(x.size(-1)), function);
  }

  static int64_t grain(int64_t elements) {
    return std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, elements));
  }

  kernels::HeadRows layout_;
};

// The same of torch's operators, for the other devices.
class TorchSteps {
 public:
  TorchSteps(const at::Tensor& qkv, int64_t heads, int64_t prompts)
      : heads_(heads), prompts_(prompts), width_(qkv.size(2) / 3) {}

  at::Tensor split(const at::Tensor& packed, int64_t column, Rows rows, double scale) const {
    return (rows_of(packed, column, rows) * scale).transpose(1, 2).flatten(0, 1);
  }

  void merge(const at::Tensor& heads, Rows rows, double scale, const at::Tensor& packed,
             int64_t column) const {
    const at::Tensor parts =
        (heads * scale).view({-1, heads_, rows.count, width_ / heads_}).transpose(1, 2);
    int64_t done = 0;
    for (const at::Tensor& to : views_of(packed, column, rows)) {
      to.copy_(parts.narrow(1, done, to.size(1)));
      done += to.size(1);
    }
  }

  static at::Tensor softmax(const at::Tensor& x) { return at::softmax(x, -1); }

  static at::Tensor softmax_backward(const at::Tensor& y, const at::Tensor& grad) {
    return at::_softmax_backward_data(grad, y, -1, y.scalar_type());
  }

 private:
  at::Tensor rows_of(const at::Tensor& packed, int64_t column, Rows rows) const {
    return at::cat(views_of(packed, column, rows), 1);
  }

  // (B, n, H, d) views that make up the rows, in their order.
  std::vector<at::Tensor> views_of(const at::Tensor& packed, int64_t column, Rows rows) const {
    const at::Tensor x = packed.narrow(2, column, width_).unflatten(2, {heads_, -1});
    const int64_t patches = x.size(1) - prompts_ - 1;
    const at::Tensor prompts = x.narrow(1, 1, prompts_);
    if (rows.first > 0) {
      return {prompts};
    }
    std::vector<at::Tensor> views{x.narrow(1, 0, 1), x.narrow(1, 1 + prompts_, patches)};
    if (rows.count > 1 + patches) {
      views.push_back(prompts);
    }
    return views;
  }

  int64_t heads_, prompts_, width_;
};

// What both directions take apart.
struct Parts {
  int64_t width, tokens, prompts;  // C, T, P
  double scale;                    // 1 / sqrt(d)
  Rows all, others, prompt_rows;   // others: all but prompts

  Parts(const at::Tensor& qkv, int64_t heads, int64_t p)
      : width(qkv.size(2) / 3),
        tokens(qkv.size(1)),
        prompts(p),
        scale(1.0 / std::sqrt(static_cast<double>(width / heads))),
        all{0, tokens},
        others{0, tokens - p},
        prompt_rows{tokens - p, p} {}
};

// (B*H, T, n), each head's matrices times its gate.
at::Tensor gated(const at::Tensor& x, const at::Tensor& gate) {
  const int64_t heads = gate.size(0);
  return (x.view({-1, heads, x.size(1), x.size(2)}) * gate.view({heads, 1, 1})).view(x.sizes());
}

template <class Steps>
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_with(const at::Tensor& given,
                                                              int64_t heads, const Gate& gate,
                                                              int64_t prompts) {
  check_attention("attention", given, heads, gate, prompts);
  if (given.numel() == 0) {
    return attention_meta(given, heads, gate, prompts);
  }
  const at::Tensor qkv = given.contiguous();
  const Steps steps(qkv, heads, prompts);
  const Parts parts(qkv, heads, prompts);
  const int64_t c = parts.width;
  const at::Tensor query = steps.split(qkv, 0, parts.all, parts.scale);
  const auto weights_of = [&](Rows rows) {
    const at::Tensor key = steps.split(qkv, c, rows, 1);
    return Steps::softmax(at::bmm(query, key.transpose(1, 2)).contiguous());
  };
  const at::Tensor weights = weights_of(parts.others);
  at::Tensor mixed = at::bmm(weights, steps.split(qkv, 2 * c, parts.others, 1));
  at::Tensor prompt_weights = at::empty({0}, qkv.options());
  if (gate) {
    prompt_weights = weights_of(parts.prompt_rows);
    mixed += at::bmm(gated(prompt_weights, *gate), steps.split(qkv, 2 * c, parts.prompt_rows, 1));
  }
  const at::Tensor out = at::empty({qkv.size(0), parts.tokens, c}, qkv.options());
  steps.merge(mixed.contiguous(), parts.all, 1, out, 0);
  return {out, weights, prompt_weights};
}

template <class Steps>
std::tuple<at::Tensor, at::Tensor> attention_backward_with(
    const at::Tensor& grad, const at::Tensor& given, const at::Tensor& weights,
    const at::Tensor& prompt_weights, int64_t heads, const Gate& gate, int64_t prompts) {
  check_attention_backward(grad, given, weights, prompt_weights, heads, gate, prompts);
  // A backward pass may run inside torch.autocast, which would change the products' type.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (given.numel() == 0) {
    return {at::empty(given.sizes(), given.options()),
            at::zeros({gate ? heads : 0}, given.options())};
  }
  const at::Tensor qkv = given.contiguous();
  const Steps steps(qkv, heads, prompts);
  const Parts parts(qkv, heads, prompts);
  const int64_t c = parts.width;
  const at::Tensor query = steps.split(qkv, 0, parts.all, parts.scale);
  const at::Tensor dmixed = steps.split(grad.contiguous(), 0, parts.all, 1);
  const at::Tensor dqkv = at::empty(qkv.sizes(), qkv.options());
  // dkey and dvalue of some rows, given d(weights); returns their share of dquery.
  const auto backward = [&](Rows rows, const at::Tensor& shares, const at::Tensor& softmax,
                            const at::Tensor& dsoftmax) {
    steps.merge(at::bmm(shares.transpose(1, 2), dmixed).contiguous(), rows, 1, dqkv, 2 * c);
    const at::Tensor dscores = Steps::softmax_backward(softmax, dsoftmax);
    // query holds the scale, so dkey has it too.
    steps.merge(at::bmm(dscores.transpose(1, 2), query).contiguous(), rows, 1, dqkv, c);
    return at::bmm(dscores, steps.split(qkv, c, rows, 1));
  };
  const auto pulled = [&](Rows rows) {
    return at::bmm(dmixed, steps.split(qkv, 2 * c, rows, 1).transpose(1, 2)).contiguous();
  };
  const at::Tensor dense = weights.contiguous();
  at::Tensor dquery = backward(parts.others, dense, dense, pulled(parts.others));
  at::Tensor dgate = at::empty({0}, qkv.options());
  if (gate) {
    const at::Tensor softmax = prompt_weights.contiguous();
    const at::Tensor ungated = pulled(parts.prompt_rows);
    dgate = (ungated * softmax)
                .view({-1, heads, parts.tokens, parts.prompts})
                .sum({0, 2, 3}, false, compute_type(qkv.scalar_type()))
                .to(qkv.scalar_type());
    dquery += backward(parts.prompt_rows, gated(softmax, *gate), softmax, gated(ungated, *gate));
  }
  steps.merge(dquery.contiguous(), parts.all, parts.scale, dqkv, 0);
  return {dqkv, dgate};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention(const at::Tensor& qkv, int64_t heads,
                                                         const Gate& gate, int64_t prompts) {
  static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, int64_t, const Gate&, int64_t)>("attention");
  return op.call(qkv, heads, gate, prompts);
}

std::tuple<at::Tensor, at::Tensor> attention_backward(const at::Tensor& grad, const at::Tensor& qkv,
                                                      const at::Tensor& weights,
                                                      const at::Tensor& prompt_weights,
                                                      int64_t heads, const Gate& gate,
                                                      int64_t prompts) {
  static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
      const Gate&, int64_t)>("attention_backward");
  return op.call(grad, qkv, weights, prompt_weights, heads, gate, prompts);
}

TORCH_LIBRARY_IMPL(ntkcl, Meta, m) {
  m.impl("attention", &attention_meta);
  m.impl("attention_backward", &attention_backward_meta);
}

TORCH_LIBRARY_IMPL(ntkcl, CPU, m) {
  m.impl("attention", &attention_with<CpuSteps>);
  m.impl("attention_backward", &attention_backward_with<CpuSteps>);
}

TORCH_LIBRARY_IMPL(ntkcl, CUDA, m) {
  m.impl("attention", &attention_with<TorchSteps>);
  m.impl("attention_backward", &attention_backward_with<TorchSteps>);
}

}  // namespace ntkcl::ops
