# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
SLM ?= minilm

.PHONY: help setup demo test unit lint bench clean

help:
	@echo "make demo            four devices learn sentiment together (SLM=smollm2 for the decoder, slower)"
	@echo "make test            lint, types and every test"
	@echo "make unit            the fast tests only"
	@echo "make bench NAME=lpfl print a benchmark's table and write runs/bench/NAME.json"

setup: $(BIN)/.ready

$(BIN)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "tandem-edge needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/python -m examples.demo --slm $(SLM)

test: setup lint
	$(BIN)/python -m pytest

unit: setup
	$(BIN)/python -m pytest -m 'not slow'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m bench $(NAME) --json runs/bench/$(NAME).json

clean:
	rm -rf .venv runs .mypy_cache .ruff_cache .pytest_cache
