#pragma once

#include <torch/csrc/utils/pybind.h>

#include <map>
#include <memory>

#include "ntkcl/core/options.h"
#include "ntkcl/methods/method.h"
#include "ntkcl/nn/vision_transformer.h"

// One init function per area; each adds its names to the extension module `ntkcl._C`.
namespace ntkcl::bindings {

namespace py = pybind11;

void init_core(py::module_& m);
void init_data(py::module_& m);
void init_lorac_ipc(py::module_& m);
void init_methods(py::module_& m);
void init_nn(py::module_& m);
void init_optim(py::module_& m);
void init_raa(py::module_& m);
void init_scenario(py::module_& m);
void init_stats(py::module_& m);
void init_train(py::module_& m);

// [{key, type, default, allowed, low, high, low_open, high_open, choices, doc}, ...]
py::list option_infos(const std::vector<OptionInfo>& infos);
// A Python dict of option values; TypeError for a value that no option can hold.
OptionMap option_map(const py::dict& values, const std::string& where);
py::dict option_dict(const OptionMap& values);

// A method whose hooks are those of a Python object; ValueError/TypeError for one that does not
// fit.
std::unique_ptr<methods::Method> make_python_method(py::object object,
                                                    const nn::VisionTransformer& vit,
                                                    methods::RandomSource& random);
// Draws that fn(purpose, task, step, list, layer) gives; None: drawn from the seed.
std::unique_ptr<methods::RandomSource> recorded_random(uint64_t seed, py::function fn);

}  // namespace ntkcl::bindings
