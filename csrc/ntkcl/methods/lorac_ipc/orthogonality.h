#pragma once

#include <ATen/core/Tensor.h>

namespace ntkcl::methods::lorac_ipc {

// The orthogonality penalty of LoRAC, || Q^T Q - I ||_F with Q = [A_0 ... A_t], for the matrices
// of one type (arXiv 2504.13407; specification section 3). The earlier A are constants of a task,
// so their share is computed once:
//
//   value = sqrt(K + 2 |X|^2 + |G|^2),   K = |O^T O - I|^2, X = O^T A_t, G = A_t^T A_t - I
class Orthogonality {
 public:
  // old: (L, in, t*r), the columns of A_0 ... A_{t-1} side by side for each block; t*r may be 0.
  explicit Orthogonality(at::Tensor old);

  struct Result {
    at::Tensor values;    // (L)
    at::Tensor gradient;  // (L, in, r) of values.sum(); 0 where the value is 0
  };
  // current: A_t (L, in, r).
  Result operator()(const at::Tensor& current) const;

 private:
  at::Tensor old_, among_old_;  // O, K (L)
};

}  // namespace ntkcl::methods::lorac_ipc
