#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <unordered_map>
#include <vector>

#include "ntkcl/methods/state.h"

namespace ntkcl::methods::lorac_ipc {

// What need not be computed again of test images from one evaluation to the next: snapshots never
// change once their task is over, and a class's Gaussians never (specification section 9.7).
class TestFeatures {
 public:
  // `like`: type and device of the features.
  TestFeatures(int64_t width, const at::TensorOptions& like);

  // Those of `numbers` not known yet, in their order.
  std::vector<int64_t> unknown(const std::vector<int64_t>& numbers) const;
  // Adds images: numbers (B) and labels (B) int64, their features (B, C) of snapshot `begin`, which
  // is 0 where nearest classes are asked for.
  void add(const at::Tensor& numbers, const at::Tensor& labels, const at::Tensor& features,
           int64_t begin);

  // Compares with the classes that were added since the last time. `distances` gives those of
  // features (B, C) to the classes from `first` on, (B, classes - first).
  using DistanceFn = std::function<at::Tensor(const at::Tensor& features, int64_t first)>;
  void update_nearest(int64_t classes, const DistanceFn& distances);
  // The nearest class of each image (n).
  const at::Tensor& nearest() const { return nearest_; }

  // Sets the snapshot by which each image is classified, (n) int64 on the CPU, and returns the
  // images whose features of it are missing, by snapshot; those of snapshot 0 never are.
  std::map<int64_t, std::vector<int64_t>> choose(const at::Tensor& snapshots);
  // Sets features (B, C) of the chosen snapshot of images `numbers` (B).
  void set(const at::Tensor& numbers, const at::Tensor& features);

  int64_t size() const { return labels_.size(0); }
  // Places of the images that are known among `numbers`, in their order: (m) int64 on the CPU.
  at::Tensor places_of(const std::vector<int64_t>& numbers) const;
  const at::Tensor& labels() const { return labels_; }      // (n)
  const at::Tensor& features() const { return features_; }  // (n, C), of the chosen snapshots
  void clear();
  void visit_state(const std::string& prefix, const StateVisitor& visitor);

 private:
  void number_rows();
  at::Tensor rows(const at::Tensor& numbers) const;

  std::unordered_map<int64_t, int64_t> row_of_;  // of each number
  at::Tensor numbers_;                           // (n) int64 on the CPU
  at::Tensor labels_, first_, features_;
  at::Tensor nearest_, distance_;  // (n), on the features' device
  at::Tensor compared_;            // (n) int64: classes that an image was compared with
  at::Tensor chosen_, computed_;   // (n) int64 on the CPU: snapshot chosen, that of features_
};

// The most frequent of `tasks` (n) among the images of each group (n), the smallest of several.
at::Tensor votes(const at::Tensor& tasks, const at::Tensor& groups);

}  // namespace ntkcl::methods::lorac_ipc
