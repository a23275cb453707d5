#include "ntkcl/kernels/section_cosine_cpu.h"

#include <algorithm>
#include <cmath>

#include "ntkcl/kernels/lanes.h"

// Two passes over each segment, the second one in cache: one read of x (and pulled), one write.
namespace ntkcl::kernels {
namespace {

// out = factor * (pulled - share * x)
template <class T>
NTKCL_INLINE void project_loop(const T* __restrict__ pulled, const T* __restrict__ x,
                               Compute<T> share, Compute<T> factor, T* __restrict__ out,
                               int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = store<T>(factor * (load(pulled[i]) - share * load(x[i])));
  }
}

// Templates cannot be multiversioned; these instances of the loops above are.
#define NTKCL_LOOPS(T)                                                              \
  NTKCL_MULTIVERSION Compute<T> dot(const T* a, const T* b, int64_t n) {            \
    return dot_loop<T>(a, b, n);                                                    \
  }                                                                                 \
  NTKCL_MULTIVERSION void scale(const T* x, Compute<T> factor, T* out, int64_t n) { \
    scale_loop<T>(x, factor, out, n);                                               \
  }                                                                                 \
  NTKCL_MULTIVERSION void project(const T* pulled, const T* x, Compute<T> share,    \
                                  Compute<T> factor, T* out, int64_t n) {           \
    project_loop<T>(pulled, x, share, factor, out, n);                              \
  }
NTKCL_LOOPS(float)
NTKCL_LOOPS(double)
NTKCL_LOOPS(BFloat16)
#undef NTKCL_LOOPS

}  // namespace

template <class T>
void normalize_sections_cpu(const NormalizeSections<T>& args, int64_t first, int64_t last) {
  using C = Compute<T>;
  for (int64_t segment = first; segment < last; ++segment) {
    const T* x = args.x + segment * args.width;
    const C norm = std::sqrt(dot(x, x, args.width));
    const C weight = args.weights == nullptr ? C{1} : load(args.weights[segment % args.sections]);
    // NaN stays NaN: the norm is the first operand.
    const C factor = weight / std::max(norm, static_cast<C>(kMinimumNorm));
    scale(x, factor, args.unit + segment * args.width, args.width);
  }
}

template <class T>
void project_sections_cpu(const ProjectSections<T>& args, int64_t first, int64_t last) {
  using C = Compute<T>;
  for (int64_t segment = first; segment < last; ++segment) {
    const T* x = args.x + segment * args.width;
    const T* pulled = args.pulled + segment * args.width;
    const C norm = std::sqrt(dot(x, x, args.width));
    const C length = std::max(norm, static_cast<C>(kMinimumNorm));
    const C along = dot(pulled, x, args.width) / length;
    args.along[segment] = along;
    const C share = norm < static_cast<C>(kMinimumNorm) ? C{0} : along / length;
    const C factor = load(args.weights[segment % args.sections]) / length;
    project(pulled, x, share, factor, args.dx + segment * args.width, args.width);
  }
}

#define NTKCL_INSTANTIATE(T)                                                           \
  template void normalize_sections_cpu(const NormalizeSections<T>&, int64_t, int64_t); \
  template void project_sections_cpu(const ProjectSections<T>&, int64_t, int64_t);
NTKCL_INSTANTIATE(float)
NTKCL_INSTANTIATE(double)
NTKCL_INSTANTIATE(BFloat16)
#undef NTKCL_INSTANTIATE

}  // namespace ntkcl::kernels
