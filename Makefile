# `make demo` and `make test` need Python 3.11 or newer, make and a package index; they set up the rest in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
.PHONY: help demo test lint test-slow bench clean

help:
	@echo "make demo       the whole pipeline on embedded data (under 3 minutes)"
	@echo "make test       lint, types and tests (under 10 minutes)"
	@echo "make test-slow  the tests that take long"
	@echo "make bench      benchmarks: ratios against a named limit or peer"
	@echo "make clean      remove what demo and the caches left"

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "softlabel needs Python 3.11 or newer; say which: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[digits,dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/python pipelines/quickstart.py --out demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One process a core with one thread each: tests compare results bit for bit, and small models gain little from more.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not gpu"

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "slow"

bench: $(READY)
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf demo build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
