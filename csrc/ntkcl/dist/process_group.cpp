#include "ntkcl/dist/communicator.h"

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include "ntkcl/core/error.h"

namespace ntkcl::dist {
namespace {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

class ProcessGroup : public Communicator {
 public:
  ProcessGroup(Group group, Group control)
      : group_(std::move(group)),
        control_(std::move(control)),
        rank_(group_->getRank()),
        size_(group_->getSize()) {}

  int64_t rank() const override { return rank_; }
  int64_t size() const override { return size_; }

  std::vector<at::Tensor> gather(const at::Tensor& own) override {
    std::vector<at::Tensor> inputs{own};
    std::vector<std::vector<at::Tensor>> outputs(1);
    for (int64_t r = 0; r < size_; ++r) {
      outputs[0].push_back(at::empty_like(own));
    }
    finish(own, [&](c10d::ProcessGroup& ranks) { return ranks.allgather(outputs, inputs); });
    return outputs[0];
  }

  void sum_(at::Tensor& tensor) override {
    std::vector<at::Tensor> tensors{tensor};
    finish(tensor, [&](c10d::ProcessGroup& ranks) { return ranks.allreduce(tensors); });
  }

  void broadcast_(at::Tensor& tensor) override {
    std::vector<at::Tensor> tensors{tensor};
    finish(tensor, [&](c10d::ProcessGroup& ranks) { return ranks.broadcast(tensors); });
  }

  bool any(bool here) override {
    at::Tensor count = at::full({1}, here ? 1 : 0, at::kInt);
    sum_(count);
    return count.item<int>() > 0;
  }

  void leave() override {
    group_.reset();
    control_.reset();
  }

 private:
  c10d::ProcessGroup& group(const at::Tensor& tensor) {
    const Group& of_device = tensor.is_cpu() ? control_ : group_;
    if (!of_device) {
      NTKCL_FAIL(RankError, "ranks", "rank ", rank_, " of ", size_, " has left the others");
    }
    return *of_device;
  }

  // The backends throw errors of many classes; the reason of nearly all is that a rank is gone.
  template <class Begin>
  void finish(const at::Tensor& tensor, Begin begin) {
    c10d::ProcessGroup& ranks = group(tensor);
    try {
      begin(ranks)->wait();
    } catch (const std::exception& error) {
      const std::string text = error.what();
      NTKCL_FAIL(RankError, "ranks", "rank ", rank_, " of ", size_,
                 " has lost the others: expected each to go on, got '",
                 text.substr(0, text.find('\n')), "'");
    }
  }

  Group group_, control_;
  int64_t rank_, size_;
};

Group resolve(const std::string& name) {
  NTKCL_CHECK(c10d::is_process_group_registered(name), "ranks",
              "expected the name of a process group that torch.distributed knows, got '", name,
              "'");
  return c10d::resolve_process_group(name);
}

}  // namespace

std::shared_ptr<Communicator> process_group(const std::string& name, const std::string& control) {
  return std::make_shared<ProcessGroup>(resolve(name), resolve(control));
}

}  // namespace ntkcl::dist
