#include "ntkcl/core/error.h"
#include "ntkcl/train/graph.h"

namespace ntkcl::train {

std::unique_ptr<Graph> make_cuda_graph(c10::Device) {
  NTKCL_FAIL(ValueError, "cuda_graph",
             "this build of ntkcl has no CUDA; expected device 'cpu', or ",
             "a build where nvcc and a CUDA torch are found (ntkcl.build_info says why they were ",
             "not used)");
}

}  // namespace ntkcl::train
