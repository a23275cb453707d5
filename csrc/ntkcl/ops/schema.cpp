#include <torch/library.h>

// All operators of the library. A new one, `op`, is written in these steps:
//
//   1. here               a line per operator: op and op_backward. Pure functions: no argument is
//                         changed or returned.
//   2. kernels/op.h       plain structs of arguments (pointers, sizes); op_cpu.{h,cpp}: loops over
//                         a range, NTKCL_MULTIVERSION; op_cuda.h, op.cu: launch functions that
//                         return cudaGetLastError(). No torch header, no allocation.
//   3. ops/op.h           the C++ function, which goes through the dispatcher: its comment is the
//                         definition (shapes, types, gradient, errors, source).
//   4. ops/op.cpp         argument checks (with sym_sizes: Meta calls them too), Meta, CPU
//   (contiguous
//                         inputs, at::parallel_for), the public functions, registration.
//   5. ops/op_cuda.cpp    the same for CUDA: checks, device guard, zero-size return, stream,
//   launch,
//                         C10_CUDA_CHECK. The host never waits for the device.
//   6. ops/autograd.cpp   the autograd function. All are in one file because its header costs 10 s.
//   7. ops/cuda_stub.cpp  the name, so that builds without CUDA give a clear error.
//   8. python/ntkcl/ops.py, tests/python/test_ops.py, benchmarks/ops.py.
//
// Types: float32, float64 and bfloat16 (computed with as float32). Non-contiguous inputs are
// copied. Random numbers: a key tensor, never a generator, so that all devices draw the same.
TORCH_LIBRARY(ntkcl, m) {
  m.def("bias_relu_dropout(Tensor x, Tensor bias, Tensor? mask, Tensor? key, float p) -> Tensor");
  m.def("bias_relu_dropout_backward(Tensor grad, Tensor y, float p) -> (Tensor, Tensor)");
  m.def("philox_keep_mask(Tensor key, SymInt[] size, float p) -> Tensor");
  m.def("section_cosine(Tensor x, Tensor prototypes, Tensor weights) -> Tensor");
  m.def(
      "section_cosine_backward(Tensor grad, Tensor x, Tensor prototypes, Tensor weights)"
      " -> (Tensor, Tensor)");
}
