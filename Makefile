# Every target makes its own environment: Python >= 3.11 and make are all that a bare machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test bench lint clean

demo: $(VENV)/.ready-experiments
	$(BIN)/flipout demo

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready-dev
	$(BIN)/pip install --quiet --no-deps bayesian-torch==0.5.0
	$(BIN)/pip install --quiet --constraint constraints.txt evotorch==0.6.1 evosax==0.3.2
	$(BIN)/python -m benchmarks

$(VENV)/.ready-%: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flipout needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
