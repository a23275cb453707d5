#pragma once

namespace ntkcl::train {

// While one of these lives, torch's large CPU tensors come from memory that is kept when they are
// freed, for the next tensor of like size: a training step repeats the same sizes, and fresh pages
// cost more than what is computed in them. Kept is at most the sum over sizes of what was in use at
// once. Small tensors are malloc's. Process-wide; the memory kept is returned to the system with
// the last one, or when the system has no more; that of tensors still in use as they go.
class ActivationMemory {
 public:
  ActivationMemory();
  ~ActivationMemory();
  ActivationMemory(const ActivationMemory&) = delete;
  ActivationMemory& operator=(const ActivationMemory&) = delete;
};

}  // namespace ntkcl::train
