#pragma once

#include <c10/core/Device.h>

#include <functional>
#include <memory>

namespace ntkcl::train {

// Work on a device that is recorded once and then started as a whole: on CUDA a CUDA graph, where
// the host no longer pays for every kernel. Whatever changes from one replay to the next has to be
// read from tensors that stay where they are.
//
// Note: a CPU has no such thing. There a replay does the recorded work anew, so that code around a
// graph computes the same on all devices.
class Graph {
 public:
  using Work = std::function<void()>;
  virtual ~Graph() = default;
  Graph() = default;
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  // Does it as record() will, for what the first time alone does: libraries set themselves up.
  virtual void rehearse(const Work& work) = 0;
  // Once. The work is not done yet; tensors that it makes have their places. ValueError, with the
  // device's reason, for work that the host has to wait for.
  virtual void record(Work work) = 0;
  // After what was started on the current stream, and before what is started on it next.
  virtual void replay() = 0;
};

std::unique_ptr<Graph> make_graph(c10::Device device);
// Of a build with CUDA; ValueError in one without.
std::unique_ptr<Graph> make_cuda_graph(c10::Device device);

}  // namespace ntkcl::train
