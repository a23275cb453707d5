#!/usr/bin/env bash
# Installs ntkcl the ways a user may, each into a fresh virtual environment, and checks what came
# out. By hand: it downloads several GB and compiles ntkcl once per case.
#
#   tests/install/check_install.sh                 all cases
#   tests/install/check_install.sh cuda-off ...    some of them
#
#   with-torch     torch first, then `pip install .`
#   cuda-off       the same with NTKCL_WITH_CUDA=OFF
#   no-nvcc        the same where no nvcc is found
#   oldest-torch   against the oldest torch that pyproject.toml allows
#   without-torch  `pip install .` alone: torch comes as a requirement
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export CMAKE_BUILD_PARALLEL_LEVEL=${NTKCL_JOBS:-2}

oldest_torch() {
  sed -nE 's/^ *"torch>=([0-9.]+),.*/\1/p' "$root/pyproject.toml"
}

fresh() {  # fresh [REQUIREMENT...]: a new virtual environment in $scratch/venv
  rm -rf "$scratch/venv"
  "$python" -m venv "$scratch/venv"
  if [ $# -gt 0 ]; then
    "$scratch/venv/bin/pip" install --quiet "$@"
  fi
}

install() {  # install [PIP OPTION...]: `pip install .` of a clean copy of the sources
  rm -rf "$scratch/source"
  mkdir "$scratch/source"
  git -C "$root" ls-files -z | tar -C "$root" --null -T - -c | tar -C "$scratch/source" -x
  local start=$SECONDS
  (cd "$scratch/source" && "$scratch/venv/bin/pip" install --quiet "$@" .)
  echo "  pip install .: $((SECONDS - start)) s"
}

check() {  # check PATTERN: the package works, and its CUDA status matches
  local site status
  cd "$scratch"
  status=$(venv/bin/python -c 'import ntkcl; print(ntkcl._C.build_info["cuda"])')
  echo "  CUDA $status"
  # shellcheck disable=SC2053  # a pattern
  [[ $status == $1 ]] || { echo "  expected: $1"; exit 1; }
  site=$(venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
  if readelf -d "$site"/ntkcl/*.so | grep -qE 'R(UN)?PATH.*(\[|:)/'; then
    echo "  an absolute path of this machine is in the installed libraries"
    exit 1
  fi
  venv/bin/ntkcl info
  venv/bin/ntkcl train --epochs 1 --output run >log || { cat log; exit 1; }
  rm -rf run
}

with-torch() {
  fresh "torch>=$(oldest_torch),<3"
  install
  check "o*"
}

cuda-off() {
  fresh "torch>=$(oldest_torch),<3"
  NTKCL_WITH_CUDA=OFF install
  check "off (NTKCL_WITH_CUDA=OFF)"
}

no-nvcc() {
  fresh "torch>=$(oldest_torch),<3"
  install -Ccmake.define.CMAKE_CUDA_COMPILER=
  check "off (no nvcc found)"
}

oldest-torch() {
  fresh "torch==$(oldest_torch).*"
  install
  check "o*"
}

without-torch() {
  fresh
  install
  check "o*"
}

if [ $# -eq 0 ]; then
  set -- with-torch cuda-off no-nvcc oldest-torch without-torch
fi
for case in "$@"; do
  echo "$case"
  "$case"
done
echo "All of these install paths work: $*"
