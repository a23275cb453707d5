#pragma once

#include "ntkcl/methods/softmax_head.h"

namespace ntkcl::methods::ease {

// Symbols: Zhou et al., arXiv 2403.12030.
struct Options {
  int64_t rank = 64;
  double scale = 0.1;
  SoftmaxHeadOptions head;
  double alpha = 0.1;

  template <class Visitor>
  void visit(Visitor& v) {
    v("rank", rank, at_least(1), "r, bottleneck of the adapters");
    v("scale", scale, anything(), "s of the adapters' residual");
    head.visit(v);
    v("alpha", alpha, at_least(0),
      "weight of a class's cosines in the subspaces of other tasks than its own");
  }
};

}  // namespace ntkcl::methods::ease
