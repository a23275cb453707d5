#include "ntkcl/train/step_draws.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "ntkcl/core/error.h"

namespace ntkcl::train {
namespace {

constexpr int64_t kAlignment = 16;

at::Tensor bytes_of(const at::Tensor& tensor) {
  return tensor.contiguous().view({-1}).view(at::kByte);
}

}  // namespace

StepDraws::StepDraws(methods::RandomSource& source, at::Device device)
    : RandomSource(source), source_(source), device_(device) {}

void StepDraws::begin(int64_t step) {
  if (begun_ && !places_.defined()) {
    settle();
  }
  begun_ = true;
  step_ = step;
  next_ = 0;
  if (places_.defined()) {
    refresh();
  }
}

at::Tensor StepDraws::dropout_key(const methods::Draw& draw) {
  return placed(draw, device_, [](RandomSource& source, const methods::Draw& of_step) {
    return source.dropout_key(of_step);
  });
}

at::Tensor StepDraws::placed(const methods::Draw& draw, at::Device device, const Make& make) {
  NTKCL_ASSERT(begun_ && device == device_);
  if (!places_.defined()) {
    slots_.push_back({.draw = draw, .make = make, .value = source_.placed(draw, device, make)});
    return slots_.back().value;
  }
  NTKCL_ASSERT(next_ < slots_.size());
  const Slot& slot = slots_[next_++];
  NTKCL_ASSERT(slot.draw.purpose == draw.purpose && slot.draw.list == draw.list &&
               slot.draw.layer == draw.layer);
  return slot.value;
}

std::optional<at::Tensor> StepDraws::recorded(const methods::Draw& draw) {
  NTKCL_CHECK(!source_.recorded(draw), "cuda_graph", "expected draws by the seed, got '",
              draw.purpose, "' from a record: a step that is replayed would repeat it");
  return std::nullopt;
}

void StepDraws::settle() {
  int64_t total = 0;
  for (Slot& slot : slots_) {
    slot.begin = total;
    slot.bytes = static_cast<int64_t>(slot.value.nbytes());
    total += (slot.bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  places_ = at::empty({total}, at::TensorOptions(at::kByte).device(device_));
  for (Slot& slot : slots_) {
    slot.value = places_.narrow(0, slot.begin, slot.bytes)
                     .view(slot.value.scalar_type())
                     .view(slot.value.sizes());
  }
}

void StepDraws::refresh() {
  at::Tensor host =
      at::empty(places_.sizes(), at::TensorOptions(at::kByte).pinned_memory(device_.is_cuda()));
  for (Slot& slot : slots_) {
    methods::Draw draw = slot.draw;
    draw.step = step_;
    const at::Tensor value = bytes_of(slot.make(source_, draw));
    NTKCL_ASSERT(value.numel() == slot.bytes);
    std::copy_n(value.const_data_ptr<uint8_t>(), slot.bytes,
                host.mutable_data_ptr<uint8_t>() + slot.begin);
  }
  places_.copy_(host, /*non_blocking=*/true);
}

}  // namespace ntkcl::train
