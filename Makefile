# ntkcl: everything a newcomer or a contributor types. `make` alone lists the targets.
#
#   NTKCL_JOBS=2          compiler processes at a time
#   NTKCL_WITH_CUDA=AUTO  CUDA kernels: AUTO (when nvcc and a CUDA torch are found), ON, OFF
#   NTKCL_PCH=AUTO        precompiled headers: AUTO (where there is no ccache), ON, OFF
#   PYTHON=python3        the interpreter of the virtual environment (3.11 or newer)
#   TORCH="torch>=2.11,<3"  what to install where the virtual environment has no torch

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

VENV ?= .venv
BUILD ?= build/dev
TORCH ?= torch>=2.11,<3
WERROR ?= ON
NTKCL_JOBS ?= 2
NTKCL_WITH_CUDA ?= AUTO
NTKCL_PCH ?= AUTO
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

export CMAKE_BUILD_PARALLEL_LEVEL := $(NTKCL_JOBS)
export NTKCL_WITH_CUDA
# Threads that wait for each other do not spin: on a shared machine that costs a factor of 15.
export OMP_WAIT_POLICY ?= PASSIVE
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

STAMPS := $(VENV)/stamps
# An editable install knows its files by name: it is made again when the set of them changes.
PYTHON_FILES := $(shell find python -name '*.py' | LC_ALL=C sort | cksum | cut -d' ' -f1)
INSTALLED := $(STAMPS)/installed-$(PYTHON_FILES)
PY := $(VENV)/bin/python
CXX_FILES = $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# ---- what a newcomer types -----------------------------------------------------------------------

.PHONY: help
help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# A compiler newer than ours may warn about something new: no reason to fail a newcomer. What is
# built already stays as it is.
.PHONY: demo
demo: WERROR := $(or $(shell sed -n 's/^NTKCL_WERROR:.*=//p' $(BUILD)/CMakeCache.txt 2>/dev/null),OFF)
demo: build  ## Set everything up and run the main job: continual learning on real digits
	ntkcl train

.PHONY: test
test: setup build lint docs test-cpp main-job test-python  ## Set everything up and run all checks and tests

# ---- setting up ----------------------------------------------------------------------------------

.PHONY: setup
setup: $(INSTALLED)  ## Virtual environment, torch, the package (editable) and the tools

$(STAMPS)/venv: .ci/system_packages.sh
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python"; exit 1; }
	PYTHON="$(PYTHON)" .ci/system_packages.sh
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install "$(TORCH)"
	touch $@

$(INSTALLED): $(STAMPS)/torch pyproject.toml
	@rm -f $(STAMPS)/installed*
	$(PY) -m pip install -q "pip>=23.1" "cmake>=3.25" "ninja>=1.10" \
	  "scikit-build-core>=0.11"
	@echo "Compiling and installing ntkcl: about ten minutes on two cores."
	$(PY) -m pip install -q --no-build-isolation -Cbuild-dir=$(BUILD) \
	  -Ccmake.define.NTKCL_BUILD_TESTS=ON -Ccmake.define.NTKCL_WERROR=$(WERROR) \
	  -Ccmake.define.NTKCL_PCH=$(NTKCL_PCH) -e ".[dev,docs]"
	touch $@

# ---- the daily loop ------------------------------------------------------------------------------

.PHONY: build
build: setup  ## Compile what changed and put it where the installed package is
	cmake -S . -B $(BUILD) -DNTKCL_WERROR=$(WERROR) -DNTKCL_PCH=$(NTKCL_PCH) \
	  -DNTKCL_WITH_CUDA=$(NTKCL_WITH_CUDA) > $(BUILD)/configure.log \
	  || { cat $(BUILD)/configure.log; exit 1; }
	cmake --build $(BUILD)
	cmake --install $(BUILD) --component python --strip \
	  --prefix $$($(PY) -c "import sysconfig; print(sysconfig.get_path('platlib'))") > /dev/null

.PHONY: test-cpp
test-cpp:  ## Catch2 tests, CUDA kernels on the host included
	ctest --test-dir $(BUILD) --no-tests=error --output-on-failure

.PHONY: test-python
test-python:  ## pytest, golden files included
	$(PY) -m pytest

.PHONY: main-job
main-job:  ## The embedded default, as `make demo` runs it, into build/main-job
	rm -rf build/main-job
	ntkcl train --output build/main-job

.PHONY: lint
lint: build/stubs/ntkcl/_C.pyi  ## clang-format, ruff, mypy, type stubs
	@echo "clang-format --dry-run --Werror"
	@clang-format --dry-run --Werror $(CXX_FILES)
	ruff check .
	ruff format --check .
	diff -u python/ntkcl/_C.pyi $< || { echo "The bindings have changed: run make stubs"; exit 1; }
	mypy

# Nothing is fetched: fonts are the reader's, equations are MathML.
.PHONY: docs
docs: setup  ## The documentation site, into build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict -f docs/site/mkdocs.yml

.PHONY: format
format: setup  ## Rewrite the sources as `make lint` wants them
	@clang-format -i $(CXX_FILES)
	ruff format .
	ruff check --fix .

.PHONY: stubs
stubs: build/stubs/ntkcl/_C.pyi  ## Write what is made from the bindings: type stubs, docs/configuration.md
	cp $< python/ntkcl/_C.pyi
	$(PY) -m ntkcl.reference > docs/configuration.md

# The values of this build are left out: they differ from machine to machine.
.PHONY: build/stubs/ntkcl/_C.pyi
build/stubs/ntkcl/_C.pyi: build
	pybind11-stubgen ntkcl._C --output-dir build/stubs --exit-code > build/stubs.log 2>&1 \
	  || { cat build/stubs.log; exit 1; }
	sed -i -E 's/^(__version__: str|build_info: dict).*/\1/' $@
	ruff format -q $@
	ruff check -q --fix $@

# ---- now and then --------------------------------------------------------------------------------

.PHONY: tidy
tidy: build  ## clang-tidy over our C++ (20 s a file; apt package clang-tidy)
	run-clang-tidy -quiet -p $(BUILD) -j $(NTKCL_JOBS) '/csrc/.*\.cpp$$' 2>&1 \
	  | sed -E '/^(clang-tidy-|[0-9]+ warnings generated)/d'

SANITIZED := cmake -S . -B build/sanitize -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(PY) \
  -DNTKCL_BUILD_TESTS=ON -DNTKCL_WITH_CUDA=OFF -DNTKCL_PCH=$(NTKCL_PCH) \
  -DNTKCL_SANITIZE=address,undefined && cmake --build build/sanitize --target

.PHONY: sanitize
sanitize: setup  ## Catch2 tests under the address and undefined-behaviour sanitizers
	$(SANITIZED) tests/cpp/all
	ctest --test-dir build/sanitize --no-tests=error --output-on-failure

# Python has no sanitizer's runtime: it is loaded before, with the C++ one whose exceptions it
# watches. What Python keeps until its end is no leak. One allocation of 2 GiB is too much.
FUZZ_INPUTS ?= 100000
FUZZ_SEED ?= 0
FUZZ_FLAGS ?=
.PHONY: fuzz
fuzz: setup  ## Hostile files under the same sanitizers (FUZZ_INPUTS, FUZZ_SEED, FUZZ_FLAGS)
	$(SANITIZED) _C
	runtime() { realpath "$$(c++ -print-file-name=$$1)"; }; \
	LD_PRELOAD="$$(runtime libasan.so) $$(runtime libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:max_allocation_size_mb=2048:quarantine_size_mb=64 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 OMP_NUM_THREADS=1 \
	$(PY) tests/python/fuzz.py --core build/sanitize/csrc --inputs $(FUZZ_INPUTS) \
	  --seed $(FUZZ_SEED) $(FUZZ_FLAGS)

.PHONY: clean
clean:  ## Remove build products; the virtual environment stays
	rm -rf build dist $(STAMPS)/installed*
