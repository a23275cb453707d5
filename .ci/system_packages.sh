#!/usr/bin/env bash
# The Debian and Ubuntu packages that building and testing ntkcl needs: installs the missing ones
# when run as root, else prints the line to run. $PYTHON is the interpreter to build for.
set -euo pipefail

PYTHON=${PYTHON:-python3}
missing=()

need() {  # need PACKAGE... -- COMMAND that succeeds where they are not missing
  local packages=()
  while [ "$1" != -- ]; do
    packages+=("$1")
    shift
  done
  shift
  "$@" >/dev/null 2>&1 || missing+=("${packages[@]}")
}

has_header() {
  echo "#include <$1>" | g++ -E -x c++ -I/usr/include/opencv4 -I/usr/local/include/opencv4 -
}

has_any_header() {
  has_header "$1" || has_header "$2"
}

python_has_headers() {
  "$PYTHON" -c 'import os, sysconfig
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))'
}

version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
need "python$version-venv" -- "$PYTHON" -c 'import ensurepip, venv'
need "python$version-dev" -- python_has_headers
need g++ -- g++ --version
need libopencv-core-dev -- has_header opencv2/core.hpp
need libopencv-imgproc-dev -- has_header opencv2/imgproc.hpp
need libopencv-imgcodecs-dev -- has_header opencv2/imgcodecs.hpp
need zlib1g-dev -- has_header zlib.h
need catch2 -- has_any_header catch2/catch.hpp catch2/catch_all.hpp

if [ ${#missing[@]} -eq 0 ]; then
  exit 0
fi
install=(apt-get install --yes --no-install-recommends "${missing[@]}")
if ! command -v apt-get >/dev/null; then
  echo "Missing on this machine (Debian's package names): ${missing[*]}" >&2
  exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
  echo "Some system packages are missing. Run this line, then make again:" >&2
  echo "  sudo ${install[*]}" >&2
  exit 1
fi
echo "Installing system packages: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet=2
"${install[@]}"
