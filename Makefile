# Everything needs only Python >= 3.11, make and a package registry.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RESULTS ?= results
JOBS ?= 2

.PHONY: play test lint types tests docs bench clean
.DEFAULT_GOAL := play

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[lab,hf,dask,docs,test]"
	touch $@

## Replay the papers on bundled handwritten digits and write the report.
play: $(VENV)/installed
	ETUDE_DATA= ETUDE_CACHE=$(VENV)/cache $(BIN)/etude run all --preset small --results $(RESULTS)/play

## Lint, types, layers, every test, and the documentation.
test: lint types tests docs

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/installed
	$(BIN)/mypy

tests: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS) --cov=etude --cov-report=term:skip-covered

docs: $(VENV)/installed
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

## Measure against the peers, on one thread where a script does not say otherwise, and write docs/results/benchmarks/.
bench: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[bench]"
	set -e; for script in $(filter-out benchmarks/side_by_side.py,$(wildcard benchmarks/*.py)); do \
	  OMP_NUM_THREADS=1 $(BIN)/python $$script; done

clean:
	rm -rf $(VENV) docs/_build $(RESULTS)/play
