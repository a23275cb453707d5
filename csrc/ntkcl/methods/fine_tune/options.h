#pragma once

#include "ntkcl/methods/peft.h"
#include "ntkcl/methods/softmax_head.h"

namespace ntkcl::methods::fine_tune {

struct Options {
  PeftOptions peft;
  SoftmaxHeadOptions head;
  std::string loss = "seen";

  template <class Visitor>
  void visit(Visitor& v) {
    peft.visit(v);
    head.visit(v);
    v("loss", loss, one_of({"seen", "task"}),
      "cross-entropy over all classes seen, or over those of the task alone, which leaves the old "
      "classes' rows of the head as they are");
  }
};

// Its cross-entropy is over all classes that there are images of.
struct JointOptions {
  PeftOptions peft;
  SoftmaxHeadOptions head;

  template <class Visitor>
  void visit(Visitor& v) {
    peft.visit(v);
    head.visit(v);
  }
};

}  // namespace ntkcl::methods::fine_tune
