#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "bindings.h"
#include "ntkcl/core/error.h"
#include "ntkcl/train/predictor.h"
#include "ntkcl/train/trainer.h"

namespace ntkcl::bindings {
namespace {

py::dict event_dict(const train::Event& event) {
  py::dict dict;
  dict["event"] = event.name;
  for (const auto& [name, value] : event.fields) {
    dict[py::str(name)] = py::cast(value);
  }
  return dict;
}

py::dict evaluation_dict(const stats::Evaluation& e, size_t task) {
  py::dict dict;
  dict["task"] = task;
  dict["count"] = e.count();
  dict["top1"] = e.top1();
  dict["top5"] = e.top5();
  dict["per_task"] = e.per_task();
  dict["old_classes"] = e.old_classes();
  dict["new_classes"] = e.new_classes();
  dict["task_id"] = e.task_id();
  dict["within_task"] = e.within_task();
  dict["inferred_task"] = e.inferred_task();
  return dict;
}

py::dict result_dict(const train::RunResult& result, train::Trainer& trainer) {
  const stats::Summary& s = result.summary;
  py::dict dict;
  dict["accuracy_matrix"] = s.accuracy_matrix;
  dict["final_accuracy"] = s.final_accuracy;
  dict["average_accuracy"] = s.average_accuracy;
  dict["final_task_mean"] = s.final_task_mean;
  dict["average_task_mean"] = s.average_task_mean;
  dict["forgetting"] = s.forgetting;
  dict["backward_transfer"] = s.backward_transfer;
  py::list evaluations, predictions;
  for (size_t t = 0; t < result.evaluations.size(); ++t) {
    const stats::Evaluation& e = result.evaluations[t];
    evaluations.append(evaluation_dict(e, t));
    py::dict of_images;
    of_images["labels"] = e.labels();
    of_images["records"] = e.records();
    of_images["confidences"] = e.confidences();
    predictions.append(of_images);
  }
  dict["task_sizes"] = result.task_sizes;
  dict["forward_transfer"] = result.forward_transfer;
  dict["evaluations"] = evaluations;
  dict["predictions"] = predictions;
  dict["seconds"] = result.seconds;
  dict["training_seconds"] = result.training_seconds;
  dict["images_per_second"] =
      result.training_seconds > 0
          ? static_cast<double>(result.training_images) / result.training_seconds
          : 0.0;
  dict["trainable_parameters"] = result.trainable_parameters;
  dict["stored_parameters"] = result.stored_parameters;
  dict["skipped_images"] = result.skipped_images;
  dict["state"] = methods::copy_state(methods::visit_of(trainer.method()));
  return dict;
}

// Of a name and its options, or of an object with the hooks of a method.
methods::MakeMethod maker_of(const py::object& method, const py::dict& options) {
  if (py::isinstance<py::str>(method)) {
    const auto name = method.cast<std::string>();
    return methods::make_method(name, option_map(options, methods::find_method(name).section));
  }
  return [method](const nn::VisionTransformer& vit, int64_t, methods::RandomSource& random) {
    const py::gil_scoped_acquire gil;
    return make_python_method(method, vit, random);
  };
}

std::unique_ptr<train::Trainer> make_trainer(
    const py::object& method, const py::dict& method_options, const py::dict& train_options,
    const nn::VisionTransformer& backbone, const py::dict& dataset, const py::dict& transform,
    const py::dict& loader, const std::vector<double>& mean, const std::vector<double>& std,
    const std::optional<py::function>& draws,
    const std::optional<std::pair<std::string, std::string>>& group) {
  train::TrainOptions options;
  apply(option_map(train_options, "train"), options, "train");
  train::RunData data;
  data.train = dataset["train"].cast<std::shared_ptr<data::ImageStore>>();
  data.test = dataset["test"].cast<std::shared_ptr<data::ImageStore>>();
  data.class_order = dataset["class_order"].cast<std::vector<int64_t>>();
  if (dataset.contains("task_sizes")) {
    data.task_sizes = dataset["task_sizes"].cast<std::vector<int64_t>>();
    data.finished_classes = dataset["finished_classes"].cast<int64_t>();
  }
  data.mean = mean;
  data.std = std;
  apply(option_map(transform, "transform"), data.transform, "transform");
  apply(option_map(loader, "loader"), data.loader, "loader");
  auto random = draws ? recorded_random(static_cast<uint64_t>(options.seed), *draws) : nullptr;
  const methods::MakeMethod make = maker_of(method, method_options);
  const py::gil_scoped_release release;
  auto ranks = group ? dist::process_group(group->first, group->second) : dist::single();
  return std::make_unique<train::Trainer>(make, options, backbone, data, std::move(random),
                                          std::move(ranks));
}

// {"progress": {key: value}, "tensors": {name: tensor}}.
py::dict checkpoint_dict(train::Checkpoint checkpoint) {
  py::dict progress, dict;
  auto write = [&](const char* key, const auto& value) { progress[key] = py::cast(value); };
  checkpoint.progress.visit(write);
  dict["progress"] = progress;
  dict["tensors"] = std::move(checkpoint.tensors);
  return dict;
}

train::Checkpoint checkpoint_of(const py::dict& dict) {
  train::Checkpoint checkpoint;
  const auto progress = dict["progress"].cast<py::dict>();
  auto read = [&](const char* key, auto& value) {
    NTKCL_CHECK(progress.contains(key), "resume", "expected the key '", key, "', got none");
    try {
      using Value = std::decay_t<decltype(value)>;
      if (py::isinstance<py::bool_>(progress[key]) && !std::is_same_v<Value, bool>) {
        throw py::cast_error("a truth value");
      }
      value = progress[key].cast<Value>();
    } catch (const py::cast_error&) {
      NTKCL_FAIL(ValueError, "resume", "'", key, "': expected another kind of value, got ",
                 py::repr(progress[key]).cast<std::string>().substr(0, 80));
    }
  };
  checkpoint.progress.visit(read);
  checkpoint.tensors = dict["tensors"].cast<methods::State>();
  return checkpoint;
}

py::dict run(train::Trainer& trainer, const std::optional<py::function>& on_event,
             const std::optional<py::function>& should_stop,
             const std::optional<py::function>& on_checkpoint,
             const std::optional<py::dict>& checkpoint) {
  train::Hooks hooks;
  if (on_event) {
    hooks.listen = [&](const train::Event& event) {
      const py::gil_scoped_acquire gil;
      (*on_event)(event_dict(event));
    };
  }
  hooks.should_stop = [&] {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) {
      throw py::error_already_set();
    }
    return should_stop && (*should_stop)().cast<bool>();
  };
  if (on_checkpoint) {
    hooks.save = [&](const train::Checkpoint& saved) {
      const py::gil_scoped_acquire gil;
      (*on_checkpoint)(checkpoint_dict(saved));
    };
  }
  std::optional<train::Checkpoint> from;
  if (checkpoint) {
    from = checkpoint_of(*checkpoint);
  }
  train::RunResult result;
  {
    const py::gil_scoped_release release;
    result = trainer.run(hooks, from);
  }
  return result_dict(result, trainer);
}

std::unique_ptr<train::Predictor> make_predictor(
    const py::object& method, const py::dict& method_options, const py::dict& train_options,
    const nn::VisionTransformer& backbone, int64_t tasks, const py::dict& transform,
    const py::dict& loader, const std::vector<double>& mean, const std::vector<double>& std,
    const methods::State& state) {
  train::TrainOptions options;
  apply(option_map(train_options, "train"), options, "train");
  train::Predictor::Input input{.transform = {}, .loader = {}, .mean = mean, .std = std};
  apply(option_map(transform, "transform"), input.transform, "transform");
  apply(option_map(loader, "loader"), input.loader, "loader");
  const methods::MakeMethod make = maker_of(method, method_options);
  const py::gil_scoped_release release;
  return std::make_unique<train::Predictor>(make, options, backbone, tasks, std::move(input),
                                            state);
}

py::dict describe_options() {
  py::dict all;
  all["train"] = option_infos(describe<train::TrainOptions>());
  all["transform"] = option_infos(describe<data::TransformOptions>());
  all["loader"] = option_infos(describe<data::LoaderOptions>());
  py::dict by_name;
  for (const methods::MethodEntry& entry : methods::method_table()) {
    py::dict method, variants;
    method["section"] = entry.section;
    method["doc"] = entry.doc;
    method["options"] = option_infos(entry.options);
    for (const auto& [name, values] : entry.variants) {
      variants[py::str(name)] = option_dict(values);
    }
    method["variants"] = variants;
    method["defaults"] = option_dict(entry.defaults);
    by_name[py::str(entry.name)] = method;
  }
  all["methods"] = by_name;
  return all;
}

}  // namespace

void init_train(py::module_& m) {
  m.def("describe_options", &describe_options, "Every option: key, type, default, allowed, doc.");
  py::class_<train::Predictor>(m, "Predictor", "A trained method outside its run.")
      .def(py::init(&make_predictor), py::arg("method"), py::arg("method_options"),
           py::arg("train_options"), py::arg("backbone"), py::arg("tasks"), py::arg("transform"),
           py::arg("loader"), py::arg("mean"), py::arg("std"), py::arg("state"))
      .def(
          "scores",
          [](const train::Predictor& p, std::shared_ptr<data::ImageStore> images) {
            methods::Scores scores;
            {
              const py::gil_scoped_release release;
              scores = p.scores(std::move(images));
            }
            return std::pair(scores.classes, scores.task.defined() ? std::make_optional(scores.task)
                                                                   : std::nullopt);
          },
          py::arg("images"), "Scores (n, classes) and, of some methods, tasks inferred (n).")
      .def("scores_of", &train::Predictor::scores_of, py::arg("images"),
           py::call_guard<py::gil_scoped_release>(),
           "Scores (B, classes) of transformed uint8 images (B, 3, S, S).")
      .def("features", &train::Predictor::features, py::arg("images"),
           py::call_guard<py::gil_scoped_release>(), "(n, D), by the last task's weights.");
  py::class_<train::Trainer>(m, "Trainer", "The task loop of one run.")
      .def(py::init(&make_trainer), py::arg("method"), py::arg("method_options"),
           py::arg("train_options"), py::arg("backbone"), py::arg("dataset"), py::arg("transform"),
           py::arg("loader"), py::arg("mean"), py::arg("std"), py::arg("draws") = py::none(),
           py::arg("group") = py::none(),
           "`group`: names of torch.distributed's process groups of the ranks that train together, "
           "one for the device's tensors and one for the CPU's.")
      .def("begin_after", &train::Trainer::begin_after, py::arg("tasks"), py::arg("learned"),
           "Begins after tasks that were learned elsewhere.")
      .def("run", &run, py::arg("on_event") = py::none(), py::arg("should_stop") = py::none(),
           py::arg("on_checkpoint") = py::none(), py::arg("checkpoint") = py::none())
      .def(
          "state",
          [](train::Trainer& t) { return methods::copy_state(methods::visit_of(t.method())); },
          "Every tensor of the method by name, as copies.")
      .def(
          "load_state",
          [](train::Trainer& t, const methods::State& state, bool partial) {
            methods::load_state(methods::visit_of(t.method()), state,
                                {.whole = !partial, .same_types = false});
          },
          py::arg("state"), py::arg("partial") = false,
          "Of every tensor of the method; or of some, and the others stay as they are.")
      .def(
          "scores",
          [](const train::Trainer& t, const at::Tensor& images) {
            return t.scores(images).classes;
          },
          py::arg("images"), py::call_guard<py::gil_scoped_release>(),
          "Scores (B, n_seen) of transformed uint8 images (B, 3, S, S).");
}

}  // namespace ntkcl::bindings
