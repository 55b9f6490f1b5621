# Every target makes its own environment: Python >= 3.11 and make are all that a bare machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test coverage bench gpu lint docs release-check matrix clean

demo: $(VENV)/.ready-experiments
	$(BIN)/flipout demo

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The same tests, and fails where they reach less than 95 % of the lines (pyproject.toml); processes that they start count.
coverage: $(VENV)/.ready-dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist worksteal
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs: $(VENV)/.ready-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs site
	@echo "open site/index.html"

bench: $(VENV)/.ready-dev
	$(BIN)/pip install --quiet --no-deps bayesian-torch==0.5.0
	$(BIN)/pip install --quiet --constraint constraints.txt evotorch==0.6.1 evosax==0.3.2
	$(BIN)/python -m benchmarks

# On a machine with CUDA, under a python that has torch and numpy, without a network: laws, speed, and slices of the paper, in at most
# twenty minutes. The same command goes on after a kill; `flipout report runs/gpu` shows the folder, here or elsewhere.
gpu:
	PYTHONPATH=src:. $(PYTHON) -m benchmarks.gpu --device cuda --minutes 20 --out runs/gpu $(GPU_OPTIONS)

# The wheel in a fresh environment, its dependencies resolved by pip.
release-check: $(VENV)/.ready-dev
	$(BIN)/python tools/release.py

# The core tests under the oldest and the newest release of torch; gigabytes and many minutes.
matrix: $(VENV)/.ready-dev
	$(BIN)/python tools/matrix.py

$(VENV)/.ready-%: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flipout needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) site .matrix .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
