#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "ntkcl/methods/method.h"
#include "ntkcl/train/graph.h"
#include "ntkcl/train/step_draws.h"

namespace ntkcl::train {

// A method's gradients() over the steps of a task, one graph for each of a step's passes: the batch
// is copied to where the graph reads it, the draws get their values, and losses and gradients are
// where they were the last time. The optimiser stays outside; it is a handful of kernels.
//
// Note: batches that are not full, and steps that do not repeat (Method::repeats), go the plain
// way. Every graph keeps its own memory, that of a step, beside that of plain steps.
class StepReplay {
 public:
  using Gradients = std::function<methods::Losses(const methods::Batch&, const methods::StepInfo&)>;

  // `gradients` gets its random numbers from random(). Parameters without gradients get theirs by
  // it, in .grad.
  StepReplay(const methods::Method& method, methods::RandomSource& source,
             const std::vector<optim::ParameterGroup>& groups, int64_t batch_size,
             at::Device device, Gradients gradients);
  ~StepReplay();  // leaves no gradients: they are the graphs'
  StepReplay(const StepReplay&) = delete;
  StepReplay& operator=(const StepReplay&) = delete;

  methods::Losses gradients(const methods::Batch& batch, const methods::StepInfo& step);
  methods::RandomSource& random() { return *random_; }

 private:
  struct Pass {
    StepDraws draws;
    int64_t steps = 0;
    methods::Batch batch{};
    std::unique_ptr<Graph> graph{};
    methods::Losses losses{};
    std::vector<at::Tensor> gradients{};  // of the parameters; undefined where none was left
  };
  void receive(Pass& pass, const methods::Batch& batch) const;
  void run(Pass& pass, const methods::StepInfo& step);
  void clear_gradients() const;

  const methods::Method& method_;
  methods::RandomSource& source_;
  methods::RandomSource* random_;
  std::vector<at::Tensor> parameters_;
  int64_t batch_size_;
  at::Device device_;
  Gradients gradients_;
  std::vector<std::unique_ptr<Pass>> passes_;
};

}  // namespace ntkcl::train
