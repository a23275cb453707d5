#pragma once

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace ntkcl::train {

// What the loop tells whoever listens: a name and fields, in order.
using EventValue = std::variant<int64_t, double, std::string, std::vector<int64_t>,
                                std::vector<double>, std::map<std::string, double>>;

struct Event {
  std::string name;
  std::vector<std::pair<std::string, EventValue>> fields;
};

using EventFn = std::function<void(const Event&)>;

}  // namespace ntkcl::train
