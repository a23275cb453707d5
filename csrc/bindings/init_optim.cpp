#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "ntkcl/ops/sam_step.h"
#include "ntkcl/optim/gradient_clipping.h"
#include "ntkcl/optim/optimizer.h"
#include "ntkcl/optim/running_mean.h"
#include "ntkcl/optim/schedule.h"

namespace ntkcl::bindings {
namespace {

using optim::Optimizer;
using optim::ParameterGroup;
using Tensors = std::vector<at::Tensor>;

template <class Options>
Options options_from(const py::dict& values, const std::string& where) {
  Options options;
  apply(option_map(values, where), options, where);
  return options;
}

std::unique_ptr<Optimizer> make_optimizer(const py::dict& options,
                                          std::vector<ParameterGroup> groups) {
  return optim::make_optimizer(options_from<optim::OptimizerOptions>(options, "optimizer"),
                               std::move(groups));
}

py::dict optimizer_state(Optimizer& optimizer) {
  py::dict state;
  optimizer.visit_state(
      [&](const std::string& name, at::Tensor& value) { state[py::str(name)] = py::cast(value); });
  return state;
}

void init_optimizer(py::module_& m) {
  py::class_<ParameterGroup>(m, "ParameterGroup", "Parameters that share their settings.")
      .def(py::init<std::string, Tensors, double, bool, int64_t>(), py::arg("name"),
           py::arg("parameters"), py::arg("learning_rate_scale") = 1.0, py::arg("decays") = true,
           py::arg("stacked_dims") = 0)
      .def_readonly("name", &ParameterGroup::name)
      .def_readonly("parameters", &ParameterGroup::parameters)
      .def_readonly("learning_rate_scale", &ParameterGroup::learning_rate_scale)
      .def_readonly("decays", &ParameterGroup::decays);
  py::class_<Optimizer>(m, "Optimizer", "An optimiser, as make_optimizer builds it.")
      .def("set_learning_rate", py::overload_cast<double>(&Optimizer::set_learning_rate),
           py::arg("rate"), "Each group runs at rate times its learning_rate_scale.")
      .def(
          "set_learning_rate",
          [](Optimizer& optimizer, double rate, size_t group) {
            optimizer.set_learning_rate(group, rate);
          },
          py::arg("rate"), py::arg("group"), "The rate of the group of that index.")
      .def("learning_rate", &Optimizer::learning_rate, py::arg("group"),
           "The rate of the group of that index.")
      .def_property_readonly("passes", &Optimizer::passes, "How often a step asks for gradients.")
      .def("step", &Optimizer::step, py::arg("gradients"),
           "One step; gradients(pass) fills .grad of the parameters. An undefined gradient counts "
           "as zero.")
      .def("state", &optimizer_state,
           "All that a resumed run needs, by name; the tensors are the optimiser's own.");
  m.def("make_optimizer", &make_optimizer, py::arg("options"), py::arg("groups"),
        "The optimiser options['optimizer'] (sgd, adam, adamw, sam, sam+) over parameter groups; "
        "its learning "
        "rate is 0 until one is set.");
  m.def(
      "make_optimizer",
      [](const py::dict& options, Tensors parameters) {
        return make_optimizer(options, {{"parameters", std::move(parameters)}});
      },
      py::arg("options"), py::arg("parameters"), "The same over one group of parameters.");
}

}  // namespace

void init_optim(py::module_& m) {
  init_optimizer(m);
  m.def(
      "learning_rate_at",
      [](const py::dict& options, double base, int64_t epoch, int64_t epochs) {
        const auto parsed = options_from<optim::ScheduleOptions>(options, "schedule");
        return optim::learning_rate_at(parsed, base, epoch, epochs);
      },
      py::arg("options"), py::arg("base"), py::arg("epoch"), py::arg("epochs"),
      "Learning rate of an epoch of a task under a schedule (cosine, multistep, constant).");
  m.def(
      "schedule_learning_rates",
      [](Optimizer& optimizer, const py::dict& options, double base, int64_t epoch,
         int64_t epochs) {
        const auto parsed = options_from<optim::ScheduleOptions>(options, "schedule");
        return optim::schedule_learning_rates(optimizer, parsed, base, epoch, epochs);
      },
      py::arg("optimizer"), py::arg("options"), py::arg("base"), py::arg("epoch"),
      py::arg("epochs"),
      "Sets every group's rate from base times its learning_rate_scale; all share the floor.");
  m.def("sam_plus_gamma", &ops::sam_plus_gamma, py::arg("cos"), py::arg("tau"),
        "SAM+: clamp(tau (1 - exp(cos - 1)), 0, 1).");
  m.def(
      "clip_grad_norm_",
      [](const Tensors& parameters, double max_norm) {
        return optim::clip_grad_norm_(parameters, max_norm);
      },
      py::arg("parameters"), py::arg("max_norm"),
      "Scales the gradients by min(1, max_norm / (norm + 1e-6)); returns the norm before.");
  m.def(
      "running_mean_",
      [](const Tensors& previous, const Tensors& current, int64_t n) {
        optim::running_mean_(previous, current, n);
      },
      py::arg("previous"), py::arg("current"), py::arg("n"),
      "previous <- n/(n+1) previous + 1/(n+1) current, tensor by tensor.");
}

}  // namespace ntkcl::bindings
