#pragma once

namespace ntkcl::train {

// While one of these lives, torch's large CPU tensors come from memory that is kept when they are
// freed, for the next tensor of like size: a training step repeats the same sizes, and fresh pages
// cost more than what is computed in them. Small tensors are torch's as before. Process-wide; the
// memory kept is returned to the system with the last one, that of tensors still in use as they go.
class ActivationMemory {
 public:
  ActivationMemory();
  ~ActivationMemory();
  ActivationMemory(const ActivationMemory&) = delete;
  ActivationMemory& operator=(const ActivationMemory&) = delete;
};

}  // namespace ntkcl::train
