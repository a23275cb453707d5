#include "bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "ntkcl's C++ core. Use the functions of the package `ntkcl`.";
  ntkcl::bindings::init_core(m);
  ntkcl::bindings::init_data(m);
  ntkcl::bindings::init_nn(m);  // before the methods: their signatures name its types
  ntkcl::bindings::init_lorac_ipc(m);
  ntkcl::bindings::init_methods(m);
  ntkcl::bindings::init_optim(m);
  ntkcl::bindings::init_raa(m);
  ntkcl::bindings::init_scenario(m);
  ntkcl::bindings::init_stats(m);
  ntkcl::bindings::init_train(m);
}
