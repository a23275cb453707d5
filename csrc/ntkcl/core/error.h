#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

// Errors that a user can cause. Each message begins with `[where]` and says what was expected and
// what came. The bindings turn each class into the Python exception named beside it. A bug of ours
// is an NTKCL_ASSERT (RuntimeError).
namespace ntkcl {

class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

class ValueError : public Error {  // ValueError
  using Error::Error;
};
class TypeError : public Error {  // TypeError
  using Error::Error;
};
class FileNotFound : public Error {  // FileNotFoundError
  using Error::Error;
};
class FileError : public Error {  // OSError: not readable, not writable, disk full
  using Error::Error;
};
class NumericalError : public Error {  // FloatingPointError: a loss that is not finite
  using Error::Error;
};
class RankError : public Error {  // ConnectionError: a rank that trains with this one is gone
  using Error::Error;
};
class Interrupted : public Error {  // KeyboardInterrupt
  using Error::Error;
};

namespace detail {

template <class... Args>
std::string message(std::string_view where, const Args&... args) {
  std::ostringstream out;
  out << '[' << where << "] ";
  (out << ... << args);
  return std::move(out).str();
}

}  // namespace detail
}  // namespace ntkcl

// NTKCL_CHECK(n > 0, "class_order", "expected at least one class, got ", n) throws ValueError.
#define NTKCL_CHECK(condition, where, ...)                                     \
  do {                                                                         \
    if (!(condition)) [[unlikely]] {                                           \
      throw ::ntkcl::ValueError(::ntkcl::detail::message(where, __VA_ARGS__)); \
    }                                                                          \
  } while (false)

#define NTKCL_FAIL(ErrorClass, where, ...) \
  throw ::ntkcl::ErrorClass(::ntkcl::detail::message(where, __VA_ARGS__))

#define NTKCL_ASSERT(condition)                                                                \
  do {                                                                                         \
    if (!(condition)) [[unlikely]] {                                                           \
      throw std::logic_error(::ntkcl::detail::message("internal", "assertion '", #condition,   \
                                                      "' failed at ", __FILE__, ":", __LINE__, \
                                                      "; please report this"));                \
    }                                                                                          \
  } while (false)
