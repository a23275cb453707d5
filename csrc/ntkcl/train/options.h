#pragma once

#include "ntkcl/core/options.h"
#include "ntkcl/optim/optimizer.h"
#include "ntkcl/optim/schedule.h"

namespace ntkcl::train {

// What the task loop needs to know, whatever the method.
struct TrainOptions {
  int64_t initial_classes = 10;
  int64_t increment = 10;
  int64_t epochs = 20;
  int64_t initial_epochs = 0;
  int64_t batch_size = 16;
  int64_t evaluation_batch_size = 64;
  double learning_rate = 0.025;
  double initial_learning_rate = 0.0;
  double validation_fraction = 0.0;
  int64_t seed = 0;
  std::string device = "auto";
  std::string precision = "auto";
  bool deterministic = true;
  int64_t threads = 0;
  std::string cpu_matmul = "auto";
  bool recompute = false;
  bool cuda_graph = false;
  double checkpoint_minutes = 5;
  int64_t checkpoint_steps = 0;
  bool forward_transfer = false;
  optim::OptimizerOptions optimizer;
  optim::ScheduleOptions schedule;

  template <class Visitor>
  void visit(Visitor& v) {
    v("initial_classes", initial_classes, at_least(1), "classes of the first task");
    v("increment", increment, at_least(1),
      "classes of each later task; the last task takes the rest");
    v("epochs", epochs, at_least(1), "epochs of a task");
    v("initial_epochs", initial_epochs, at_least(0), "epochs of the first task; 0: as `epochs`");
    v("batch_size", batch_size, at_least(1), "training images a step; a short last batch is kept");
    v("evaluation_batch_size", evaluation_batch_size, at_least(1),
      "images a step without gradients");
    v("learning_rate", learning_rate, at_least(0), "learning rate at a task's first epoch");
    v("initial_learning_rate", initial_learning_rate, at_least(0),
      "learning rate at the first task's first epoch; 0: as `learning_rate`");
    v("validation_fraction", validation_fraction, at_least(0).below(1),
      "share of each class's training images that is held out and takes the place of the test "
      "images");
    v("seed", seed, at_least(0), "seed of the class order and of every random draw");
    v("device", device, one_of({"auto", "cpu", "cuda"}),
      "where to compute; auto: CUDA where there is a GPU");
    v("precision", precision, one_of({"auto", "float32", "float64", "bfloat16", "float8"}),
      "dtype of all arithmetic; auto: float32; bfloat16: weights and activations inside the frozen "
      "attention and MLP, all else float32, for processors with bfloat16 instructions; float8: as "
      "bfloat16, and the frozen matrices' products of 8-bit floating point numbers, for GPUs from "
      "sm_90 on; elsewhere the same numbers, slowly");
    v("deterministic", deterministic, anything(),
      "bit-equal results for the same seed, device, build and thread count");
    v("threads", threads, at_least(0), "CPU threads of the arithmetic; 0: torch's default");
    v("cpu_matmul", cpu_matmul, one_of({"auto", "default"}),
      "auto: the frozen matrices in the layout of the processor's best product, other products by "
      "the faster float32 GEMM library where a probe shows that it computes in float32; default: "
      "torch's own choice");
    v("recompute", recompute, anything(),
      "keep less for the backward pass and compute the activations of MLPs without LoRA anew: "
      "about half the memory of a step for a tenth more time");
    v("cuda_graph", cuda_graph, anything(),
      "run the training steps of full batches as CUDA graphs (methods whose steps repeat: not "
      "lorac-ipc, none with several ranks); on the CPU the same steps from the same buffers, no "
      "faster");
    v("checkpoint_minutes", checkpoint_minutes, at_least(0),
      "minutes of training after which a checkpoint is written, as after each task's training and "
      "after each task; 0: only there");
    v("checkpoint_steps", checkpoint_steps, at_least(0),
      "steps after which one is written, too; 0: not by steps");
    v("forward_transfer", forward_transfer, anything(),
      "measure before each task but the first what the features learned so far are worth for it: "
      "two more passes over its images; changes no result");
    optimizer.visit(v);
    schedule.visit(v);
  }
};

}  // namespace ntkcl::train
