#include "ntkcl/methods/table.h"

#include "ntkcl/core/error.h"
#include "ntkcl/methods/ntk_cl/ntk_cl.h"
#include "ntkcl/methods/simple_cil/simple_cil.h"

namespace ntkcl::methods {
namespace {

std::unique_ptr<Method> make_ntk_cl(const OptionMap& values, const nn::VisionTransformer& vit,
                                    int64_t tasks, RandomSource& random) {
  ntk_cl::Options options;
  apply(values, options, "ntk_cl");
  return std::make_unique<ntk_cl::NtkCl>(options, vit, tasks, random);
}

struct NoOptions {
  template <class Visitor>
  void visit(Visitor&) {}
};

std::unique_ptr<Method> make_simple_cil(const OptionMap& values, const nn::VisionTransformer& vit,
                                        int64_t, RandomSource&) {
  NoOptions options;
  apply(values, options, "simple_cil");
  return std::make_unique<SimpleCil>(vit);
}

}  // namespace

const std::vector<MethodEntry>& method_table() {
  static const std::vector<MethodEntry> table{
      {"ntk-cl",
       "ntk_cl",
       "two PEFT sub-networks fused, orthogonality and dissimilarity losses, adaptive EMA",
       describe<ntk_cl::Options>(),
       {{"release", ntk_cl::release_values()}, {"corrected", {}}},
       make_ntk_cl},
      {"simple-cil",
       "simple_cil",
       "class means of the frozen backbone, the baseline without training",
       {},
       {{"release", {}}, {"corrected", {}}},
       make_simple_cil},
  };
  return table;
}

const MethodEntry& find_method(const std::string& name) {
  std::string known;
  for (const MethodEntry& entry : method_table()) {
    if (entry.name == name) {
      return entry;
    }
    known += (known.empty() ? "" : ", ") + entry.name;
  }
  NTKCL_FAIL(ValueError, "method", "expected one of ", known, ", got '", name, "'");
}

}  // namespace ntkcl::methods
