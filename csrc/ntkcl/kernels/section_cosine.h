#pragma once

#include <cstdint>

#include "ntkcl/kernels/element.h"

// The two steps of the section-wise cosine that are not matrix products; see ops/section_cosine.h.
// A segment is one section of one row: `width` neighbouring elements. Segment i belongs to row
// i / sections and section i % sections.
namespace ntkcl::kernels {

constexpr double kMinimumNorm = 1e-12;  // shorter segments are divided by this, not by their norm

// unit = weight * x / max(|x|, kMinimumNorm), segment by segment.
template <class T>
struct NormalizeSections {
  const T* x = nullptr;        // (rows, sections, width)
  const T* weights = nullptr;  // (sections); null: all 1
  T* unit = nullptr;           // (rows, sections, width)
  int64_t rows = 0;
  int64_t sections = 0;
  int64_t width = 0;
};

// The gradient through the normalisation. With u = x / m, m = max(|x|, kMinimumNorm) and
// t = pulled . u per segment:
//   along = t,   dx = weight / m * (pulled - t u)   where |x| >= kMinimumNorm,
//                dx = weight / m * pulled           elsewhere.
template <class T>
struct ProjectSections {
  const T* pulled = nullptr;    // (rows, sections, width): gradient of weight * u
  const T* x = nullptr;         // (rows, sections, width)
  const T* weights = nullptr;   // (sections)
  T* dx = nullptr;              // (rows, sections, width)
  Compute<T>* along = nullptr;  // (rows, sections)
  int64_t rows = 0;
  int64_t sections = 0;
  int64_t width = 0;
};

}  // namespace ntkcl::kernels
