#pragma once

#include "ntkcl/methods/peft.h"
#include "ntkcl/methods/softmax_head.h"

namespace ntkcl::methods::ranpac {

// Symbols: McDonnell et al., arXiv 2307.02251.
struct Options {
  bool first_session = true;
  PeftOptions peft;
  SoftmaxHeadOptions head;
  int64_t projection = 10000;
  double ridge = 0.0;

  template <class Visitor>
  void visit(Visitor& v) {
    v("first_session", first_session, anything(),
      "train PEFT modules in the first task, under a softmax head that is thrown away; else the "
      "backbone stays as it is");
    peft.visit(v);
    head.visit(v);
    v("projection", projection, at_least(1),
      "M, width of the random projection; the sums kept are M x M numbers of 8 bytes");
    v("ridge", ridge, at_least(0),
      "lambda; 0: chosen after each task, of 1e-8, 1e-7 .. 1e8, on a fifth of its features");
  }
};

}  // namespace ntkcl::methods::ranpac
