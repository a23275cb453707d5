#include "ntkcl/methods/dropout.h"

namespace ntkcl::methods {

nn::Dropout dropout_of(const Draw& draw, double p, RandomSource& random, const dist::Rows& rows,
                       int64_t dim) {
  nn::Dropout dropout{.p = p};
  if (const auto mask = random.recorded(draw)) {
    dropout.mask = rows.own(*mask, dim);
    return dropout;
  }
  dropout.key = random.dropout_key(draw);
  if (rows.shared()) {
    dropout.first = rows.held_first();
    dropout.rows = rows.total();
  }
  return dropout;
}

}  // namespace ntkcl::methods
