#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace ntkcl::dist {

// Processes that train one run together: ranks 0 .. size - 1. Each calls the same functions in the
// same order. RankError where another one is gone.
class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int64_t rank() const = 0;
  virtual int64_t size() const = 0;

  // The tensor of every rank, in rank order; all are contiguous, of one type and shape.
  virtual std::vector<at::Tensor> gather(const at::Tensor& own) = 0;
  // Becomes the sum over all ranks, the same to the bit on each.
  virtual void sum_(at::Tensor& tensor) = 0;
  // Becomes that of rank 0.
  virtual void broadcast_(at::Tensor& tensor) = 0;
  // Whether it is true on any rank.
  virtual bool any(bool here) = 0;
  // Ends the connection, so that the others do not wait for this rank.
  virtual void leave() = 0;
};

// One process alone.
std::shared_ptr<Communicator> single();
// The ranks of torch.distributed's process group of this name; what is not on a device goes over
// `control`, a group of the same ranks on the CPU that blocks and so notices when one is gone.
// ValueError where no group has such a name, or torch was built without distribution.
std::shared_ptr<Communicator> process_group(const std::string& name, const std::string& control);

}  // namespace ntkcl::dist
