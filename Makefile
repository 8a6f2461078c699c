# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
BIN5 := .venv5/bin
SLM ?= minilm
GGUF ?=

.PHONY: help setup demo test test-transformers5 unit lint bench clean

help:
	@echo "make demo            four devices learn sentiment together (SLM=smollm2 for the decoder, slower)"
	@echo "make test            lint, types and every test"
	@echo "make test-transformers5  the tests of training and server under transformers 5, in .venv5"
	@echo "make setup GGUF=1    compile llama.cpp too; make test then runs the GGUF tests"
	@echo "make unit            the fast tests only"
	@echo "make bench NAME=lpfl print a benchmark's table and write runs/bench/NAME.json"

setup: $(BIN)/.ready $(if $(GGUF),$(BIN)/.gguf)

$(BIN)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "tandem-edge needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(BIN)/.gguf: $(BIN)/.ready
	@echo "compiling llama.cpp: some minutes"
	CMAKE_ARGS="-DLLAVA_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL=$$(getconf _NPROCESSORS_ONLN) \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt 'llama-cpp-python[server]'
	@touch $@

demo: setup
	@$(BIN)/python -m examples.demo --slm $(SLM)

test: setup lint
	$(BIN)/python -m pytest

# What has no model in it is the same there, and is left out.
NO_MODEL := crashes floods fuzz lora_push network poisoning server_process simulate unmasking wire
# .venv makes the tests' tiny bundles: there is no exporter for transformers 5. They name their models by full path.
test-transformers5: setup $(BIN5)/.ready
	$(BIN)/python -m tests.factories runs/transformers5
	TANDEM_TEST_BUNDLES=$(CURDIR)/runs/transformers5 $(BIN5)/python -m pytest $(NO_MODEL:%=--ignore=tests/test_%.py)

$(BIN5)/.ready: pyproject.toml constraints-transformers5.txt
	$(PYTHON) -m venv .venv5
	$(BIN5)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-transformers5.txt \
		--editable '.[train,postgres]' 'transformers>=5' hypothesis openapi-spec-validator pytest pytest-asyncio pytest-timeout rich
	@touch $@

unit: setup
	$(BIN)/python -m pytest -m 'not slow'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m bench $(NAME) --json runs/bench/$(NAME).json

clean:
	rm -rf .venv .venv5 runs .mypy_cache .ruff_cache .pytest_cache
