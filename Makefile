# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types clean

demo: $(VENV)/.eval
	$(BIN)/stride-captum explain --task digits --out out/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest --cov --cov-report=term

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The types are checked on what is installed, where adapters/ and evaluation/ are sub-packages.
types: $(VENV)/.dev
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --target build/types .
	MYPYPATH=build/types $(BIN)/mypy -p stride_captum

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.eval: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[eval]"
	touch $@

$(VENV)/.dev: $(VENV)/.eval
	$(BIN)/python -m pip install --quiet --editable ".[eval,dev]"
	touch $@

clean:
	rm -rf build out *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache
