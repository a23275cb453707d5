#include <ATen/ATen.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "ntkcl/core/error.h"
#include "ntkcl/methods/gaussian_alignment.h"
#include "ntkcl/methods/raa/raa.h"
#include "ntkcl/nn/cosine_head.h"

// The parts of RAA, one by one: for tests and for looking inside.
namespace ntkcl::bindings {
namespace {

using stats::ClassGaussians;

nn::BranchList branches_of(const std::vector<at::Tensor>& tensors) {
  NTKCL_CHECK(tensors.size() == 4, "branches",
              "expected 4 tensors (down weight, bias, up weight, bias), got ", tensors.size());
  return {tensors.at(0), tensors.at(1), tensors.at(2), tensors.at(3)};
}

// Streams of every branch, and of their mixture in the mode "paper", "code" or "none".
nn::Streams streams_of(const nn::BranchList& branches, const at::Tensor& alpha,
                       const std::string& mode) {
  NTKCL_CHECK(mode == "paper" || mode == "code" || mode == "none", "mode",
              "expected paper, code or none, got '", mode, "'");
  const std::vector<int64_t> sizes{branches.down_weight.size(1), branches.branches()};
  NTKCL_CHECK(mode == "none" || alpha.sizes() == at::IntArrayRef(sizes), "alpha", "expected ",
              at::IntArrayRef(sizes), ", got ", alpha.sizes());
  if (mode == "paper") {
    return {.adapters = branches.joined(branches.mixed(alpha))};
  }
  return {.adapters = branches, .shares = mode == "code" ? alpha : at::Tensor()};
}

void init_passes(py::module_& m) {
  m.def(
      "stream_adapters",
      [](const at::Tensor& hidden, const std::vector<at::Tensor>& branches, const at::Tensor& alpha,
         const std::string& mode) {
        return nn::stream_adapters(hidden, streams_of(branches_of(branches), alpha, mode), 0, {});
      },
      py::arg("hidden"), py::arg("branches"), py::arg("alpha"), py::arg("mode"),
      "What adapters (n, 1, ...) and their mixture add to hidden (n + 1, b, T, C).");
  m.def(
      "stream_block",
      [](const nn::VisionTransformer& vit, const at::Tensor& x,
         const std::vector<at::Tensor>& branches, const at::Tensor& alpha, const std::string& mode,
         int64_t block, double scale) {
        return nn::stream_block(vit, x, streams_of(branches_of(branches), alpha, mode), block,
                                scale, {});
      },
      py::arg("vit"), py::arg("x"), py::arg("branches"), py::arg("alpha"), py::arg("mode"),
      py::arg("block"), py::arg("scale"), "One block of all streams (n + 1, b, T, C).");
  m.def(
      "stream_pass",
      [](const nn::VisionTransformer& vit, const at::Tensor& images,
         const std::vector<at::Tensor>& branches, const at::Tensor& alpha, const std::string& mode,
         double scale, const std::vector<at::Tensor>& masks, double dropout) {
        std::vector<nn::Dropout> masked;
        for (const at::Tensor& mask : masks) {
          masked.push_back({.p = dropout, .mask = mask});
        }
        return nn::stream_pass(vit, vit.prefix(images),
                               streams_of(branches_of(branches), alpha, mode), scale, masked);
      },
      py::arg("vit"), py::arg("images"), py::arg("branches"), py::arg("alpha"), py::arg("mode"),
      py::arg("scale"), py::arg("masks") = std::vector<at::Tensor>{}, py::arg("dropout") = 0.0,
      "Class features (streams, b, C) of branches (n, L, ...) [down weight, bias, up weight, bias] "
      "and their mixture by alpha (L, n).");
  m.def(
      "merged_branches",
      [](const std::vector<at::Tensor>& branches) {
        return branches_of(branches).mean().tensors();
      },
      py::arg("branches"), "Their mean: (n, L, ...) -> (L, ...) of each kind.");
  m.def("cosface", &methods::raa::cosface, py::arg("features"), py::arg("weight"),
        py::arg("labels"), py::arg("scale"), py::arg("margin"), "Each row's loss, (n).");
  m.def("tasks_of_classes", &methods::raa::tasks_of_classes, py::arg("sizes"),
        py::arg("kind") = "cumulative");
  m.def("shares_of", &methods::raa::shares_of, py::arg("uniform"),
        py::arg("kind") = "uniform_norm");
}

void init_alignment(py::module_& m) {
  py::class_<ClassGaussians>(m, "ClassGaussians", "Classes as a Gaussian each over features.")
      .def(py::init([](int64_t width, const at::Tensor& like) {
             return ClassGaussians(width, like.options());
           }),
           py::arg("width"), py::arg("like"), "Of the type and device of `like`.")
      .def("add_class", &ClassGaussians::add_class, py::arg("rows"), py::arg("eps"))
      .def("keep", &ClassGaussians::keep, py::arg("count"))
      .def("move", &ClassGaussians::move, py::arg("shift"))
      .def_property_readonly("classes", &ClassGaussians::classes)
      .def_property_readonly("means", &ClassGaussians::means)
      .def("factor", &ClassGaussians::factor, py::arg("number"))
      .def("draw", &ClassGaussians::draw, py::arg("number"), py::arg("scale"), py::arg("normals"));
  py::class_<methods::GaussianDraws>(m, "GaussianDraws")
      .def(py::init([](std::function<at::Tensor(int64_t, int64_t)> permutation,
                       std::function<at::Tensor(int64_t, int64_t)> normals) {
             return methods::GaussianDraws{std::move(permutation), std::move(normals)};
           }),
           py::arg("permutation"), py::arg("normals"));
  m.def("mean_factors", &methods::mean_factors, py::arg("tasks"), py::arg("task"),
        py::arg("lowest"));
  m.def(
      "align_cosine_head",
      [](const at::Tensor& weight, const ClassGaussians& gaussians,
         const std::vector<double>& factors, double scale, int64_t epochs, double learning_rate,
         double momentum, double weight_decay, int64_t samples,
         const methods::GaussianDraws& draws) {
        return methods::align_on_gaussians(
                   {weight}, [&](const at::Tensor& x) { return nn::cosines(x, weight) * scale; },
                   gaussians, factors,
                   {.epochs = epochs,
                    .learning_rate = learning_rate,
                    .samples = samples,
                    .momentum = momentum,
                    .weight_decay = weight_decay},
                   draws)
            .losses;
      },
      py::arg("weight"), py::arg("gaussians"), py::arg("factors"), py::arg("scale"),
      py::arg("epochs"), py::arg("learning_rate"), py::arg("momentum"), py::arg("weight_decay"),
      py::arg("samples"), py::arg("draws"), py::call_guard<py::gil_scoped_release>(),
      "Trains the head on draws from class Gaussians, in place; each step's cross-entropy.");
}

}  // namespace

void init_raa(py::module_& m) {
  init_passes(m);
  init_alignment(m);
}

}  // namespace ntkcl::bindings
