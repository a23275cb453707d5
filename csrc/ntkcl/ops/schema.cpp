#include <torch/library.h>

// All operators of the library. A new one, `op`, is written in these steps:
//
//   1. here               A line per operator: op and op_backward. Pure functions: no argument is
//                         changed or returned, but by the steps of optimisers, whose names end
//                         with an underscore and which have no backward.
//   2. kernels/op.h       Plain structs of arguments (pointers, sizes). op_cpu.{h,cpp}: loops over
//                         a range, NTKCL_MULTIVERSION. op_cuda.h, op.cu: launch functions that
//                         return what launch() does. No torch header, no allocation. A case in
//                         tests/cpp/cuda_on_host.
//   3. ops/op.h           The C++ function, which goes through the dispatcher. Its comment is the
//                         definition: shapes, types, gradient, errors, source.
//   4. ops/op.cpp         Argument checks (by sym_sizes, as Meta calls them too), Meta, CPU
//                         (contiguous inputs, at::parallel_for), public functions, registration.
//   5. ops/op_cuda.cpp    The same for CUDA: checks, device guard, return on zero size, launch on
//                         the current stream, C10_CUDA_CHECK. The host never waits for the device.
//   6. ops/autograd.cpp   The autograd function, in one file for all as its header costs 10 s.
//                         ops/autocast.cpp: what torch.autocast does to the arguments.
//   7. ops/cuda_stub.cpp  The name, so that builds without CUDA give a clear error. An operator
//                         made of torch's own, and of others of these, skips 2, 5 and 7
//                         (parallel_adapter).
//   8. python/ntkcl/ops.py, a sample in tests/python/test_ops.py, a case in benchmarks/ops.py;
//      python/ntkcl/portable.py, if models score with it.
//
// Types: float32, float64, bfloat16 (computed with as float32; not in steps of optimisers).
// Non-contiguous inputs are copied, but what is changed.
// Random numbers: a key tensor, never a generator, so that all devices draw the same.
TORCH_LIBRARY(ntkcl, m) {
  m.def(
      "adam_step_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] means,"
      " Tensor(c!)[] squares, Tensor steps, Tensor?[] anchors, Tensor(d!)[] averages, float lr,"
      " float beta1, float beta2, float eps, float weight_decay, bool decoupled,"
      " float anchor_weight, float average_decay) -> Tensor");
  m.def("attention(Tensor qkv, int heads, Tensor? gate, int prompts) -> Tensor");
  m.def(
      "attention_backward(Tensor grad, Tensor qkv, int heads, Tensor? gate, int prompts)"
      " -> (Tensor, Tensor)");
  m.def("bias_relu_dropout(Tensor x, Tensor bias, Tensor? mask, Tensor? key, float p) -> Tensor");
  m.def(
      "bias_relu_dropout_backward(Tensor grad, Tensor y, float p, int groups=-1)"
      " -> (Tensor, Tensor)");
  m.def(
      "composed_linear(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up,"
      " float[] scale, Tensor? old_down=None, Tensor? old_up=None, Tensor? omega=None,"
      " float[] omega_scale=[], bool composed=False, Tensor? probe=None) -> Tensor");
  m.def(
      "composed_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor down, Tensor up,"
      " float[] scale, Tensor? old_down, Tensor? old_up, Tensor? omega, float[] omega_scale,"
      " bool[7] wanted, bool entries=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "dissimilarity(Tensor features, Tensor labels, Tensor old, Tensor old_labels, str kind,"
      " float temperature) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("dissimilarity_backward(Tensor grad, Tensor unit, Tensor scale, Tensor pull) -> Tensor");
  m.def(
      "feature_fusion(Tensor channel, Tensor patch, Tensor weight, Tensor bias,"
      " Tensor? head_mask=None, float p=0.0, float value_scale=0.5, float patch_scale=0.1)"
      " -> Tensor");
  m.def(
      "feature_fusion_backward(Tensor grad, Tensor channel, Tensor weight, Tensor? head_mask,"
      " float p, float value_scale, float patch_scale, bool[4] wanted)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("float8_rows(Tensor x) -> (Tensor, Tensor)");
  m.def("gelu(Tensor x) -> Tensor");
  m.def("gelu_backward(Tensor grad, Tensor x) -> Tensor");
  m.def(
      "parallel_adapter(Tensor x, Tensor down_weight, Tensor down_bias, Tensor up_weight,"
      " Tensor up_bias, float scale=1.0, bool residual=False, Tensor? mask=None, Tensor? key=None,"
      " float p=0.0) -> (Tensor, Tensor)");
  m.def(
      "parallel_adapter_backward(Tensor grad, Tensor x, Tensor inner, Tensor down_weight,"
      " Tensor up_weight, float scale, bool residual, float p, bool[5] wanted)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("philox_keep_mask(Tensor key, SymInt[] size, float p) -> Tensor");
  m.def("projection_energy(Tensor x, Tensor basis) -> Tensor");
  m.def(
      "projection_energy_backward(Tensor grad, Tensor x, Tensor basis, bool[2] wanted)"
      " -> (Tensor, Tensor)");
  m.def(
      "residual_layer_norm(Tensor x, Tensor? update, Tensor weight, Tensor bias, float eps,"
      " ScalarType? dtype=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "residual_layer_norm_backward(Tensor grad, Tensor? sum_grad, Tensor sum, Tensor mean,"
      " Tensor scale, Tensor weight, ScalarType? update_dtype, bool affine)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sam_ascend_(Tensor(a!)[] parameters, Tensor(b!)[] saved, Tensor[] gradients, float rho) -> "
      "()");
  m.def(
      "sam_step_(Tensor(a!)[] parameters, Tensor(b!)[] momenta, Tensor[] saved,"
      " Tensor[] first_gradients, Tensor[] gradients, float[] lr, float[] weight_decay,"
      " int[] stacked_dims, float momentum, float? tau, bool together) -> Tensor");
  m.def("section_cosine(Tensor x, Tensor prototypes, Tensor weights) -> Tensor");
  m.def(
      "section_cosine_backward(Tensor grad, Tensor x, Tensor prototypes, Tensor weights)"
      " -> (Tensor, Tensor)");
  m.def(
      "sgd_step_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] momenta,"
      " Tensor?[] anchors, Tensor(c!)[] averages, float lr, float momentum, float weight_decay,"
      " float anchor_weight, float average_decay) -> Tensor");
  m.def("signed_projection(Tensor x, Tensor direction) -> Tensor");
  m.def(
      "signed_projection_backward(Tensor grad, Tensor x, Tensor direction, bool[2] wanted)"
      " -> (Tensor, Tensor)");
  m.def(
      "token_mix_prompts(Tensor x, Tensor weight, Tensor norm_weight, Tensor norm_bias,"
      " int carried=0, float scale=1.0, float eps=1e-06, bool insert=True)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "token_mix_prompts_backward(Tensor grad, Tensor? x_grad, Tensor x, Tensor mixed, Tensor mean,"
      " Tensor norm_scale, Tensor weight, Tensor norm_weight, int carried, float scale,"
      " bool insert, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)");
}
