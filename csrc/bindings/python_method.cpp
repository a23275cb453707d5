#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>

#include "bindings.h"
#include "ntkcl/core/error.h"
#include "ntkcl/methods/gathering.h"
#include "ntkcl/methods/peft.h"

namespace ntkcl::bindings {
namespace {

constexpr const char* kWhere = "method";

// What a hook gave back, as a tensor.
at::Tensor tensor_of(const py::object& value, const char* hook) {
  try {
    return value.cast<at::Tensor>();
  } catch (const py::cast_error&) {
    NTKCL_FAIL(TypeError, kWhere, "'", hook, "': expected a tensor, got ",
               py::str(py::type::of(value)).cast<std::string>());
  }
}

// A method written in Python over the C++ loop: the backbone's pass and the modules are here,
// everything above the features is there (python/ntkcl/methods.py says what it has to offer).
// Autograd goes through both.
class PythonMethod : public methods::Method {
 public:
  PythonMethod(py::object object, const nn::VisionTransformer& vit, methods::RandomSource& random);
  ~PythonMethod() override;

  bool trains(const methods::TaskInfo& task) const override;
  void before_task(methods::TaskServices& services) override;
  std::vector<optim::ParameterGroup> trained(const methods::TaskInfo& task) override;
  methods::Losses gradients(const methods::Batch& batch, const methods::StepInfo& step,
                            methods::TaskServices& services) override;
  std::vector<std::string> stages(const methods::TaskInfo& task) const override;
  void run_stage(const std::string& stage, methods::TaskServices& services) override;
  methods::Scores scores(const at::Tensor& images) const override;
  at::Tensor features_of(const at::Tensor& images) const override;
  // The modules' tensors, and those that the object keeps as attributes.
  void visit_state(const methods::StateVisitor& visitor) override;

 private:
  // With gradients to the modules where there are some.
  at::Tensor features(const at::Tensor& images) const;
  py::object task_of(const methods::TaskInfo& info) const;

  py::object object_;
  const nn::VisionTransformer& vit_;
  methods::RandomSource& random_;
  std::optional<methods::Peft> peft_;
  methods::TaskInfo task_;
};

PythonMethod::PythonMethod(py::object object, const nn::VisionTransformer& vit,
                           methods::RandomSource& random)
    : object_(std::move(object)), vit_(vit), random_(random) {
  const py::gil_scoped_acquire gil;
  if (const auto kind = object_.attr("peft").cast<std::string>(); kind != "none") {
    peft_.emplace(methods::PeftOptions{.kind = kind,
                                       .rank = object_.attr("rank").cast<int64_t>(),
                                       .scale = object_.attr("scale").cast<double>()},
                  vit);
    peft_->initialise(0, random);
  }
  object_.attr("width") = vit.width();
}

PythonMethod::~PythonMethod() {
  const py::gil_scoped_acquire gil;
  object_ = py::object();
}

py::object PythonMethod::task_of(const methods::TaskInfo& info) const {
  const auto make = py::module_::import("ntkcl.methods").attr("Task");
  const uint64_t seed = random_.key({"python", info.index});
  return make(py::arg("index") = info.index, py::arg("count") = info.count,
              py::arg("n_old") = info.n_old, py::arg("n_new") = info.n_new,
              py::arg("seed") = static_cast<int64_t>(seed >> 1));
}

bool PythonMethod::trains(const methods::TaskInfo& info) const {
  const py::gil_scoped_acquire gil;
  return object_.attr("trains")(task_of(info)).cast<bool>();
}

// ---- Training ----

void PythonMethod::before_task(methods::TaskServices& services) {
  const py::gil_scoped_acquire gil;
  object_.attr("before_task")(task_of(services.task()));
}

std::vector<optim::ParameterGroup> PythonMethod::trained(const methods::TaskInfo& info) {
  task_ = info;
  if (!trains(info)) {
    return {};
  }
  optim::ParameterGroup peft{.name = "peft", .parameters = {}},
      own{.name = "own", .parameters = {}};
  if (peft_) {
    peft.parameters = peft_->parameters();
  }
  {
    const py::gil_scoped_acquire gil;
    for (const py::handle value : object_.attr("parameters")()) {
      own.parameters.push_back(tensor_of(py::reinterpret_borrow<py::object>(value), "parameters"));
    }
  }
  std::vector<optim::ParameterGroup> groups;
  for (optim::ParameterGroup* group : {&peft, &own}) {
    for (const at::Tensor& parameter : group->parameters) {
      NTKCL_CHECK(parameter.is_leaf(), kWhere,
                  "'parameters': expected tensors that were not computed from others");
      parameter.requires_grad_(true);
    }
    if (!group->parameters.empty()) {
      groups.push_back(*group);
    }
  }
  return groups;
}

methods::Losses PythonMethod::gradients(const methods::Batch& batch, const methods::StepInfo&,
                                        methods::TaskServices& services) {
  const at::AutoGradMode record(true);  // also where the caller switched gradients off
  const at::Tensor rows = batch.whole(features(batch.images));
  at::Tensor loss;
  {
    const py::gil_scoped_acquire gil;
    loss = tensor_of(object_.attr("loss")(rows, batch.labels, task_of(task_)), "loss");
  }
  NTKCL_CHECK(loss.numel() == 1 && loss.is_floating_point(), kWhere,
              "'loss': expected one number, got ", loss.toString(), loss.sizes());
  NTKCL_CHECK(loss.requires_grad(), kWhere,
              "'loss': expected a number that depends on what is trained, got a constant");
  loss.reshape({}).backward();
  services.average_gradients({});
  return {{"total", loss.detach().reshape({})}};
}

at::Tensor PythonMethod::features(const at::Tensor& images) const {
  return peft_ ? peft_->features(images) : nn::plain_pass(vit_, vit_.prefix(images));
}

// ---- After training ----

std::vector<std::string> PythonMethod::stages(const methods::TaskInfo&) const {
  return {"after_task"};
}

void PythonMethod::run_stage(const std::string& stage, methods::TaskServices& services) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> rows, labels;
  services.for_each_image(stage, [&](const methods::Batch& batch) {
    rows.push_back(batch.whole(features(batch.images)));
    labels.push_back(batch.labels);
  });
  const at::Tensor all = methods::gathered(rows, services.task());
  const py::gil_scoped_acquire gil;
  object_.attr("after_task")(all, at::cat(labels), task_of(services.task()));
}

methods::Scores PythonMethod::scores(const at::Tensor& images) const {
  const at::NoGradGuard no_grad;
  const at::Tensor rows = features(images);
  const py::gil_scoped_acquire gil;
  return {tensor_of(object_.attr("scores")(rows), "scores")};
}

at::Tensor PythonMethod::features_of(const at::Tensor& images) const {
  const at::NoGradGuard no_grad;
  return features(images);
}

// ---- State ----

void PythonMethod::visit_state(const methods::StateVisitor& visitor) {
  if (peft_) {
    peft_->visit_state("peft.", visitor);
  }
  const py::gil_scoped_acquire gil;
  const at::NoGradGuard no_grad;
  const py::dict attributes = object_.attr("__dict__");
  std::map<std::string, at::Tensor> own;
  for (const auto& [name, value] : attributes) {
    if (THPVariable_Check(value.ptr())) {
      own[name.cast<std::string>()] = value.cast<at::Tensor>();
    }
  }
  for (auto& [name, tensor] : own) {
    const bool trained = tensor.requires_grad();
    at::Tensor value = tensor.detach();
    visitor("own." + name, value);
    if (value.sizes() != tensor.sizes()) {
      attributes[py::str(name)] = py::cast(value.detach().requires_grad_(trained));
    }
  }
}

}  // namespace

std::unique_ptr<methods::Method> make_python_method(py::object object,
                                                    const nn::VisionTransformer& vit,
                                                    methods::RandomSource& random) {
  return std::make_unique<PythonMethod>(std::move(object), vit, random);
}

}  // namespace ntkcl::bindings
