#include <algorithm>
#include <numeric>

#include "ntkcl/core/error.h"
#include "ntkcl/scenario/class_order.h"
#include "ntkcl/scenario/task_split.h"
#include "testing.h"

namespace ntkcl::scenario {
namespace {

using Sizes = std::vector<int64_t>;

TEST_CASE("class orders are NumPy's", "[scenario]") {
  // numpy.random.RandomState(1993).permutation(100)[:6], and all of permutation(10) for seed 0.
  const auto order = numpy_permutation(1993, 100);
  CHECK(Sizes(order.begin(), order.begin() + 6) == Sizes{68, 56, 78, 8, 23, 84});
  CHECK(numpy_permutation(0, 10) == Sizes{2, 8, 4, 9, 1, 6, 7, 3, 0, 5});
}

TEST_CASE("a class order holds every class once, whatever the size", "[scenario]") {
  for (const int64_t n : {0, 1, 2, 255, 256, 257}) {
    Sizes sorted = numpy_permutation(7, n);
    std::sort(sorted.begin(), sorted.end());
    Sizes all(static_cast<size_t>(n));
    std::iota(all.begin(), all.end(), int64_t{0});
    CHECK(sorted == all);
  }
}

TEST_CASE("the last task takes the rest", "[scenario]") {
  CHECK(split_classes(37, 7, 5) == Sizes{7, 5, 5, 5, 5, 5, 5});
  CHECK(split_classes(12, 5, 4) == Sizes{5, 4, 3});
  CHECK(split_classes(10, 10, 3) == Sizes{10});
}

TEST_CASE("a split that leaves no full increment is refused", "[scenario]") {
  const auto message = testing::message_of<ValueError>([] { split_classes(10, 8, 3); });
  CHECK(message.find("[split_classes] expected increment <= 2") == 0);
}

}  // namespace
}  // namespace ntkcl::scenario
