# Everything runs in .venv, made from requirements.lock. Needs Python 3.11 or newer and make; nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEEPSPEED := .deepspeed
AZURE := .azure

.PHONY: help demo test test-slow test-gpu check format docs clean

help:  ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Tuneloop needs Python 3.11 or newer; found $$($(PYTHON) --version). Set PYTHON=/path/to/python3.11"; exit 2; }
	@echo "making $(VENV) from requirements.lock (about 2 GB, a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# Beside the environment, not in it: transformers and accelerate import DeepSpeed wherever they find it.
$(DEEPSPEED)/.installed: requirements-deepspeed.lock | $(INSTALLED)
	@echo "putting DeepSpeed into $(DEEPSPEED) for its tests (25 MB)"
	@rm -rf $(DEEPSPEED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(DEEPSPEED) -r requirements-deepspeed.lock
	@touch $@

# Environments of their own, as those who use the SDK have: it needs other versions than we do.
$(AZURE)/.installed: requirements-azure-new.lock requirements-azure-older.lock requirements-azure-notebook.lock requirements-azure-mlflow.lock | $(INSTALLED)
	@echo "putting Azure's SDK, new and a year old, into $(AZURE) for the tests of its dialect (550 MB)"
	@for which in new older; do \
	  rm -rf $(AZURE)/$$which && $(PYTHON) -m venv $(AZURE)/$$which && \
	  $(AZURE)/$$which/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-azure-$$which.lock \
	  || exit 1; done
	@for which in notebook mlflow; do \
	  rm -rf $(AZURE)/$$which && \
	  $(AZURE)/new/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(AZURE)/$$which -r requirements-azure-$$which.lock \
	  || exit 1; done
	@touch $@

demo: $(INSTALLED)  ## tune, evaluate, register, deploy and question a real chat model
	@$(BIN)/tuneloop demo

test: $(INSTALLED) $(DEEPSPEED)/.installed $(AZURE)/.installed  ## the whole test suite, fast tests first
	$(BIN)/python -m pytest tests/unit tests/contract tests/loop -m "not slow and not gpu"

test-slow: $(INSTALLED) $(DEEPSPEED)/.installed $(AZURE)/.installed  ## what takes too long for every change
	$(BIN)/python -m pytest tests -m slow

test-gpu: $(INSTALLED)  ## train, run out of memory and serve on a CUDA device; skipped without one
	$(BIN)/python -m pytest tests/gpu -m gpu -rs

check: $(INSTALLED)  ## style, types and the architecture
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy -p tuneloop.core -p tuneloop.workspace -p tuneloop.server
	$(BIN)/lint-imports

format: $(INSTALLED)  ## mend what the style check would complain about
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

docs: $(INSTALLED)  ## the documentation as a site in site/
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.lock
	$(BIN)/mkdocs build --strict

clean:  ## the environment and everything that was built
	rm -rf $(VENV) $(DEEPSPEED) $(AZURE) site build dist .pytest_cache .mypy_cache .ruff_cache
