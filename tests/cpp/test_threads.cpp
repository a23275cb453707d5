#include <ATen/Parallel.h>

#include <atomic>

#include "testing.h"

// Without OpenMP in our own build, torch's loops compile and run in one thread.
TEST_CASE("loops over tensors are split over torch's threads", "[kernels]") {
  const int threads = at::get_num_threads();
  at::set_num_threads(2);
  std::atomic<int> parts{0};
  at::parallel_for(0, 2, 1, [&](int64_t, int64_t) { ++parts; });
  at::set_num_threads(threads);
  CHECK(parts == 2);
}
