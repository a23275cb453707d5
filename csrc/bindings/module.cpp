#include "bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "ntkcl's C++ core. Use the functions of the package `ntkcl`.";
  ntkcl::bindings::init_core(m);
  ntkcl::bindings::init_data(m);
}
