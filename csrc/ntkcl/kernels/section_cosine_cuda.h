#pragma once

#include <cuda_runtime_api.h>

#include "ntkcl/kernels/section_cosine.h"

// For T in float, double, BFloat16. rows * sections > 0.
namespace ntkcl::kernels {

template <class T>
cudaError_t normalize_sections_cuda(const NormalizeSections<T>& args, cudaStream_t stream);

template <class T>
cudaError_t project_sections_cuda(const ProjectSections<T>& args, cudaStream_t stream);

}  // namespace ntkcl::kernels
