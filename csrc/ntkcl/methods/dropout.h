#pragma once

#include "ntkcl/dist/rows.h"
#include "ntkcl/methods/random.h"
#include "ntkcl/nn/adapter.h"

namespace ntkcl::methods {

// The dropout that `draw` gives a batch, as far as this rank has its rows: dimension `dim` of a
// recorded mask.
nn::Dropout dropout_of(const Draw& draw, double p, RandomSource& random, const dist::Rows& rows,
                       int64_t dim);

}  // namespace ntkcl::methods
