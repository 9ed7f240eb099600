# Three commands for a new user: `make demo`, `make serve` and `make test`. Each sets up the virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo "make demo   set up, then render the bundled manifest and write its report into demo/"
	@echo "make serve  set up, then render on demand at http://127.0.0.1:8000 with the tiny model, into service/"
	@echo "make test   set up, then run all tests"
	@echo "make check  lint, types and import directions"
	@echo "make lock   pin what is installed now in constraints.txt"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.PHONY: demo
demo: $(VENV)/installed
	$(BIN)/python -m flows.demo

.PHONY: serve
serve: $(VENV)/installed
	$(BIN)/echovideo serve service

.PHONY: test
test: $(VENV)/installed
	# Threads that wait for each other without spinning: two workers' threads share the cores.
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --no-loadscope-reorder --durations=15

.PHONY: check
check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: lock
lock: $(VENV)/installed
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt
