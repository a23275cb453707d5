#pragma once

#include "ntkcl/kernels/section_cosine.h"

// For T in float, double, BFloat16; segments [first, last). The caller splits the work over
// threads; the result does not depend on how.
namespace ntkcl::kernels {

template <class T>
void normalize_sections_cpu(const NormalizeSections<T>& args, int64_t first, int64_t last);

template <class T>
void project_sections_cpu(const ProjectSections<T>& args, int64_t first, int64_t last);

}  // namespace ntkcl::kernels
