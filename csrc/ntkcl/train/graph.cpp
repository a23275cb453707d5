#include "ntkcl/train/graph.h"

#include <utility>

namespace ntkcl::train {
namespace {

class CpuGraph : public Graph {
 public:
  void rehearse(const Work& work) override { work(); }
  void record(Work work) override { work_ = std::move(work); }
  void replay() override { work_(); }

 private:
  Work work_;
};

}  // namespace

std::unique_ptr<Graph> make_graph(c10::Device device) {
  return device.is_cuda() ? make_cuda_graph(device) : std::make_unique<CpuGraph>();
}

}  // namespace ntkcl::train
