#include "ntkcl/methods/gathering.h"

#include <ATen/ATen.h>

#include "ntkcl/core/error.h"

namespace ntkcl::methods {

at::Tensor gathered(const std::vector<at::Tensor>& batches, const TaskInfo& task) {
  NTKCL_CHECK(!batches.empty(), "data", "task ", task.index,
              ": expected at least one readable training image, got none");
  return at::cat(batches);
}

std::vector<at::Tensor> rows_of_classes(const at::Tensor& labels, const TaskInfo& task) {
  std::vector<at::Tensor> rows;
  for (int64_t c = task.n_old; c < task.n_seen(); ++c) {
    rows.push_back(labels.eq(c).nonzero().squeeze(1));
    NTKCL_CHECK(rows.back().size(0) > 0, "data", "class ", task.class_ids[static_cast<size_t>(c)],
                ": expected at least one readable training image, got none");
  }
  return rows;
}

}  // namespace ntkcl::methods
