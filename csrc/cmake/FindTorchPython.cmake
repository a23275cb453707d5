# The torch that ${Python_EXECUTABLE} imports, as targets:
#   Torch::torch    libtorch of that wheel, with its headers; without its CUDA part
#   Torch::cuda     the CUDA part, where the wheel has one
#   Torch::python   libtorch_python, for extension modules
# Sets TORCH_VERSION, TORCH_DIR, TORCH_CUDA_VERSION (empty for a CPU-only torch),
# TORCH_HAS_DISTRIBUTED (1 where torch.distributed is there) and TORCH_RPATH,
# the folders of the wheel's libraries relative to site-packages: its CUDA runtime comes from there.

set(_query "import torch, os; print(torch.__version__); print(os.path.dirname(torch.__file__)); print(torch.version.cuda or ''); print(int(torch._C._GLIBCXX_USE_CXX11_ABI)); print(int(torch.distributed.is_available())); print('end')")
# The second try, -E, reaches the target environment from pip's isolated build.
foreach(_flag "" "-E")
  execute_process(
    COMMAND ${Python_EXECUTABLE} ${_flag} -c "${_query}"
    OUTPUT_VARIABLE _out RESULT_VARIABLE _rc ERROR_VARIABLE _err OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(_rc EQUAL 0)
    break()
  endif()
endforeach()

if(_rc EQUAL 0)
  string(REPLACE "\n" ";" _lines "${_out}")
  list(GET _lines 0 TORCH_VERSION)
  list(GET _lines 1 TORCH_DIR)
  list(GET _lines 2 TORCH_CUDA_VERSION)
  list(GET _lines 3 _abi)
  list(GET _lines 4 TORCH_HAS_DISTRIBUTED)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TorchPython
  REQUIRED_VARS TORCH_DIR VERSION_VAR TORCH_VERSION
  REASON_FAILURE_MESSAGE "Could not import torch with ${Python_EXECUTABLE}. Install torch first (pip install torch)")

if(TorchPython_FOUND AND NOT TARGET Torch::torch)
  # A target of libraries that lie in the wheel.
  function(_torch_target name)
    add_library(Torch::${name} INTERFACE IMPORTED)
    foreach(_lib IN LISTS ARGN)
      add_library(Torch::lib${_lib} SHARED IMPORTED)
      set_target_properties(Torch::lib${_lib} PROPERTIES
        IMPORTED_LOCATION "${TORCH_DIR}/lib/lib${_lib}.so")
      target_link_libraries(Torch::${name} INTERFACE Torch::lib${_lib})
    endforeach()
  endfunction()

  _torch_target(torch torch torch_cpu c10)
  target_include_directories(Torch::torch SYSTEM INTERFACE
    "${TORCH_DIR}/include" "${TORCH_DIR}/include/torch/csrc/api/include")
  target_compile_definitions(Torch::torch INTERFACE
    _GLIBCXX_USE_CXX11_ABI=${_abi}
    $<$<BOOL:${TORCH_HAS_DISTRIBUTED}>:USE_C10D>
    $<$<BOOL:${TORCH_HAS_DISTRIBUTED}>:USE_DISTRIBUTED>)

  # at::parallel_for is a template: without OpenMP here it runs in one thread. The runtime is the
  # wheel's own where it has one, so that there is only one.
  file(GLOB _gomp "${TORCH_DIR}/lib/libgomp*.so*")
  target_compile_options(Torch::torch INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)
  if(_gomp)
    list(GET _gomp 0 _gomp)
    target_link_libraries(Torch::torch INTERFACE "${_gomp}")
  else()
    target_link_options(Torch::torch INTERFACE -fopenmp)
  endif()

  _torch_target(python torch_python)
  target_link_libraries(Torch::python INTERFACE Torch::torch)

  set(TORCH_RPATH torch/lib)
  if(TORCH_CUDA_VERSION)
    _torch_target(cuda torch_cuda c10_cuda)
    target_link_libraries(Torch::cuda INTERFACE Torch::torch)
    if(TORCH_CUDA_VERSION VERSION_LESS 13)
      list(APPEND TORCH_RPATH nvidia/cuda_runtime/lib)
    else()
      string(REGEX MATCH "^[0-9]+" _major "${TORCH_CUDA_VERSION}")
      list(APPEND TORCH_RPATH nvidia/cu${_major}/lib)
    endif()
  endif()
endif()
