# make demo   render scenes, learn from their boxes, label and show the masks (a few minutes on two CPU cores)
# make test   the test suite but for the next
# make chaos  the tests that start clusters, and those that kill workers, actors, drivers and nodes
# make check  lint, format and types
# make setup  the virtual environment alone
# Every target sets up .venv by itself the first time and can be run again. ARGS are handed to pytest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Spinning OpenMP threads make two busy cores several times slower.
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup demo test chaos check format clean

help:
	@grep '^# make' Makefile | cut -c3-

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; say which with: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	@echo "== setting up $(VENV) (about 6 GB, two minutes on a fast line)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	@touch $@

demo: setup
	@echo "== demo: scenes -> training on two workers -> evaluation -> labels -> pictures"
	$(BIN)/mal demo

test: setup
	@echo "== tests (what needs files or hardware that are absent is skipped and says so)"
	$(BIN)/python -m pytest -q -m "not chaos and not cluster" --durations=15 $(ARGS)

chaos: setup
	@echo "== tests that start clusters, and that kill workers, actors, drivers and nodes"
	$(BIN)/python -m pytest -q -m "chaos or cluster" --durations=24 $(ARGS)

check: setup
	@echo "== lint, format, types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
