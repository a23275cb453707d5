#include "ntkcl/core/error.h"
#include "ntkcl/dist/communicator.h"

namespace ntkcl::dist {

std::shared_ptr<Communicator> process_group(const std::string&, const std::string&) {
  NTKCL_FAIL(
      ValueError, "ranks",
      "expected a build with torch.distributed: the torch that ntkcl was built with has none");
}

}  // namespace ntkcl::dist
