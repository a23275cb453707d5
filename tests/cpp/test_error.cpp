#include "ntkcl/core/error.h"

#include "testing.h"

namespace ntkcl {
namespace {

using testing::message_of;

TEST_CASE("a failed check says where, what was expected and what came", "[core][error]") {
  const int64_t classes = 0;
  const auto check = [&] {
    NTKCL_CHECK(classes > 0, "class_order", "expected at least one class, got ", classes);
  };
  CHECK(message_of<ValueError>(check) == "[class_order] expected at least one class, got 0");
}

TEST_CASE("a check that holds evaluates no part of its message", "[core][error]") {
  int evaluated = 0;
  NTKCL_CHECK(true, "where", "text ", ++evaluated);
  CHECK(evaluated == 0);
}

TEST_CASE("a check is one statement: it stands in an if without braces", "[core][error]") {
  bool other_branch = false;
  if (other_branch)
    NTKCL_CHECK(false, "where", "unreachable");
  else
    other_branch = true;
  CHECK(other_branch);
}

TEST_CASE("every class of user error is an Error and keeps its message", "[core][error]") {
  CHECK(message_of<Error>([] { NTKCL_FAIL(ValueError, "a", 1, " b"); }) == "[a] 1 b");
  CHECK(message_of<Error>([] { NTKCL_FAIL(TypeError, "a", 2); }) == "[a] 2");
  CHECK(message_of<Error>([] { NTKCL_FAIL(FileNotFound, "a", 3); }) == "[a] 3");
  CHECK(message_of<Error>([] { NTKCL_FAIL(FileError, "a", 4); }) == "[a] 4");
  CHECK(message_of<Error>([] { NTKCL_FAIL(NumericalError, "a", 5); }) == "[a] 5");
  CHECK(message_of<Error>([] { NTKCL_FAIL(Interrupted, "a", 6); }) == "[a] 6");
}

TEST_CASE("a failed assertion is no user error and names its line", "[core][error]") {
  const std::string message = message_of<std::logic_error>([] { NTKCL_ASSERT(1 + 1 == 3); });
  CHECK(message.find("assertion '1 + 1 == 3' failed at ") != std::string::npos);
  CHECK(message.find("test_error.cpp:") != std::string::npos);
}

}  // namespace
}  // namespace ntkcl
