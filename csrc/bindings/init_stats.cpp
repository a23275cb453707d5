#include <pybind11/stl.h>

#include "bindings.h"
#include "ntkcl/stats/drift.h"
#include "ntkcl/stats/metrics.h"
#include "ntkcl/stats/prototypes.h"

namespace ntkcl::bindings {
namespace {

using stats::ClassMeans;
using stats::Evaluation;
using stats::Summary;

void init_metrics(py::module_& m) {
  py::class_<Evaluation>(m, "Evaluation",
                         "The test after one task on all seen classes; accuracies in percent.")
      .def(py::init<std::vector<int64_t>, int64_t>(), py::arg("task_sizes"), py::arg("task"))
      .def(
          "add",
          [](Evaluation& e, const at::Tensor& labels, const at::Tensor& scores,
             const std::optional<at::Tensor>& task) {
            e.add(labels, scores, task.value_or(at::Tensor()));
          },
          py::arg("labels"), py::arg("scores"), py::arg("task") = py::none(),
          "A batch: int64 labels (b), scores (b, n_seen or more), tasks inferred (b).")
      .def_property_readonly("task", &Evaluation::task, "Index of the task just learned, from 0.")
      .def_property_readonly("seen_classes", &Evaluation::seen_classes)
      .def_property_readonly("count", &Evaluation::count, "Images added.")
      .def_property_readonly("labels", &Evaluation::labels, "(count), int64.")
      .def_property_readonly("predictions", &Evaluation::predictions, "(count), int64.")
      .def_property_readonly("confidences", &Evaluation::confidences,
                             "(count), float32: softmax of the scores at the prediction.")
      .def_property_readonly("top1", &Evaluation::top1, "A_t.")
      .def_property_readonly("top5", &Evaluation::top5, "NaN with 5 seen classes or fewer.")
      .def_property_readonly("per_task", &Evaluation::per_task, "Top-1 on each seen task.")
      .def_property_readonly("old_classes", &Evaluation::old_classes,
                             "Top-1 on the classes of earlier tasks.")
      .def_property_readonly("new_classes", &Evaluation::new_classes,
                             "Top-1 on the classes of this task.")
      .def_property_readonly("task_id", &Evaluation::task_id,
                             "Predicted class lies in the image's task.")
      .def_property_readonly("within_task", &Evaluation::within_task,
                             "Best class of the image's own task is the right one.")
      .def_property_readonly("inferred_task", &Evaluation::inferred_task,
                             "The task inferred is the image's; NaN where none was.");
  py::class_<Summary>(m, "Summary", "Metrics of a run of T tasks, in percent.")
      .def_readonly("accuracy_matrix", &Summary::accuracy_matrix,
                    "(T, T): [i][j] on task j after task i, NaN for j > i.")
      .def_readonly("accuracy", &Summary::accuracy, "A_t, over all test images.")
      .def_readonly("task_mean", &Summary::task_mean, "The same with tasks weighing equally.")
      .def_readonly("final_accuracy", &Summary::final_accuracy)
      .def_readonly("average_accuracy", &Summary::average_accuracy)
      .def_readonly("final_task_mean", &Summary::final_task_mean)
      .def_readonly("average_task_mean", &Summary::average_task_mean)
      .def_readonly("forgetting", &Summary::forgetting)
      .def_readonly("backward_transfer", &Summary::backward_transfer);
  m.def("summarize", &stats::summarize, py::arg("evaluations"),
        "Metrics of a run from the evaluations after tasks 0 .. T - 1.");
  m.def("forgetting", &stats::forgetting, py::arg("accuracy_matrix"),
        "Mean over tasks k < T - 1 of max_{i < T - 1} a[i][k] - a[T-1][k]; 0 for T = 1.");
  m.def("backward_transfer", &stats::backward_transfer, py::arg("accuracy_matrix"),
        "Mean over tasks k < T - 1 of a[T-1][k] - a[k][k]; 0 for T = 1.");
}

}  // namespace

void init_stats(py::module_& m) {
  init_metrics(m);
  py::class_<ClassMeans>(m, "ClassMeans", "Mean feature of each class, summed in float64.")
      .def(py::init<int64_t, int64_t, int64_t>(), py::arg("first_class"), py::arg("classes"),
           py::arg("width"))
      .def("add", &ClassMeans::add, py::arg("features"), py::arg("labels"),
           "A batch: features (b, width), int64 labels (b).")
      .def_property_readonly("counts", &ClassMeans::counts, "Images of each class.")
      .def("result", &ClassMeans::result, py::arg("dtype"),
           "(classes, width) in dtype; ValueError names a class without an image.");
  m.def("section_drift", &stats::section_drift, py::arg("before"), py::arg("after"),
        py::arg("prototypes"), py::arg("section_width"), py::arg("tau"),
        "Shift of old prototypes by section (NTK-CL): (n, D), (n, D), (k, D) -> (k, D).");
  m.def("gaussian_drift", &stats::gaussian_drift, py::arg("before"), py::arg("after"),
        py::arg("prototypes"), py::arg("sigma"), py::arg("floor") = 1e-5,
        "Shift of old prototypes (RAA 5.2): (n, D), (n, D), (k, D) -> (k, D).");
}

}  // namespace ntkcl::bindings
