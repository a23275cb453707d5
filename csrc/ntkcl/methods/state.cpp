#include "ntkcl/methods/state.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <set>

#include "ntkcl/core/error.h"

namespace ntkcl::methods {
namespace {

// What is there and what is given fit each other.
void check(const State& known, const State& given, const LoadOptions& options) {
  for (const auto& [name, tensor] : given) {
    const auto found = known.find(name);
    NTKCL_CHECK(found != known.end(), "state", "unknown tensor '", name.substr(0, 100), "'");
    NTKCL_CHECK(!options.same_sizes || found->second.sizes() == tensor.sizes(), "state", name,
                ": expected ", found->second.sizes(), ", got ", tensor.sizes());
    const auto expected = found->second.scalar_type(), type = tensor.scalar_type();
    const bool converts = at::isFloatingType(expected) == at::isFloatingType(type);
    NTKCL_CHECK(expected == type || (converts && !options.same_types), "state", name, ": expected ",
                expected, ", got ", type);
    NTKCL_CHECK(!tensor.isnan().any().item<bool>(), "state", name, ": expected numbers, got NaN");
  }
  for (const auto& [name, tensor] : known) {
    NTKCL_CHECK(!options.whole || given.count(name), "state", "expected a tensor '", name,
                "', but it is missing");
  }
}

}  // namespace

State copy_state(const VisitFn& visit) {
  State state;
  visit([&](const std::string& name, at::Tensor& tensor) {
    state[name] = tensor.detach().clone(at::MemoryFormat::Contiguous);
  });
  return state;
}

void load_state(const VisitFn& visit, const State& state, const LoadOptions& options) {
  State known;
  std::set<const void*> places;
  visit([&](const std::string& name, at::Tensor& tensor) {
    known[name] = tensor;
    // Two names of one tensor would be loaded over each other.
    NTKCL_ASSERT(tensor.numel() == 0 || places.insert(tensor.const_data_ptr()).second);
  });
  check(known, state, options);
  const at::NoGradGuard no_grad;
  visit([&](const std::string& name, at::Tensor& tensor) {
    const auto found = state.find(name);
    if (found == state.end()) {
      return;
    }
    const at::Tensor& value = found->second;
    if (tensor.sizes() == value.sizes()) {
      tensor.copy_(value);
    } else {
      tensor = value.to(tensor.options(), /*non_blocking=*/false, /*copy=*/true);
    }
  });
}

}  // namespace ntkcl::methods
