# Everything happens in .venv of this checkout; a second run starts at once.
#
#   make serve                        the embedded model on two CPU ranks at 127.0.0.1:30000
#   make serve ARGS="--model-path DIR --sp-size 2"
#   make test                         all that CI runs;  PYTEST_ARGS="test/unit -k radix" for a part
#   make test-clients                 real clients, each in an environment of its own (docs/howto/clients.md);
#                                     CLIENTS="litellm lm-eval" for some of them
#   make gpu                          what only a GPU can confirm: test/gpu and benchmark/gpu.py
#   make sanitize                     the kernels' tests under sanitizers, which CI runs beside that
#   make TORCH="torch==2.13.0 --index-url URL" serve
#                                     another build of torch: the default one brings gigabytes of CUDA
#                                     libraries; PyTorch's install page names the index of CPU builds
#   make KERNEL=no test               without the C++ kernels (reference operators in torch)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
KERNEL ?= auto
ARGS ?= --sp-size 2
PYTEST_ARGS ?=
CLIENTS ?=
GPU_MINUTES ?= 5

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
KERNEL_SOURCES := $(shell find sgl-kernel/csrc sgl-kernel/include sgl-kernel/python \
	sgl-kernel/CMakeLists.txt sgl-kernel/pyproject.toml -type f -not -name '*.pyc' 2>/dev/null)

.PHONY: serve test gpu test-clients check lint types pytest sanitize format setup doctor clean

serve: setup
	$(BIN)/sps serve $(ARGS)

doctor: setup
	$(BIN)/sps doctor

test: check pytest

check: lint types

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

types: setup
	$(BIN)/mypy python/sps_runtime

# All that a GPU must confirm; without one the tests skip and say so.
gpu: setup
	$(BIN)/pip install -e '.[gpu]'
	-$(BIN)/python -m pytest -q -rs test/gpu --timeout 300
	$(BIN)/python benchmark/gpu.py --minutes $(GPU_MINUTES)

pytest: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# Clients' environments lie under .venv-clients and are made again when what they need changes.
test-clients: setup
	OMP_NUM_THREADS=1 PYTHONPATH=python:. $(BIN)/python -m test.clients.run --torch "$(TORCH)" $(CLIENTS)

# The kernels' tests under the address and undefined-behaviour sanitizers: a CI job of its own.
sanitize: setup $(STAMPS)/kernel-tools
	$(MAKE) -C sgl-kernel sanitize PYTHON=$(abspath $(BIN)/python)

$(STAMPS)/kernel-tools: $(STAMPS)/package
	$(BIN)/pip install nanobind cmake ninja
	touch $@

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(STAMPS)/package $(STAMPS)/kernel

$(STAMPS)/venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# The choice of torch is part of the stamp's content: another TORCH installs again.
$(STAMPS)/torch: $(STAMPS)/venv FORCE
	@test "$$(cat $@ 2>/dev/null)" = "$(TORCH)" || { \
		$(BIN)/pip install $(TORCH) && echo "$(TORCH)" > $@; }

$(STAMPS)/package: pyproject.toml $(STAMPS)/torch
	$(BIN)/pip install -e '.[test,dsl]'
	touch $@

# The kernels need a C++ compiler; without one, or without their sources, torch does their work.
$(STAMPS)/kernel: $(STAMPS)/package $(KERNEL_SOURCES)
	@if [ "$(KERNEL)" = no ] || [ ! -f sgl-kernel/pyproject.toml ]; then \
		echo "without sps-kernel"; \
	elif command -v c++ >/dev/null || command -v g++ >/dev/null; then \
		$(BIN)/pip install ./sgl-kernel; \
	else \
		echo "no C++ compiler: without sps-kernel, see 'make doctor'"; \
	fi
	touch $@

FORCE:

clean:
	rm -rf $(VENV) .venv-clients build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
