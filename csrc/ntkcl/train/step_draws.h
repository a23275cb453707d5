#pragma once

#include <vector>

#include "ntkcl/methods/random.h"

namespace ntkcl::train {

// The draws of a training step that is replayed: each has a place on the device that stays, and
// before a replay all get their values for its step, in one copy.
//
// Note: the first step finds out which draws there are; every later one makes the same ones, in the
// same order, for another step.
class StepDraws : public methods::RandomSource {
 public:
  StepDraws(methods::RandomSource& source, at::Device device);

  // Before the work of a step is done, recorded or replayed.
  void begin(int64_t step);

  at::Tensor dropout_key(const methods::Draw& draw) override;
  at::Tensor placed(const methods::Draw& draw, at::Device device, const Make& make) override;
  // ValueError where there is one: it would be every step's.
  std::optional<at::Tensor> recorded(const methods::Draw& draw) override;

 private:
  struct Slot {
    methods::Draw draw;
    Make make;
    at::Tensor value;  // on the device
    int64_t begin = 0, bytes = 0;
  };
  void settle();   // gives the slots their places
  void refresh();  // and their values for this step

  methods::RandomSource& source_;
  at::Device device_;
  std::vector<Slot> slots_;
  at::Tensor places_;  // uint8, all slots' values one behind the other; undefined in the first step
  bool begun_ = false;
  int64_t step_ = 0;
  size_t next_ = 0;
};

}  // namespace ntkcl::train
