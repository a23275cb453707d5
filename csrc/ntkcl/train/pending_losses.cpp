#include "ntkcl/train/pending_losses.h"

#include <ATen/ATen.h>

namespace ntkcl::train {

PendingLosses::PendingLosses(const methods::Losses& losses) {
  std::vector<at::Tensor> scalars;
  for (const auto& [name, tensor] : losses) {
    names_.push_back(name);
    scalars.push_back(tensor.to(at::kDouble));
  }
  const at::Tensor stacked = at::stack(scalars);
  const at::Device device = stacked.device();
  host_ =
      at::empty(stacked.sizes(), at::TensorOptions(at::kDouble).pinned_memory(device.is_cuda()));
  host_.copy_(stacked, /*non_blocking=*/true);
  if (device.is_cuda()) {
    copied_.emplace(device.type());
    copied_->record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  }
}

std::map<std::string, double> PendingLosses::values() const {
  if (copied_) {
    copied_->synchronize();
  }
  std::map<std::string, double> values;
  for (size_t i = 0; i < names_.size(); ++i) {
    values[names_[i]] = host_.const_data_ptr<double>()[i];
  }
  return values;
}

}  // namespace ntkcl::train
