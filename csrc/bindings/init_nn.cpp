#include <pybind11/stl.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "bindings.h"
#include "ntkcl/core/error.h"
#include "ntkcl/methods/ntk_cl/losses.h"
#include "ntkcl/nn/composed_lora.h"
#include "ntkcl/nn/cosine_head.h"
#include "ntkcl/nn/fusion.h"
#include "ntkcl/nn/prompts.h"

namespace ntkcl::bindings {
namespace {

using nn::TensorMap;

// The tensors "{0 .. L-1}.<name>" of a dict as one (L, ...) tensor; gradients flow back.
at::Tensor stacked(const TensorMap& tensors, int64_t blocks, const std::string& name) {
  std::vector<at::Tensor> slices;
  for (int64_t l = 0; l < blocks; ++l) {
    const std::string key = std::to_string(l) + "." + name;
    const auto found = tensors.find(key);
    NTKCL_CHECK(found != tensors.end(), "peft", "expected the key '", key, "', but it is missing");
    slices.push_back(found->second);
  }
  return at::stack(slices);
}

std::vector<nn::Dropout> masked(const std::vector<at::Tensor>& masks, double p) {
  std::vector<nn::Dropout> dropout;
  dropout.reserve(masks.size());
  for (const at::Tensor& mask : masks) {
    dropout.push_back({.p = p, .mask = mask, .key = {}});
  }
  return dropout;
}

py::dict pass_result(const at::Tensor& feature, const nn::Trace& trace) {
  py::dict result;
  result["cls"] = feature;
  result["blocks"] = trace.blocks;
  result["prompts"] = trace.prompts;
  return result;
}

py::dict plain_pass(const nn::VisionTransformer& vit, const at::Tensor& images, bool trace) {
  nn::Trace seen;
  const at::Tensor feature = nn::plain_pass(vit, vit.prefix(images), trace ? &seen : nullptr);
  return pass_result(feature, seen);
}

py::dict channel_pass(const nn::VisionTransformer& vit, const at::Tensor& images,
                      const TensorMap& p, double scale, const std::vector<at::Tensor>& masks,
                      double dropout, bool trace) {
  const int64_t n = vit.depth();
  const nn::AdapterList adapters{stacked(p, n, "down.weight"), stacked(p, n, "down.bias"),
                                 stacked(p, n, "up.weight"), stacked(p, n, "up.bias")};
  nn::Trace seen;
  const at::Tensor feature = nn::channel_pass(vit, vit.prefix(images), adapters, scale,
                                              masked(masks, dropout), trace ? &seen : nullptr);
  return pass_result(feature, seen);
}

py::dict patch_pass(const nn::VisionTransformer& vit, const at::Tensor& images, const TensorMap& p,
                    double scale, bool trace) {
  const int64_t n = vit.depth();
  const nn::PromptList prompts{stacked(p, n, "mix.weight"), stacked(p, n, "mix.bias"),
                               stacked(p, n, "norm.weight"), stacked(p, n, "norm.bias"),
                               p.count("0.gate") ? stacked(p, n, "gate") : at::Tensor()};
  nn::Trace seen;
  const at::Tensor feature =
      nn::patch_pass(vit, vit.prefix(images), prompts, scale, trace ? &seen : nullptr);
  return pass_result(feature, seen);
}

// A pass with composed LoRA. Of each matrix type "q", "k", ...: modules down (t + 1, L, in, r) and
// up (t + 1, L, r, out), of which the last is the current one, and weights omega (t, L) of the
// others. current, old, probes: (types, L).
at::Tensor lora_pass(const nn::VisionTransformer& vit, const at::Tensor& images,
                     const TensorMap& down, const TensorMap& up, const TensorMap& omega,
                     const at::Tensor& current, const at::Tensor& old,
                     const std::optional<at::Tensor>& probes) {
  const at::Tensor& query = down.at("q");
  const int64_t last = query.size(0) - 1;
  nn::ComposedLora lora(vit, current.size(0) == 6, query.size(1), query.size(3));
  for (nn::LoraGroup& group : lora.groups()) {
    std::vector<at::Tensor> a, b, old_a, old_b, weights;
    for (int64_t j = 0; j < group.types(); ++j) {
      const std::string type = nn::kMatrixTypes.at(static_cast<size_t>(group.first_type + j));
      a.push_back(down.at(type)[last]);
      b.push_back(up.at(type)[last]);
      old_a.push_back(down.at(type).narrow(0, 0, last).permute({1, 2, 0, 3}).flatten(2));
      old_b.push_back(up.at(type).narrow(0, 0, last).permute({1, 0, 2, 3}).flatten(1, 2));
      weights.push_back(omega.at(type).t());
    }
    group.down = at::stack(a, 1);
    group.up = at::stack(b, 1);
    group.old_down = at::stack(old_a, 1).detach();
    group.old_up = at::stack(old_b, 1).detach();
    group.omega = at::stack(weights, 1);
  }
  lora.train(current, old);
  nn::ComposedLora::Probes of_groups;
  for (const nn::LoraGroup& group : lora.groups()) {
    if (probes) {
      of_groups.push_back(probes->narrow(0, group.first_type, group.types()).unbind(1));
    }
  }
  return vit.class_feature(nn::pass_with_products(vit, images, lora.products(of_groups)));
}

at::Tensor fuse(const std::string& kind, const at::Tensor& channel, const at::Tensor& patch,
                const TensorMap& parameters, int64_t section, int64_t heads,
                const std::optional<at::Tensor>& head_mask, double dropout) {
  nn::Fusion fusion(kind, channel.size(1), section, heads, channel.options());
  for (nn::Fusion::Parameter& p : fusion.parameters()) {
    const auto found = parameters.find(p.name);
    NTKCL_CHECK(found != parameters.end(), "fuse", "expected the key '", p.name,
                "', but it is missing");
    NTKCL_CHECK(found->second.sizes() == p.value.sizes(), "fuse", p.name, ": expected ",
                p.value.sizes(), ", got ", found->second.sizes());
    p.value = found->second;
  }
  return fusion(channel, patch, head_mask.value_or(at::Tensor()), dropout);
}

}  // namespace

void init_nn(py::module_& m) {
  py::class_<nn::VisionTransformer>(m, "VisionTransformer",
                                    "A frozen vision transformer in timm's layout.")
      .def(py::init<const TensorMap&, int64_t, int64_t>(), py::arg("weights"), py::arg("heads"),
           py::arg("image_size") = 0)
      .def_property_readonly("width", &nn::VisionTransformer::width)
      .def_property_readonly("depth", &nn::VisionTransformer::depth)
      .def_property_readonly("heads", &nn::VisionTransformer::heads)
      .def_property_readonly("patch_size", &nn::VisionTransformer::patch_size)
      .def_property_readonly("image_size", &nn::VisionTransformer::image_size)
      .def_property_readonly("tokens", &nn::VisionTransformer::tokens)
      .def("embed", &nn::VisionTransformer::embed, py::arg("images"))
      .def(
          "features",
          [](const nn::VisionTransformer& vit, const at::Tensor& images) {
            const at::NoGradGuard no_grad;
            return nn::plain_pass(vit, vit.prefix(images));
          },
          py::arg("images"), py::call_guard<py::gil_scoped_release>(),
          "Class features (B, C) of normalised images (B, 3, S, S).");
  m.def("plain_pass", &plain_pass, py::arg("vit"), py::arg("images"), py::arg("trace") = false);
  m.def("channel_pass", &channel_pass, py::arg("vit"), py::arg("images"), py::arg("adapters"),
        py::arg("scale"), py::arg("masks") = std::vector<at::Tensor>{}, py::arg("dropout") = 0.0,
        py::arg("trace") = false);
  m.def("lora_pass", &lora_pass, py::arg("vit"), py::arg("images"), py::arg("down"), py::arg("up"),
        py::arg("omega"), py::arg("current"), py::arg("old"), py::arg("probes") = py::none());
  m.def("patch_pass", &patch_pass, py::arg("vit"), py::arg("images"), py::arg("prompts"),
        py::arg("scale"), py::arg("trace") = false);
  m.def("fuse", &fuse, py::arg("kind"), py::arg("channel"), py::arg("patch"), py::arg("parameters"),
        py::arg("section"), py::arg("heads") = 8, py::arg("head_mask") = std::nullopt,
        py::arg("dropout") = 0.0);
  m.attr("fusion_kinds") = nn::Fusion::kinds();
  m.def("cosines", &nn::cosines, py::arg("x"), py::arg("weight"));
  m.def("cosine_logits", &nn::cosine_logits, py::arg("x"), py::arg("weight"), py::arg("sigma"));

  namespace losses = methods::ntk_cl;
  m.def("old_basis", &losses::old_basis, py::arg("prototypes"), py::arg("limit"));
  m.def("signed_direction", &losses::signed_direction, py::arg("basis"));
}

}  // namespace ntkcl::bindings
