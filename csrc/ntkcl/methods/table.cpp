#include "ntkcl/methods/table.h"

#include "ntkcl/core/error.h"
#include "ntkcl/methods/ease/ease.h"
#include "ntkcl/methods/fine_tune/fine_tune.h"
#include "ntkcl/methods/lorac_ipc/lorac_ipc.h"
#include "ntkcl/methods/ntk_cl/ntk_cl.h"
#include "ntkcl/methods/raa/raa.h"
#include "ntkcl/methods/ranpac/ranpac.h"
#include "ntkcl/methods/simple_cil/simple_cil.h"

namespace ntkcl::methods {
namespace {

std::unique_ptr<Method> make_ntk_cl(const OptionMap& values, const nn::VisionTransformer& vit,
                                    int64_t tasks, RandomSource& random) {
  ntk_cl::Options options;
  apply(values, options, "ntk_cl");
  return std::make_unique<ntk_cl::NtkCl>(options, vit, tasks, random);
}

std::unique_ptr<Method> make_lorac_ipc(const OptionMap& values, const nn::VisionTransformer& vit,
                                       int64_t tasks, RandomSource&) {
  lorac_ipc::Options options;
  apply(values, options, "lorac_ipc");
  return std::make_unique<lorac_ipc::LoracIpc>(options, vit, tasks);
}

std::unique_ptr<Method> make_raa(const OptionMap& values, const nn::VisionTransformer& vit, int64_t,
                                 RandomSource& random) {
  raa::Options options;
  apply(values, options, "raa");
  return std::make_unique<raa::Raa>(options, vit, random);
}

std::unique_ptr<Method> make_ranpac(const OptionMap& values, const nn::VisionTransformer& vit,
                                    int64_t, RandomSource& random) {
  ranpac::Options options;
  apply(values, options, "ranpac");
  return std::make_unique<ranpac::RanPac>(options, vit, random);
}

std::unique_ptr<Method> make_ease(const OptionMap& values, const nn::VisionTransformer& vit,
                                  int64_t, RandomSource&) {
  ease::Options options;
  apply(values, options, "ease");
  return std::make_unique<ease::Ease>(options, vit);
}

std::unique_ptr<Method> make_fine_tune(const OptionMap& values, const nn::VisionTransformer& vit,
                                       int64_t, RandomSource&) {
  fine_tune::Options options;
  apply(values, options, "fine_tune");
  return std::make_unique<fine_tune::FineTune>(options, vit);
}

std::unique_ptr<Method> make_joint(const OptionMap& values, const nn::VisionTransformer& vit,
                                   int64_t, RandomSource&) {
  fine_tune::JointOptions options;
  apply(values, options, "joint");
  return std::make_unique<fine_tune::Joint>(options, vit);
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
       {},
       {{"release", ntk_cl::release_values()}, {"corrected", {}}},
       make_ntk_cl},
      {"lorac-ipc",
       "lorac_ipc",
       "a LoRA for each task, composed and orthogonal; important matrices freeze; the task of an "
       "image is inferred",
       describe<lorac_ipc::Options>(),
       {{"optimizer", std::string("adam")},
        {"learning_rate", 0.005},
        {"weight_decay", 0.0},
        {"min_learning_rate", 1e-5},
        {"hold_epochs", int64_t{1}}},
       {{"release", lorac_ipc::release_values()}, {"corrected", {}}},
       make_lorac_ipc},
      {"raa",
       "raa",
       "adapter branches and a random mixture of them, SAM+, prototype drift, head alignment on "
       "class Gaussians",
       describe<raa::Options>(),
       {{"optimizer", std::string("sam+")},
        {"learning_rate", 0.01},
        {"batch_size", int64_t{48}},
        {"initial_epochs", int64_t{20}},
        {"epochs", int64_t{10}}},
       {{"release", raa::release_values()}, {"corrected", {}}},
       make_raa},
      {"ranpac",
       "ranpac",
       "adapters trained in the first task alone, a random projection, ridge regression on sums "
       "over all tasks",
       describe<ranpac::Options>(),
       {{"learning_rate", 0.01}, {"batch_size", int64_t{48}}},
       {{"release", {}}, {"corrected", {}}},
       make_ranpac},
      {"ease",
       "ease",
       "an adapter for each task, frozen afterwards; prototypes of all classes in the subspace of "
       "each",
       describe<ease::Options>(),
       {{"learning_rate", 0.01}, {"batch_size", int64_t{48}}},
       {{"release", {}}, {"corrected", {}}},
       make_ease},
      {"fine-tune",
       "fine_tune",
       "adapters or LoRA and a softmax head that go on from task to task: the lower baseline",
       describe<fine_tune::Options>(),
       {{"learning_rate", 0.01}, {"batch_size", int64_t{48}}},
       {{"release", {}}, {"corrected", {}}},
       make_fine_tune},
      {"joint",
       "joint",
       "adapters or LoRA trained anew at every task on the images of all classes seen, which it "
       "keeps: the upper bound",
       describe<fine_tune::JointOptions>(),
       {{"learning_rate", 0.01}, {"batch_size", int64_t{48}}},
       {{"release", {}}, {"corrected", {}}},
       make_joint},
      {"simple-cil",
       "simple_cil",
       "class means of the frozen backbone, the baseline without training",
       {},
       {},
       {{"release", {}}, {"corrected", {}}},
       make_simple_cil},
  };
  return table;
}

MakeMethod make_method(const std::string& name, OptionMap options) {
  const MethodEntry& entry = find_method(name);
  return [&entry, options = std::move(options)](const nn::VisionTransformer& vit, int64_t tasks,
                                                RandomSource& random) {
    return entry.make(options, vit, tasks, random);
  };
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
