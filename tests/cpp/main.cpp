// Catch2 2 wants its main() in one file; with Catch2 3 it comes from a library.
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
