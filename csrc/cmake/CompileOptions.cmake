# One place for language levels, warnings, optimisation and sanitizers.

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET default)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
# -O2, and asserts stay on: internal errors are to be seen in releases too.
set(CMAKE_CXX_FLAGS_RELEASE "-O2")

find_program(NTKCL_CCACHE ccache)
if(NTKCL_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${NTKCL_CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${NTKCL_CCACHE})
endif()

# ATen's headers are most of a file's compile time. Precompiled they cost 1 s a file instead of 6,
# but 400 MB of disk, and ccache would be of no use.
set(NTKCL_HAS_PCH ${NTKCL_PCH})
if(NTKCL_PCH STREQUAL "AUTO")
  set(NTKCL_HAS_PCH ON)
  if(NTKCL_CCACHE)
    set(NTKCL_HAS_PCH OFF)
  endif()
endif()

add_library(ntkcl_flags INTERFACE)
target_compile_options(ntkcl_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wno-unused-parameter -ffp-contract=off>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${NTKCL_WERROR}>>:-Werror>)
if(NTKCL_SANITIZE)
  target_compile_options(ntkcl_flags INTERFACE
    -fsanitize=${NTKCL_SANITIZE} -O1 -g1 -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS)
  target_link_options(ntkcl_flags INTERFACE -fsanitize=${NTKCL_SANITIZE})
endif()
