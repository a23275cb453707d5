#pragma once

#include <vector>

#include "ntkcl/methods/method.h"

// What methods do with the features of all images of a task.
namespace ntkcl::methods {

// The rows of all batches, one below the other. ValueError where every image was unreadable.
at::Tensor gathered(const std::vector<at::Tensor>& batches, const TaskInfo& task);

// Where the images of each new class stand in labels (n): int64 (m) of each. ValueError names a
// class without any.
std::vector<at::Tensor> rows_of_classes(const at::Tensor& labels, const TaskInfo& task);

}  // namespace ntkcl::methods
