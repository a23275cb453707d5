#pragma once

#include <cstdint>
#include <vector>

// How many classes each task brings.
namespace ntkcl::scenario {

// Sizes of the tasks of a class-incremental run: [initial, increment, increment, ..., rest]. The
// last task is shorter when the increment does not divide what is left after the first one.
// ValueError unless n_classes >= 1, 1 <= initial <= n_classes, increment >= 1, and the classes
// left after the first task (if any) fill at least one increment.
std::vector<int64_t> split_classes(int64_t n_classes, int64_t initial, int64_t increment);

}  // namespace ntkcl::scenario
