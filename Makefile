# `make demo` and `make test` do all the set-up on a fresh machine: a virtual environment, pinned versions, the install.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint docs bench models evidence quick bench-lab clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# The documentation site in build/site, with warnings as errors.
docs: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python -m benchmarks.pages.tables --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.performance
	$(BIN)/python -m benchmarks.studies.methods

# Trains, attacks and guards a small model, and exits with an error if the attack or its end fails: minutes.
quick: $(INSTALLED)
	$(BIN)/qcbguard lab bench quick --out build/quick-results --cache build/lab

# Every table of docs/benchmark.md: hours. A run that was stopped goes on where it was.
bench-lab: $(INSTALLED)
	for profile in full adaptive draws strength ablation; do \
		OMP_NUM_THREADS=1 $(BIN)/qcbguard lab bench $$profile --out build/$$profile-results; [ $$? -le 1 ] || exit 1; \
	done
	$(BIN)/python -m benchmarks.pages.benchmark_page --results-dir build

models: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python examples/make_models.py

# Guards an example model and makes all evidence about it, each checked by its own tool: examples/evidence.
evidence: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python examples/make_evidence.py

# torch comes first and alone: a resolver that is free to choose it may pick a build of several gigabytes.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV)
