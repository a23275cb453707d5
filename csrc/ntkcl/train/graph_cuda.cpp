#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <exception>
#include <map>

#include "ntkcl/core/error.h"
#include "ntkcl/train/graph.h"

namespace ntkcl::train {
namespace {

// One for all graphs of a device: libraries keep a workspace for each stream that they have seen.
c10::cuda::CUDAStream recording_stream(c10::DeviceIndex device) {
  static std::map<c10::DeviceIndex, c10::cuda::CUDAStream> streams;
  const auto found = streams.find(device);
  if (found != streams.end()) {
    return found->second;
  }
  const auto stream = c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device);
  return streams.emplace(device, stream).first->second;
}

class CudaGraph : public Graph {
 public:
  explicit CudaGraph(c10::Device device) : stream_(recording_stream(device.index())) {}

  void rehearse(const Work& work) override { on_own_stream(work); }

  void record(Work work) override {
    // While a graph is recorded the allocator cannot give back what it keeps for others.
    c10::cuda::CUDACachingAllocator::emptyCache();
    on_own_stream([&] {
      // Other threads may go on with work of their own.
      graph_.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
      try {
        work();
        graph_.capture_end();
      } catch (const std::exception& error) {
        abandon();
        NTKCL_FAIL(ValueError, "cuda_graph",
                   "expected a step that can be recorded, got: ", error.what(),
                   "\nUse cuda_graph = false");
      }
    });
  }

  void replay() override { graph_.replay(); }

 private:
  // The default stream cannot be recorded. What was started before is waited for there, and the
  // current stream waits for what was started there; never the host.
  void on_own_stream(const Work& work) {
    const c10::cuda::CUDAStream current = c10::cuda::getCurrentCUDAStream(stream_.device_index());
    at::cuda::CUDAEvent before, after;
    before.record(current);
    before.block(stream_);
    {
      const c10::cuda::CUDAStreamGuard guard(stream_);
      work();
    }
    after.record(stream_);
    after.block(current);
  }

  // Ends a recording that failed, so that the stream can be used again.
  void abandon() {
    try {
      graph_.capture_end();
    } catch (const std::exception&) {  // it says once more what work() said
    }
    graph_.reset();
  }

  c10::cuda::CUDAStream stream_;
  at::cuda::CUDAGraph graph_;
};

}  // namespace

std::unique_ptr<Graph> make_cuda_graph(c10::Device device) {
  return std::make_unique<CudaGraph>(device);
}

}  // namespace ntkcl::train
