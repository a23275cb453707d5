# The three OpenCV modules that decoding needs, as OpenCV::modules. Debian's small -dev packages
# hold no OpenCVConfig.cmake, so they are found by header and library.

find_path(OpenCV_INCLUDE_DIR opencv2/imgcodecs.hpp PATH_SUFFIXES opencv4)
set(_vars OpenCV_INCLUDE_DIR)
foreach(_module core imgproc imgcodecs)
  find_library(OpenCV_${_module}_LIBRARY opencv_${_module})
  list(APPEND _vars OpenCV_${_module}_LIBRARY)
endforeach()
if(OpenCV_INCLUDE_DIR)
  file(STRINGS "${OpenCV_INCLUDE_DIR}/opencv2/core/version.hpp" _lines
       REGEX "#define CV_VERSION_(MAJOR|MINOR|REVISION) ")
  string(REGEX MATCHALL "[0-9]+" _numbers "${_lines}")
  list(JOIN _numbers "." OpenCVModules_VERSION)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(OpenCVModules
  REQUIRED_VARS ${_vars} VERSION_VAR OpenCVModules_VERSION
  REASON_FAILURE_MESSAGE "OpenCV is missing. On Debian and Ubuntu: apt-get install --no-install-recommends libopencv-core-dev libopencv-imgproc-dev libopencv-imgcodecs-dev")

if(OpenCVModules_FOUND AND NOT TARGET OpenCV::modules)
  add_library(OpenCV::modules INTERFACE IMPORTED)
  target_include_directories(OpenCV::modules SYSTEM INTERFACE "${OpenCV_INCLUDE_DIR}")
  target_link_libraries(OpenCV::modules INTERFACE
    ${OpenCV_imgcodecs_LIBRARY} ${OpenCV_imgproc_LIBRARY} ${OpenCV_core_LIBRARY})
endif()
