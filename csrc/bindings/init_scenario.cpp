#include <pybind11/stl.h>

#include "bindings.h"
#include "ntkcl/scenario/class_order.h"
#include "ntkcl/scenario/task_split.h"

namespace ntkcl::bindings {

void init_scenario(py::module_& m) {
  m.def("numpy_permutation", &scenario::numpy_permutation, py::arg("seed"), py::arg("n"),
        "numpy.random.RandomState(seed).permutation(n), bit for bit.");
  m.def("split_classes", &scenario::split_classes, py::arg("n_classes"), py::arg("initial"),
        py::arg("increment"),
        "Classes of each task: [initial, increment, increment, ..., rest]. ValueError for sizes "
        "that leave no sensible split.");
}

}  // namespace ntkcl::bindings
