# Everything this project does, from a fresh machine on. `make` alone teaches.
#
# Needs GNU make 4.2, a shell, Python with its headers and a C++ compiler: no CMake, no Ninja (both
# come from PyPI into .venv), no find, sed or git.

PYTHON ?= python3
# Where torch comes from when pip's own configuration has no CPU build of it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# `test-lower-bounds` says otherwise.
VENV := .venv
CONSTRAINTS := constraints.txt

# Other engines, for benchmarks alone; torch and the rest they take from .venv.
PEERS := .venv-peers
PEER_PACKAGES := llama-cpp-python==0.3.36 ik-llama-cpp-python==0.1.5 kt-kernel==0.7.2

BIN := $(VENV)/bin
# Compiling all of torch ahead takes longer than compiling what is used when it is.
PIP := PIP_NO_COMPILE=1 $(BIN)/python -m pip --quiet --disable-pip-version-check
TORCH := $(filter torch==%,$(file <$(CONSTRAINTS)))
# What the editable install is built with; torch is installed first, alone.
BUILD_TOOLS := scikit-build-core nanobind cmake ninja

# Recursive, without a shell: $(call find,folder,patterns).
find = $(foreach path,$(wildcard $1/*),$(call find,$(path),$2) $(filter $2,$(path)))
NATIVE_SOURCES := $(call find,csrc,%.cpp %.h %.inc %.map)
CPP_SOURCES := $(filter %.cpp %.h,$(NATIVE_SOURCES) $(call find,tests,%.cpp %.h))
PACKAGE := $(sort $(call find,ktransformers,%.py %.pyi %.yaml %.typed))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check format dev_install test-lower-bounds bench targets peers compare asan \
	tsan clean FORCE

define HELP

  make demo                a small mixture-of-experts model, retargeted by rule files; under a minute
  make test                every test
  make check               ruff, mypy --strict, clang-format
  make format              let ruff and clang-format rewrite the files
  make dev_install         .venv with everything in it (demo and test do this themselves);
                           then: . .venv/bin/activate
  make bench               the CPU kernels, measured against this machine's own limits
  make compare BASE=main   the CPU kernels against those of another commit, in one process
  make peers               other engines, into $(PEERS), to be measured beside ours; two hours
  make targets             every number that the project promises: measured, and whether it holds
  make asan, make tsan     the native tests under address + undefined, and thread sanitizers
  make test-lower-bounds   every test, with the oldest versions that pyproject.toml admits
  make clean               remove .venv and all that was built

  The first one takes minutes: it fills .venv from PyPI, as constraints.txt pins it, and builds the
  extension. After that nothing needs a network. What may be set:

  PYTHON=python3.12        which Python (3.10 or later) .venv is made from
  BENCH=--save             bench and targets keep their figures in benchmarks/results/
  TORCH_INDEX=URL          which build of $(TORCH) to take. Default: a CPU build, from
                           pip's own configuration or $(TORCH_INDEX).
                           With an NVIDIA GPU: https://download.pytorch.org/whl/cu130

endef

help:
	$(info $(HELP))
	@:

# What pip can't install: each failure is one sentence that names it.
define CHECK_MACHINE
@command -v "$(PYTHON)" >/dev/null || { echo "make: no $(PYTHON) here: install Python 3.10 or" \
  "later, or say which: make PYTHON=/path/to/python3" >&2; exit 1; }
@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) is" \
  "`"$(PYTHON)" -V 2>&1`: 3.10 or later is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) can make no" \
  "environment: install its venv and ensurepip modules (Debian: python3-venv)" >&2; exit 1; }
@"$(PYTHON)" -c 'import pathlib, sys, sysconfig; \
  sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' || { echo \
  "make: $(PYTHON) has no Python.h: install its headers (Debian: python3-dev)" >&2; exit 1; }
@for compiler in $${CXX:-c++ g++ clang++}; do command -v $$compiler >/dev/null && exit; done; \
  echo "make: no C++ compiler ($${CXX:-c++, g++, clang++}): install one (Debian: g++), or say" \
  "which: make CXX=/path/to/c++" >&2; exit 1
endef

# Torch comes first and alone: whatever asked for it later would take PyPI's build, with gigabytes
# of CUDA. Only the CPU build bears the local version "+cpu", so pip's own configuration (a wheel
# folder, a mirror) is asked for just that, unless TORCH_INDEX was given. What is there already, of
# the right version and whatever build, stays.
$(VENV)/.tools: $(CONSTRAINTS)
	$(CHECK_MACHINE)
	@echo 'make: $(TORCH) and the build tools into $(VENV): minutes'
	@"$(PYTHON)" -m venv $(VENV)
ifeq ($(origin TORCH_INDEX),file)
	@$(PIP) install --no-index '$(TORCH)' >/dev/null 2>&1 || \
	  $(PIP) install -c $(CONSTRAINTS) '$(TORCH)+cpu' >$(VENV)/torch.log 2>&1 || \
	  $(PIP) install --index-url '$(TORCH_INDEX)' '$(TORCH)' || { cat $(VENV)/torch.log >&2; \
	  echo "make: $(TORCH) is neither in pip's own configuration nor at $(TORCH_INDEX):" \
	  "say where it is: make TORCH_INDEX=URL" >&2; exit 1; }
else
	@$(PIP) install --index-url '$(TORCH_INDEX)' '$(TORCH)'
endif
	@$(PIP) install -c $(CONSTRAINTS) $(BUILD_TOOLS)
	@: >$@

# An editable install sees edited files, but no new ones, until it is installed again: the stamp
# holds the list of files (and the folder, which the install has in it).
LISTING := $(CURDIR) $(PACKAGE)
ifneq ($(strip $(LISTING)),$(strip $(file <$(VENV)/.installed)))
$(VENV)/.installed: FORCE
endif
$(VENV)/.installed: $(VENV)/.tools pyproject.toml CMakeLists.txt $(NATIVE_SOURCES)
	@echo 'make: the extension, and what else $(CONSTRAINTS) pins, into $(VENV): minutes at first'
	@$(PIP) install --no-build-isolation -c $(CONSTRAINTS) -e '.[dev]'
	$(file >$(VENV)/.listing,$(LISTING))
	@mv $(VENV)/.listing $@

dev_install: $(VENV)/.installed
	@echo 'ready: . $(BIN)/activate'

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed
	$(BIN)/pytest

check: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	@echo '$(BIN)/clang-format --dry-run --Werror ($(words $(CPP_SOURCES)) files)'
	@$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP_SOURCES)

bench: $(VENV)/.installed
	@set -e; for model in v2-lite v3; do for weight in int8 int4-128 int4-32 bf16; do \
	  $(BIN)/python benchmarks/experts.py --model $$model --weight $$weight --isa all $(BENCH); \
	done; done
	@set -e; for weight in int8 int4-128 int4-32 bf16; do \
	  $(BIN)/python benchmarks/linear.py --weight $$weight $(BENCH); done

compare: $(VENV)/.installed
	$(BIN)/python benchmarks/compare.py $(BASE)

targets: $(VENV)/.installed
	$(BIN)/python benchmarks/targets.py $(BENCH)

# llama.cpp and ik_llama.cpp are compiled for this machine alone, from their packages' sources. A peer that
# can't be installed leaves the reason in its place, which `make targets` shows.
peers: $(addprefix $(PEERS)/.,$(PEER_PACKAGES))
$(PEERS)/.%: $(VENV)/.tools
	@echo 'make: $* into $(PEERS)'
	@mkdir -p $(PEERS)
	@if CMAKE_ARGS='-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF' nice env $(PIP) install --no-deps --upgrade \
	  --no-binary llama-cpp-python,ik-llama-cpp-python --target $(PEERS) '$*' >$(PEERS)/$*.log 2>&1; \
	  then rm -f $(PEERS)/$*.absent; : >$@; \
	  else cp $(PEERS)/$*.log $(PEERS)/$*.absent; echo "make: $* can't be installed:" \
	  "`tail -n 1 $(PEERS)/$*.log`" >&2; fi

# The presets are in CMakePresets.json.
asan tsan: $(VENV)/.tools
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --preset $@
	$(BIN)/cmake --build build/$@
	$(BIN)/ctest --test-dir build/$@ --output-on-failure

test-lower-bounds:
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

clean:
	rm -rf .venv .venv-lowest $(PEERS) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

FORCE:
