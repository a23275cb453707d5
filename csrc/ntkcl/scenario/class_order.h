#pragma once

#include <cstdint>
#include <vector>

// The order in which classes arrive.
namespace ntkcl::scenario {

// numpy.random.RandomState(seed).permutation(n), bit for bit: the class order of the published
// runs. Element i is the data set's class that arrives i-th. ValueError for n < 0 or n >= 2^32.
std::vector<int64_t> numpy_permutation(uint32_t seed, int64_t n);

}  // namespace ntkcl::scenario
