#include "ntkcl/dist/communicator.h"

namespace ntkcl::dist {
namespace {

class Single : public Communicator {
 public:
  int64_t rank() const override { return 0; }
  int64_t size() const override { return 1; }
  std::vector<at::Tensor> gather(const at::Tensor& own) override { return {own}; }
  void sum_(at::Tensor&) override {}
  void broadcast_(at::Tensor&) override {}
  bool any(bool here) override { return here; }
  void leave() override {}
};

}  // namespace

std::shared_ptr<Communicator> single() {
  return std::make_shared<Single>();
}

}  // namespace ntkcl::dist
