#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace ntkcl::ops {

// The operator ntkcl::<name>, to be called through the dispatcher (autograd, autocast, fake
// tensors and devices then work). Keep it in a static: the look-up is slow.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("ntkcl::") + name).c_str(), "")
      .typed<Signature>();
}

}  // namespace ntkcl::ops
