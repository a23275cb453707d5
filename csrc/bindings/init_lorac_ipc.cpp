#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "ntkcl/methods/head_alignment.h"
#include "ntkcl/methods/lorac_ipc/importance.h"
#include "ntkcl/methods/lorac_ipc/orthogonality.h"
#include "ntkcl/methods/lorac_ipc/test_features.h"
#include "ntkcl/stats/cluster_gaussians.h"
#include "ntkcl/stats/kmeans.h"

// The parts of LoRAC-IPC, one by one: for tests and for looking inside.
namespace ntkcl::bindings {
namespace {

using methods::lorac_ipc::ImportanceAverage;
using methods::lorac_ipc::Orthogonality;
using stats::ClusterGaussians;

void init_importance(py::module_& m) {
  py::class_<ImportanceAverage>(m, "ImportanceAverage",
                                "Smoothed importance and uncertainty of each weight matrix.")
      .def(py::init<double, double, bool>(), py::arg("mean_decay") = 0.85,
           py::arg("uncertainty_decay") = 0.85, py::arg("plain") = false)
      .def("add", &ImportanceAverage::add, py::arg("importance"), "One step's (types, blocks).")
      .def_property_readonly("mean", &ImportanceAverage::mean)
      .def_property_readonly("uncertainty", &ImportanceAverage::uncertainty)
      .def("score", &ImportanceAverage::score, "mean * uncertainty, (types, blocks).");
  m.def(
      "freeze_important",
      [](const at::Tensor& mask, const at::Tensor& score, double threshold, bool of_new,
         std::string rule) {
        return methods::lorac_ipc::freeze_important(mask, score,
                                                    {threshold, of_new, std::move(rule)});
      },
      py::arg("mask"), py::arg("score"), py::arg("threshold"), py::arg("of_new") = false,
      py::arg("rule") = "exact", "The masks of the next task: 1 free, 0 frozen.");
}

void init_head_alignment(py::module_& m) {
  py::class_<methods::AlignmentDraws>(m, "AlignmentDraws")
      .def(py::init([](std::function<at::Tensor(int64_t, int64_t)> permutation,
                       std::function<at::Tensor(int64_t, const at::Tensor&)> normals) {
             return methods::AlignmentDraws{std::move(permutation), std::move(normals)};
           }),
           py::arg("permutation"), py::arg("normals"));
  m.def("cluster_moments", &methods::cluster_moments, py::arg("rows"), py::arg("labels"),
        py::arg("clusters"), "Mean and biased variance of each cluster: (K, C) twice.");
  m.def(
      "align_head",
      [](const at::Tensor& weight, const at::Tensor& bias,
         const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& norm_bias,
         const at::Tensor& means, const at::Tensor& variances, int64_t n_old, int64_t epochs,
         double learning_rate, int64_t rows, methods::AlignmentDraws draws) {
        return methods::align_head(
            {weight, bias, norm_weight.value_or(at::Tensor()), norm_bias.value_or(at::Tensor())},
            methods::draws_of(methods::FeatureClusters{means, variances}, rows), n_old,
            {.epochs = epochs, .learning_rate = learning_rate, .rows = rows}, draws);
      },
      py::arg("weight"), py::arg("bias"), py::arg("norm_weight"), py::arg("norm_bias"),
      py::arg("means"), py::arg("variances"), py::arg("n_old"), py::arg("epochs"),
      py::arg("learning_rate"), py::arg("rows"), py::arg("draws"),
      py::call_guard<py::gil_scoped_release>(),
      "Trains the head on draws from clusters, in place; each step's cross-entropy.");
}

}  // namespace

void init_lorac_ipc(py::module_& m) {
  init_importance(m);
  py::class_<Orthogonality>(m, "Orthogonality", "|| Q^T Q - I ||_F with Q = [old, current].")
      .def(py::init<at::Tensor>(), py::arg("old"), "(blocks, in, columns), columns may be 0.")
      .def(
          "__call__",
          [](const Orthogonality& penalty, const at::Tensor& current) {
            const auto result = penalty(current);
            return std::make_pair(result.values, result.gradient);
          },
          py::arg("current"), "(blocks, in, r) -> values (blocks), gradient of their sum.");
  init_head_alignment(m);
  m.def("kmeans_plus_plus", &stats::kmeans_plus_plus, py::arg("x"), py::arg("draws"),
        "First centers: x (n, C), draws (k) uniform in [0, 1) -> (k or fewer, C).");
  m.def(
      "kmeans",
      [](const at::Tensor& x, const at::Tensor& centers, int64_t rounds) {
        const stats::Clusters clusters = stats::kmeans(x, centers, rounds);
        return std::make_pair(clusters.centers, clusters.labels);
      },
      py::arg("x"), py::arg("centers"), py::arg("rounds") = 300, "Lloyd: centers, labels.");
  m.def("votes", &methods::lorac_ipc::votes, py::arg("tasks"), py::arg("groups"),
        "The most frequent task of each group, for its members: (n), (n) -> (n).");
  py::class_<ClusterGaussians>(m, "ClusterGaussians",
                               "Classes as Gaussians over features, for task inference.")
      .def(py::init<>())
      .def("add_class", &ClusterGaussians::add_class, py::arg("rows"), py::arg("labels"))
      .def_property_readonly("classes", &ClusterGaussians::classes)
      .def("distances", &ClusterGaussians::distances, py::arg("features"), py::arg("first") = 0,
           "(b, C) -> (b, classes), squared Mahalanobis distance to the nearest cluster.");
}

}  // namespace ntkcl::bindings
