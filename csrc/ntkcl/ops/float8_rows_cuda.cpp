#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ntkcl/kernels/float8_rows_cuda.h"
#include "ntkcl/ops/element_type.h"
#include "ntkcl/ops/float8_rows.h"

namespace ntkcl::ops {
namespace detail {

bool cuda_multiplies_float8(at::Device device) {
  return at::cuda::getDeviceProperties(device.index())->major >= 9;
}

}  // namespace detail

namespace {

template <class T>
void quantise(const at::Tensor& x, const at::Tensor& values, const at::Tensor& scale) {
  const kernels::Float8Rows<T> args{.x = elements<T>(x),
                                    .values = mutable_elements<uint8_t>(values),
                                    .scale = mutable_elements<float>(scale),
                                    .rows = scale.numel(),
                                    .width = x.size(-1)};
  C10_CUDA_CHECK(kernels::float8_rows_cuda(args, c10::cuda::getCurrentCUDAStream()));
}

std::tuple<at::Tensor, at::Tensor> float8_rows_cuda(const at::Tensor& x) {
  detail::check_float8_rows(x);
  const c10::cuda::CUDAGuard guard(x.device());
  auto rows = x.sizes().vec();
  rows.back() = 1;
  const at::Tensor values = at::empty(x.sizes(), x.options().dtype(at::kFloat8_e4m3fn));
  const at::Tensor scale = at::empty(rows, x.options().dtype(at::kFloat));
  if (values.numel() == 0) {
    return {values, scale.fill_(1)};
  }
  const at::Tensor dense = x.contiguous();
  if (x.scalar_type() == at::kFloat) {
    quantise<float>(dense, values, scale);
  } else {
    quantise<kernels::BFloat16>(dense, values, scale);
  }
  return {values, scale};
}

}  // namespace

TORCH_LIBRARY_IMPL(ntkcl, CUDA, m) {
  m.impl("float8_rows", &float8_rows_cuda);
}

}  // namespace ntkcl::ops
