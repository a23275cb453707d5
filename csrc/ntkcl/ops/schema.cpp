#include <torch/library.h>

// All operators of the library. A new one, `op`, is written in these steps:
//
//   1. here               A line per operator: op and op_backward. Pure functions: no argument is
//                         changed or returned.
//   2. kernels/op.h       Plain structs of arguments (pointers, sizes). op_cpu.{h,cpp}: loops over
//                         a range, NTKCL_MULTIVERSION. op_cuda.h, op.cu: launch functions that
//                         return cudaGetLastError(). No torch header, no allocation.
//   3. ops/op.h           The C++ function, which goes through the dispatcher. Its comment is the
//                         definition: shapes, types, gradient, errors, source.
//   4. ops/op.cpp         Argument checks (by sym_sizes, as Meta calls them too), Meta, CPU
//                         (contiguous inputs, at::parallel_for), public functions, registration.
//   5. ops/op_cuda.cpp    The same for CUDA: checks, device guard, return on zero size, launch on
//                         the current stream, C10_CUDA_CHECK. The host never waits for the device.
//   6. ops/autograd.cpp   The autograd function, in one file for all as its header costs 10 s.
//                         ops/autocast.cpp: what torch.autocast does to the arguments.
//   7. ops/cuda_stub.cpp  The name, so that builds without CUDA give a clear error. An operator
//                         made of torch's own skips 2, 5 and 7 (composed_linear; CUDA attention).
//   8. python/ntkcl/ops.py, a sample in tests/python/test_ops.py, a case in benchmarks/ops.py.
//
// Types: float32, float64, bfloat16 (computed with as float32). Non-contiguous inputs are copied.
// Random numbers: a key tensor, never a generator, so that all devices draw the same.
TORCH_LIBRARY(ntkcl, m) {
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
  m.def("gelu(Tensor x) -> Tensor");
  m.def("gelu_backward(Tensor grad, Tensor x) -> Tensor");
  m.def("philox_keep_mask(Tensor key, SymInt[] size, float p) -> Tensor");
  m.def(
      "residual_layer_norm(Tensor x, Tensor? update, Tensor weight, Tensor bias, float eps,"
      " ScalarType? dtype=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "residual_layer_norm_backward(Tensor grad, Tensor? sum_grad, Tensor sum, Tensor mean,"
      " Tensor scale, Tensor weight, ScalarType? update_dtype, bool affine)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("section_cosine(Tensor x, Tensor prototypes, Tensor weights) -> Tensor");
  m.def(
      "section_cosine_backward(Tensor grad, Tensor x, Tensor prototypes, Tensor weights)"
      " -> (Tensor, Tensor)");
}
