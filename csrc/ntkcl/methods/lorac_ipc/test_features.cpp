#include "ntkcl/methods/lorac_ipc/test_features.h"

#include <ATen/ATen.h>

#include <limits>

#include "ntkcl/core/error.h"

namespace ntkcl::methods::lorac_ipc {

TestFeatures::TestFeatures(int64_t width, const at::TensorOptions& like)
    : numbers_(at::zeros({0}, at::kLong)),
      labels_(at::zeros({0}, like.dtype(at::kLong))),
      first_(at::zeros({0, width}, like)),
      features_(first_),
      nearest_(labels_),
      distance_(at::zeros({0}, like)),
      compared_(numbers_),
      chosen_(numbers_),
      computed_(numbers_) {}

void TestFeatures::clear() {
  *this = TestFeatures(first_.size(1), first_.options());
}

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
  const auto far = std::numeric_limits<double>::infinity();
  const at::Tensor snapshot = at::full({count}, begin, at::kLong);
  numbers_ = at::cat({numbers_, numbers});
  labels_ = at::cat({labels_, labels});
  first_ = at::cat({first_, features});
  features_ = at::cat({features_, features});
  nearest_ = at::cat({nearest_, at::full_like(labels, -1)});
  distance_ = at::cat({distance_, at::full({count}, far, features.options())});
  compared_ = at::cat({compared_, at::zeros({count}, at::kLong)});
  chosen_ = at::cat({chosen_, snapshot});
  computed_ = at::cat({computed_, snapshot});
  number_rows();
}

void TestFeatures::number_rows() {
  row_of_.clear();
  for (int64_t row = 0; row < numbers_.size(0); ++row) {
    row_of_.emplace(numbers_.const_data_ptr<int64_t>()[row], row);
  }
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
  const int64_t* numbers = numbers_.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < size(); ++row) {
    if (chosen[row] != computed[row] && chosen[row] > 0) {
      missing[chosen[row]].push_back(numbers[row]);
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
  const int64_t* begin = numbers.const_data_ptr<int64_t>();
  const at::Tensor places = places_of({begin, begin + numbers.size(0)});
  NTKCL_ASSERT(places.size(0) == numbers.size(0));  // all are known
  return places;
}

at::Tensor TestFeatures::places_of(const std::vector<int64_t>& numbers) const {
  std::vector<int64_t> places;
  for (const int64_t number : numbers) {
    if (const auto found = row_of_.find(number); found != row_of_.end()) {
      places.push_back(found->second);
    }
  }
  return at::tensor(places, at::kLong);
}

void TestFeatures::visit_state(const std::string& prefix, const StateVisitor& visitor) {
  visitor(prefix + "numbers", numbers_);
  visitor(prefix + "labels", labels_);
  visitor(prefix + "first", first_);
  visitor(prefix + "features", features_);
  visitor(prefix + "nearest", nearest_);
  visitor(prefix + "distance", distance_);
  visitor(prefix + "compared", compared_);
  visitor(prefix + "chosen", chosen_);
  visitor(prefix + "computed", computed_);
  const int64_t n = numbers_.numel();
  for (const at::Tensor* column :
       {&numbers_, &labels_, &nearest_, &distance_, &compared_, &chosen_, &computed_}) {
    NTKCL_CHECK(column->dim() == 1 && column->size(0) == n, "state", prefix,
                "*: expected columns of ", n, " images, got ", column->sizes());
  }
  NTKCL_CHECK(first_.dim() == 2 && first_.size(0) == n && first_.sizes() == features_.sizes(),
              "state", prefix, "*: expected features of ", n, " images, got ", first_.sizes(),
              " and ", features_.sizes());
  number_rows();
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
