#pragma once

#include <c10/core/Event.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "ntkcl/methods/method.h"

namespace ntkcl::train {

// Losses on their way to the host, in one copy. On CUDA nothing waits for them but values().
class PendingLosses {
 public:
  explicit PendingLosses(const methods::Losses& losses);

  std::map<std::string, double> values() const;

 private:
  std::vector<std::string> names_;
  at::Tensor host_;                   // (losses) float64
  std::optional<c10::Event> copied_;  // on CUDA
};

}  // namespace ntkcl::train
