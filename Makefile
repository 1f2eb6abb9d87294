# `make demo` and `make test` need Python 3.11 or newer, make and a package index; they set up the rest in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# What is installed: what the demo needs, and on top of it what developing needs.
RUNS   := $(VENV)/.runs
READY  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
.PHONY: help demo test lint test-slow bench gpu gpu-wheels clean

help:
	@echo "make demo       the whole pipeline on embedded data (a minute, and some for installing)"
	@echo "make test       lint, types and tests (5 to 8 minutes on two cores)"
	@echo "make test-slow  the tests that take long"
	@echo "make bench      benchmarks: ratios against a named limit or peer"
	@echo "make gpu        all tests and benchmarks of a CUDA device, in 7 minutes"
	@echo "make gpu-wheels the packages that 'python -m tests.gpu' brings to a machine without a package index"
	@echo "make clean      remove what demo and the caches left"

$(RUNS): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "softlabel needs Python 3.11 or newer; say which: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Installing softlabel and what it needs into $(VENV). Most of it is PyTorch: some minutes, once; pip says nothing meanwhile."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable '.[digits]'
	@touch $(RUNS)

$(READY): $(RUNS)
	@echo "Installing linters, test tools and the optional libraries that are tested into $(VENV): some minutes, once."
	@$(PIP) --editable '.[digits,dev]'
	@touch $(READY)

# One thread: as fast for networks this small, and several wait for each other on a busy machine.
demo: $(RUNS)
	OMP_NUM_THREADS=1 $(BIN)/python pipelines/quickstart.py --out demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One process a core with one thread each: tests compare results bit for bit, and small models gain little from more.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not gpu" --durations=10

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "slow"

bench: $(READY)
	$(BIN)/python -m tests.benchmarks

gpu: $(READY)
	$(BIN)/python -m tests.gpu

# What a machine with torch, triton, transformers and timm may lack; for its Python 3.12 on x86-64 Linux.
GPU_WHEELS := simplejpeg jsonargparse docstring-parser typeshed-client dask distributed cloudpickle partd locket zict tblib tornado
gpu-wheels: $(READY)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
	    --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
	    --platform manylinux_2_5_x86_64 --platform manylinux1_x86_64 --dest .gpu-wheels $(GPU_WHEELS)

clean:
	rm -rf demo build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
