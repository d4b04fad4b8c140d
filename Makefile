# Two commands for a new user:
#
#   make quickstart    create .venv, install, train a small Llama in four processes
#   make test          create .venv, install, run the tests
#
# Variables: PYTHON (3.11 or 3.12), VENV, PIP_ARGS (more arguments for pip install), TORCH_INDEX (an
# index with CPU builds of torch), ARGS (more arguments for pytest, or overrides for quickstart).

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint format clean

VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
BIN := $(VENV)/bin

PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null \
	&& echo $$python && break; done)

# torch from PyPI brings gigabytes of CUDA. Without an NVIDIA driver, and where pip is not already
# told where to look, PyTorch's own index of CPU builds is looked at as well. `TORCH_INDEX=` stops it.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null \
	|| $(BIN)/python -m pip config list | grep -qE 'find-links|index-url|no-index' \
	|| echo https://download.pytorch.org/whl/cpu)

INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	$(addprefix --extra-index-url ,$(TORCH_INDEX)) $(PIP_ARGS)

help:
	@awk '!/^#/ { exit } { sub(/^# ?/, ""); print }' Makefile

quickstart: $(VENV)/.installed
	$(BIN)/megallama train quickstart $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/pytest $(ARGS)

test-all: $(VENV)/.installed-dev
	$(BIN)/pytest -m "" $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# Each environment is installed once, and again when what it is made from changes.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml setup.py | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml setup.py | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.installed $@
