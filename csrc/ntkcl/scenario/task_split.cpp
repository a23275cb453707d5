#include "ntkcl/scenario/task_split.h"

#include <algorithm>

#include "ntkcl/core/error.h"

namespace ntkcl::scenario {

std::vector<int64_t> split_classes(int64_t n_classes, int64_t initial, int64_t increment) {
  constexpr const char* kWhere = "split_classes";
  NTKCL_CHECK(n_classes >= 1, kWhere, "expected at least one class, got ", n_classes);
  NTKCL_CHECK(initial >= 1 && initial <= n_classes, kWhere,
              "expected initial_classes between 1 and the ", n_classes, " classes, got ", initial);
  NTKCL_CHECK(increment >= 1, kWhere, "expected increment >= 1, got ", increment);
  int64_t left = n_classes - initial;
  NTKCL_CHECK(left == 0 || increment <= left, kWhere, "expected increment <= ", left,
              ", the classes left after the first task (", n_classes, " - ", initial, "), got ",
              increment);
  std::vector<int64_t> sizes = {initial};
  while (left > 0) {
    sizes.push_back(std::min(increment, left));
    left -= sizes.back();
  }
  return sizes;
}

}  // namespace ntkcl::scenario
