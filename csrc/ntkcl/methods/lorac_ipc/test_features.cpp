#include "ntkcl/methods/lorac_ipc/test_features.h"

#include <ATen/ATen.h>

#include <limits>

namespace ntkcl::methods::lorac_ipc {
namespace {

at::Tensor joined(const at::Tensor& old, const at::Tensor& more) {
  return old.defined() ? at::cat({old, more}) : more;
}

}  // namespace

std::vector<int64_t> TestFeatures::unknown(const std::vector<int64_t>& numbers) const {
  std::vector<int64_t> missing;
  for (const int64_t number : numbers) {
    if (!row_of_.contains(number)) {
      missing.push_back(number);
    }
  }
  return missing;
}

void TestFeatures::add(const at::Tensor& numbers, const at::Tensor& labels,
                       const at::Tensor& features, int64_t begin) {
  const int64_t count = numbers.size(0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t number = numbers.const_data_ptr<int64_t>()[i];
    row_of_.emplace(number, static_cast<int64_t>(numbers_.size()));
    numbers_.push_back(number);
  }
  const auto far = std::numeric_limits<double>::infinity();
  labels_ = joined(labels_, labels);
  first_ = joined(first_, features);
  features_ = joined(features_, features.clone());  // written in place, unlike those of the first
  nearest_ = joined(nearest_, at::full_like(labels, -1));
  distance_ = joined(distance_, at::full({count}, far, features.options()));
  compared_ = joined(compared_, at::zeros({count}, at::kLong));
  chosen_ = joined(chosen_, at::full({count}, begin, at::kLong));
  computed_ = joined(computed_, at::full({count}, begin, at::kLong));
}

void TestFeatures::update_nearest(int64_t classes, const DistanceFn& distances) {
  // Old images were compared with all classes but the newest, new ones with none.
  for (const at::Tensor& known : std::get<0>(at::_unique(compared_)).unbind(0)) {
    const auto first = known.item<int64_t>();
    if (first == classes) {
      continue;
    }
    const at::Tensor rows = compared_.eq(first).nonzero().squeeze(1);
    const at::Tensor on_device = rows.to(first_.device());
    const auto [distance, place] = distances(first_.index_select(0, on_device), first).min(1);
    const at::Tensor before = distance_.index_select(0, on_device);
    const at::Tensor closer = distance.lt(before);
    nearest_.index_copy_(0, on_device,
                         at::where(closer, place + first, nearest_.index_select(0, on_device)));
    distance_.index_copy_(0, on_device, at::where(closer, distance, before));
    compared_.index_fill_(0, rows, classes);
  }
}

std::map<int64_t, std::vector<int64_t>> TestFeatures::choose(const at::Tensor& snapshots) {
  chosen_ = snapshots.clone();
  std::map<int64_t, std::vector<int64_t>> missing;
  const int64_t* chosen = chosen_.const_data_ptr<int64_t>();
  const int64_t* computed = computed_.const_data_ptr<int64_t>();
  for (size_t row = 0; row < numbers_.size(); ++row) {
    if (chosen[row] != computed[row] && chosen[row] > 0) {
      missing[chosen[row]].push_back(numbers_[row]);
    }
  }
  const at::Tensor back = chosen_.eq(0).logical_and(computed_.ne(0)).nonzero().squeeze(1);
  const at::Tensor on_device = back.to(first_.device());
  features_.index_copy_(0, on_device, first_.index_select(0, on_device));
  computed_.index_fill_(0, back, 0);
  return missing;
}

void TestFeatures::set(const at::Tensor& numbers, const at::Tensor& features) {
  const at::Tensor at_rows = rows(numbers);
  features_.index_copy_(0, at_rows.to(features_.device()), features);
  computed_.index_copy_(0, at_rows, chosen_.index_select(0, at_rows));
}

at::Tensor TestFeatures::rows(const at::Tensor& numbers) const {
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < numbers.size(0); ++i) {
    rows.push_back(row_of_.at(numbers.const_data_ptr<int64_t>()[i]));
  }
  return at::tensor(rows, at::kLong);
}

at::Tensor votes(const at::Tensor& tasks, const at::Tensor& groups) {
  at::Tensor voted = tasks.clone();
  for (const at::Tensor& group : std::get<0>(at::_unique(groups)).unbind(0)) {
    const at::Tensor rows = groups.eq(group).nonzero().squeeze(1);
    const at::Tensor counts = at::bincount(tasks.index_select(0, rows));
    voted.index_fill_(0, rows, counts.argmax());
  }
  return voted;
}

}  // namespace ntkcl::methods::lorac_ipc
