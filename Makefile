PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# Ranks are processes of their own, so one thread each; results then do not depend on the core count either.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INPUTS  := pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)
RUNTIME := $(VENV)/.runtime
DEV     := $(VENV)/.dev

.DEFAULT_GOAL := help
.PHONY: help train test lint bench gpu-check check-cuda-build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(RUNTIME) ## train the demo model on this machine; extra flags in ARGS
	$(BIN)/megapar train configs/demo.toml --nproc auto $(ARGS)

# Tests of one process each go two at a time; the others start ranks, which get the cores for themselves: they are timed, and may hang.
ALONE := $(addprefix tests/,aot cuda_host data integrations objectives ops optim planning)

test: $(DEV) ## run the tests, or with pytest flags in ARGS those named there
ifeq ($(strip $(ARGS)),)
	$(BIN)/python -m pytest -n 2 $(ALONE)
	$(BIN)/python -m pytest $(addprefix --ignore=,$(ALONE))
else
	$(BIN)/python -m pytest $(ARGS)
endif

lint: $(DEV) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(RUNTIME) ## run every benchmark; flags in ARGS
	$(BIN)/python -m benchmarks $(ARGS)

gpu-check: $(DEV) ## on a GPU: every test and benchmark, report in gpu-report/ (10 minutes)
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)

check-cuda-build: ## with nvcc, no GPU: build and import the CUDA kernels against a torch that has CUDA
	PYTHON=$(PYTHON) .ci/check-cuda-build

clean: ## remove the venv, build products and caches (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find megapar -name '*.so' -delete

# The package is built without isolation, so that C++ extensions are compiled against the torch of this venv:
# what the build imports has to be in place first.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "megapar needs Python 3.11 or newer: install it, or name one with make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): $(INPUTS) | $(BIN)/python
	$(PIP) setuptools wheel ninja torch numpy
	$(PIP) --no-build-isolation -e .
	@touch $@

# [dev] includes the runtime, so it satisfies both stamps.
$(DEV): $(INPUTS) | $(BIN)/python
	$(PIP) setuptools wheel ninja torch numpy
	$(PIP) --no-build-isolation -e '.[dev]'
# Without its dependencies: tests read its data files and write some that it reads.
	$(PIP) --no-deps megatron-core || echo "megatron-core could not be installed: the tests against its data files are skipped"
	@touch $(RUNTIME) $@
