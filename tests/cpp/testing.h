#pragma once

// Catch2, version 2 or 3, and what the tests share.
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
namespace ntkcl::testing {
using Catch::Approx;
}
#else
#include <catch2/catch.hpp>
namespace ntkcl::testing {
using Catch::Detail::Approx;
}
#endif

#include <string>

namespace ntkcl::testing {

// The message of the ErrorClass that `call` throws. The test fails where nothing is thrown, or
// something else.
template <class ErrorClass, class Call>
std::string message_of(Call&& call) {
  try {
    call();
  } catch (const ErrorClass& error) {
    return error.what();
  }
  FAIL("expected an exception, nothing was thrown");
  return {};
}

}  // namespace ntkcl::testing
