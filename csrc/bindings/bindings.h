#pragma once

#include <torch/csrc/utils/pybind.h>

#include "ntkcl/core/options.h"

// One init function per area; each adds its names to the extension module `ntkcl._C`.
namespace ntkcl::bindings {

namespace py = pybind11;

void init_core(py::module_& m);
void init_data(py::module_& m);

// [{key, type, default, allowed, low, high, choices, doc}, ...]
py::list option_infos(const std::vector<OptionInfo>& infos);
// A Python dict of option values; TypeError for a value that no option can hold.
OptionMap option_map(const py::dict& values, const std::string& where);
py::dict option_dict(const OptionMap& values);

}  // namespace ntkcl::bindings
