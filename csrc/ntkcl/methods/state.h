#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <string>

// The state of what learns - methods, optimisers, evaluations - as tensors by name.
namespace ntkcl::methods {

// Called with every tensor that a checkpoint must hold. A tensor of a list is a view: copy into it.
using StateVisitor = std::function<void(const std::string& name, at::Tensor& tensor)>;
// Whoever has a state: calls the visitor with each of its tensors.
using VisitFn = std::function<void(const StateVisitor& visitor)>;
using State = std::map<std::string, at::Tensor>;

// Of a method, an optimiser, a loop.
template <class Learner>
VisitFn visit_of(Learner& learner) {
  return [&learner](const StateVisitor& visitor) { learner.visit_state(visitor); };
}

// Copies of all tensors.
State copy_state(const VisitFn& visit);

struct LoadOptions {
  bool whole = true;        // a tensor that is missing is an error
  bool same_types = true;   // so is one of another type; else it is converted
  bool same_sizes = false;  // so is one of another size; else it takes the place of the old one
};
// Copies `state` into the tensors. ValueError for unknown names and for NaN, before anything is
// changed.
void load_state(const VisitFn& visit, const State& state, const LoadOptions& options);

}  // namespace ntkcl::methods
