#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <pybind11/stl.h>

#include <numeric>

#include "bindings.h"
#include "ntkcl/core/error.h"
#include "ntkcl/methods/ntk_cl/ntk_cl.h"
#include "ntkcl/methods/table.h"
#include "ntkcl/train/compute_setup.h"
#include "ntkcl/train/pending_losses.h"
#include "ntkcl/train/step_replay.h"

namespace ntkcl::bindings {
namespace {

using methods::Draw;

// Draws that a Python function gives: fn(purpose, task, step, list, layer) -> tensor or None.
class RecordedRandom : public methods::RandomSource {
 public:
  RecordedRandom(uint64_t seed, py::function fn) : RandomSource(seed), fn_(std::move(fn)) {}
  // NOLINTNEXTLINE(bugprone-exception-escape): pybind11 throws only where no interpreter runs
  ~RecordedRandom() override {
    const py::gil_scoped_acquire gil;
    fn_ = py::function();
  }

  std::optional<at::Tensor> recorded(const Draw& draw) override {
    const py::gil_scoped_acquire gil;
    const py::object value = fn_(draw.purpose, draw.task, draw.step, draw.list, draw.layer);
    return value.is_none() ? std::nullopt : std::make_optional(value.cast<at::Tensor>());
  }

 private:
  py::function fn_;
};

// One method outside the task loop, step by step: for benchmarks, tests and looking inside. `train`
// holds keys of TrainOptions (device: cpu unless given); with `as_run`, threads, matrix products
// and memory are set up as in a run for as long as the session lives.
class MethodSession : private methods::TaskServices {
 public:
  MethodSession(const std::string& method, const py::dict& method_options,
                const nn::VisionTransformer& backbone, int64_t tasks, const py::dict& train,
                const std::optional<py::function>& draws, bool as_run)
      : options_(train_options(train)),
        vit_(train::prepare_backbone(backbone, options_)),
        random_(draws ? recorded_random(0, *draws) : std::make_unique<methods::RandomSource>(0)) {
    if (as_run) {
      scope_.emplace(options_, vit_.options().device());
    }
    const methods::MethodEntry& entry = methods::find_method(method);
    method_ = entry.make(option_map(method_options, entry.section), vit_, tasks, *random_);
    info_.count = tasks;
  }

  void begin_task(int64_t index, int64_t n_old, int64_t n_new, int64_t increment,
                  int64_t batch_size, const at::Tensor& images, const at::Tensor& labels,
                  int64_t classes, int64_t steps) {
    std::vector<int64_t> class_ids(static_cast<size_t>(std::max(classes, n_old + n_new)));
    std::iota(class_ids.begin(), class_ids.end(), 0);
    info_ = {.index = index,
             .count = info_.count,
             .n_old = n_old,
             .n_new = n_new,
             .increment = increment,
             .batch_size = batch_size,
             .class_ids = std::move(class_ids),
             .sizes = std::vector<int64_t>(static_cast<size_t>(index) + 1, increment)};
    info_.sizes.back() = n_new;
    if (index > 0) {
      info_.sizes.front() = n_old - (index - 1) * increment;
    }
    steps_ = steps;
    images_ = to_device(images, labels);
    step_ = 0;
    method_->before_task(*this);
    auto groups = method_->trained(info_);
    optimizer_ = groups.empty() ? nullptr : optim::make_optimizer(options_.optimizer, groups);
    replay_.reset();
    if (optimizer_ && options_.cuda_graph) {
      replay_ = std::make_unique<train::StepReplay>(
          *method_, *random_, groups, batch_size, vit_.options().device(),
          [this](const methods::Batch& batch, const methods::StepInfo& step) {
            return method_->gradients(batch, step, *this);
          });
    }
  }

  // {"losses": {name: value}, "gradients": [of each parameter, in the groups' order]} of the
  // optimiser's last pass; "passes": the same of all. Steps that tell their gradients are never
  // replayed.
  py::dict step(const at::Tensor& images, const at::Tensor& labels, double learning_rate,
                bool with_gradients) {
    NTKCL_CHECK(optimizer_ != nullptr, "step",
                "expected a task that trains, begun and not yet at its stages");
    const methods::Batch batch = to_device(images, labels);
    std::vector<methods::Losses> losses;
    std::vector<std::vector<at::Tensor>> gradients;
    {
      const py::gil_scoped_release release;
      optimizer_->set_learning_rate(learning_rate);
      optimizer_->step([&](int pass) {
        const methods::StepInfo info{
            .step = step_, .pass = pass, .passes = optimizer_->passes(), .steps = steps_};
        const bool replays = replay_ && !with_gradients;
        losses.push_back(replays ? replay_->gradients(batch, info)
                                 : method_->gradients(batch, info, *this));
        gradients.push_back(with_gradients ? parameter_gradients() : std::vector<at::Tensor>());
      });
    }
    ++step_;
    py::list passes;
    for (size_t pass = 0; pass < losses.size(); ++pass) {
      py::dict values, of_pass;
      for (const auto& [name, value] : train::PendingLosses(losses[pass]).values()) {
        values[py::str(name)] = value;
      }
      of_pass["losses"] = values;
      of_pass["gradients"] = gradients[pass];
      passes.append(of_pass);
    }
    py::dict result(passes[passes.size() - 1]);
    result["passes"] = passes;
    return result;
  }

  void run_stages() {
    const py::gil_scoped_release release;
    replay_.reset();
    optimizer_.reset();
    for (const std::string& stage : method_->stages(info_)) {
      method_->run_stage(stage, *this);
    }
  }

  // By name: NTK-CL's of the two sub-networks and their fusion, another method's "features".
  methods::State features(const at::Tensor& images) const {
    const auto* ntk_cl = dynamic_cast<const methods::ntk_cl::NtkCl*>(method_.get());
    if (!ntk_cl) {
      return {{"features", method_->features_of(images.to(vit_.options()))}};
    }
    const methods::ntk_cl::Features f = ntk_cl->features(images.to(vit_.options()));
    methods::State named{{"channel", f.channel}, {"patch", f.patch}, {"fused", f.fused}};
    std::erase_if(named, [](const auto& entry) { return !entry.second.defined(); });
    return named;
  }
  at::Tensor scores(const at::Tensor& images) const {
    const py::gil_scoped_release release;
    return method_->scores(images.to(vit_.options())).classes;
  }
  methods::Method& method() { return *method_; }
  methods::State optimizer_state() {
    if (!optimizer_) {
      return {};
    }
    return methods::copy_state(methods::visit_of(*optimizer_));
  }

 private:
  const methods::TaskInfo& task() const override { return info_; }
  methods::RandomSource& random() override { return replay_ ? replay_->random() : *random_; }
  void for_each_image(const std::string&, const methods::BatchFn& fn) override { fn(images_); }
  // The images are given: they are shuffled alone.
  void for_each_augmented(const std::string&, const Draw& order,
                          const methods::BatchFn& fn) override {
    const at::Tensor places = random_->permutation(order, images_.labels.size(0));
    const at::Tensor here = places.to(images_.labels.device());
    fn({images_.images.index_select(0, here), images_.labels.index_select(0, here), places, {}});
  }
  void average_gradients(const std::vector<at::Tensor>&) override {}  // of one rank
  void evaluate(const std::string&) override {}
  void progress(const std::string&, int64_t, int64_t) override {}

  static train::TrainOptions train_options(const py::dict& values) {
    train::TrainOptions options;
    options.device = "cpu";
    apply(option_map(values, "train"), options, "train");
    return options;
  }

  methods::Batch to_device(const at::Tensor& images, const at::Tensor& labels) const {
    return {images.to(vit_.options()), labels.to(vit_.options().device())};
  }

  std::vector<at::Tensor> parameter_gradients() const {
    std::vector<at::Tensor> gradients;
    for (const optim::ParameterGroup& group : optimizer_->groups()) {
      for (const at::Tensor& p : group.parameters) {
        gradients.push_back(p.grad().defined() ? p.grad().clone() : at::zeros_like(p));
      }
    }
    return gradients;
  }

  train::TrainOptions options_;
  std::optional<train::ComputeScope> scope_;
  nn::VisionTransformer vit_;
  std::unique_ptr<methods::RandomSource> random_;
  std::unique_ptr<methods::Method> method_;
  std::unique_ptr<optim::Optimizer> optimizer_;
  std::unique_ptr<train::StepReplay> replay_;
  methods::TaskInfo info_;
  methods::Batch images_;
  int64_t step_ = 0, steps_ = 0;
};

}  // namespace

std::unique_ptr<methods::RandomSource> recorded_random(uint64_t seed, py::function fn) {
  return std::make_unique<RecordedRandom>(seed, std::move(fn));
}

void init_methods(py::module_& m) {
  m.def("list_in_use", &methods::ntk_cl::list_in_use, py::arg("frozen_lists"), py::arg("task"),
        py::arg("tasks"));
  py::class_<MethodSession>(m, "MethodSession", "One method outside the task loop, step by step.")
      .def(py::init<const std::string&, const py::dict&, const nn::VisionTransformer&, int64_t,
                    const py::dict&, const std::optional<py::function>&, bool>(),
           py::arg("method"), py::arg("method_options"), py::arg("backbone"), py::arg("tasks"),
           py::arg("train") = py::dict(), py::arg("draws") = py::none(), py::arg("as_run") = false)
      .def("begin_task", &MethodSession::begin_task, py::arg("index"), py::arg("n_old"),
           py::arg("n_new"), py::arg("increment"), py::arg("batch_size"), py::arg("images"),
           py::arg("labels"), py::arg("classes") = 0, py::arg("steps") = 0,
           "Images (n, 3, S, S) and labels of the task, for its statistics; classes of all tasks "
           "and steps of this one, 0 where not known.")
      .def("step", &MethodSession::step, py::arg("images"), py::arg("labels"),
           py::arg("learning_rate"), py::arg("gradients") = true)
      .def("run_stages", &MethodSession::run_stages)
      .def("features", &MethodSession::features, py::arg("images"),
           py::call_guard<py::gil_scoped_release>())
      .def("scores", &MethodSession::scores, py::arg("images"))
      .def("state",
           [](MethodSession& s) { return methods::copy_state(methods::visit_of(s.method())); })
      .def("optimizer_state", &MethodSession::optimizer_state)
      .def(
          "load_state",
          [](MethodSession& s, const methods::State& state) {
            methods::load_state(methods::visit_of(s.method()), state,
                                {.whole = false, .same_types = false});
          },
          py::arg("state"));
}

}  // namespace ntkcl::bindings
