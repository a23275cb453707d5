#include <pybind11/stl.h>

#include "bindings.h"
#include "ntkcl/core/error.h"

namespace ntkcl::bindings {
namespace {

// NOLINTNEXTLINE(performance-unnecessary-value-param): the signature is pybind11's.
void translate(std::exception_ptr pointer) {
  if (!pointer) {
    return;
  }
  try {
    std::rethrow_exception(pointer);
  } catch (const ValueError& e) {
    py::set_error(PyExc_ValueError, e.what());
  } catch (const TypeError& e) {
    py::set_error(PyExc_TypeError, e.what());
  } catch (const FileNotFound& e) {
    py::set_error(PyExc_FileNotFoundError, e.what());
  } catch (const FileError& e) {
    py::set_error(PyExc_OSError, e.what());
  } catch (const NumericalError& e) {
    py::set_error(PyExc_FloatingPointError, e.what());
  } catch (const RankError& e) {
    py::set_error(PyExc_ConnectionError, e.what());
  } catch (const Interrupted& e) {
    py::set_error(PyExc_KeyboardInterrupt, e.what());
  }
}

OptionValue option_value(const py::handle& value, const std::string& key,
                         const std::string& where) {
  if (py::isinstance<py::bool_>(value)) {
    return value.cast<bool>();
  }
  if (py::isinstance<py::int_>(value)) {
    return value.cast<int64_t>();
  }
  if (py::isinstance<py::float_>(value)) {
    return value.cast<double>();
  }
  if (py::isinstance<py::str>(value)) {
    return value.cast<std::string>();
  }
  if (py::isinstance<py::list>(value) || py::isinstance<py::tuple>(value)) {
    bool whole = true;
    for (const py::handle item : value) {
      const bool is_int = py::isinstance<py::int_>(item) && !py::isinstance<py::bool_>(item);
      if (!is_int && !py::isinstance<py::float_>(item)) {
        NTKCL_FAIL(TypeError, where, "'", key, "': expected a list of numbers, got an element ",
                   py::repr(item).cast<std::string>());
      }
      whole = whole && is_int;
    }
    if (whole) {
      return value.cast<std::vector<int64_t>>();
    }
    return value.cast<std::vector<double>>();
  }
  NTKCL_FAIL(TypeError, where, "'", key, "': expected bool, int, float, str or a list of numbers, ",
             "got ", py::repr(value).cast<std::string>());
}

}  // namespace

py::list option_infos(const std::vector<OptionInfo>& infos) {
  py::list list;
  for (const OptionInfo& info : infos) {
    py::dict entry;
    entry["key"] = info.key;
    entry["type"] = info.type;
    entry["default"] = py::cast(info.default_value);
    entry["allowed"] = info.allowed.text();
    entry["low"] = info.allowed.low;
    entry["high"] = info.allowed.high;
    entry["low_open"] = info.allowed.low_open;
    entry["high_open"] = info.allowed.high_open;
    entry["choices"] = info.allowed.choices;
    entry["doc"] = info.doc;
    list.append(entry);
  }
  return list;
}

OptionMap option_map(const py::dict& values, const std::string& where) {
  OptionMap map;
  for (const auto& [key, value] : values) {
    const auto name = key.cast<std::string>();
    try {
      map.emplace(name, option_value(value, name, where));
    } catch (const py::cast_error&) {
      NTKCL_FAIL(ValueError, where, "'", name,
                 "': expected whole numbers of 64 bits, or text, got ",
                 py::repr(value).cast<std::string>().substr(0, 80));
    }
  }
  return map;
}

py::dict option_dict(const OptionMap& values) {
  py::dict dict;
  for (const auto& [key, value] : values) {
    dict[py::str(key)] = py::cast(value);
  }
  return dict;
}

void init_core(py::module_& m) {
  py::register_exception_translator(&translate);
  m.attr("__version__") = NTKCL_VERSION;
  // What this extension was built with and against.
  py::dict build;
  build["torch"] = NTKCL_TORCH_VERSION;
  build["opencv"] = NTKCL_OPENCV_VERSION;
  build["cuda"] = NTKCL_CUDA_STATUS;
  m.attr("build_info") = build;
}

}  // namespace ntkcl::bindings
