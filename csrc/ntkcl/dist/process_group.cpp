#include "ntkcl/dist/communicator.h"

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include "ntkcl/core/error.h"

namespace ntkcl::dist {
namespace {

class ProcessGroup : public Communicator {
 public:
  ProcessGroup(c10::intrusive_ptr<c10d::ProcessGroup> group, at::Device device)
      : group_(std::move(group)), device_(device) {}

  int64_t rank() const override { return group_->getRank(); }
  int64_t size() const override { return group_->getSize(); }

  std::vector<at::Tensor> gather(const at::Tensor& own) override {
    std::vector<at::Tensor> inputs{own};
    std::vector<std::vector<at::Tensor>> outputs(1);
    for (int64_t r = 0; r < size(); ++r) {
      outputs[0].push_back(at::empty_like(own));
    }
    finish([&] { return group_->allgather(outputs, inputs); });
    return outputs[0];
  }

  void sum_(at::Tensor& tensor) override {
    std::vector<at::Tensor> tensors{tensor};
    finish([&] { return group_->allreduce(tensors); });
  }

  bool any(bool here) override {
    at::Tensor count = at::full({1}, here ? 1 : 0, at::device(device_).dtype(at::kInt));
    sum_(count);
    return count.item<int>() > 0;
  }

 private:
  // The backends throw errors of many classes; the reason of nearly all is that a rank is gone.
  template <class Begin>
  void finish(Begin begin) {
    try {
      begin()->wait();
    } catch (const std::exception& error) {
      NTKCL_FAIL(RankError, "ranks", "rank ", rank(), " of ", size(),
                 " has lost the others: expected each to go on, got '", first_line(error.what()),
                 "'");
    }
  }

  static std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  at::Device device_;
};

}  // namespace

std::shared_ptr<Communicator> process_group(const std::string& name, at::Device device) {
  NTKCL_CHECK(c10d::is_process_group_registered(name), "ranks",
              "expected the name of a process group that torch.distributed knows, got '", name,
              "'");
  return std::make_shared<ProcessGroup>(c10d::resolve_process_group(name), device);
}

}  // namespace ntkcl::dist
