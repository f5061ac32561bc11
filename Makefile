# README.md has the raw commands of set-up and tests, for machines without make.
PYTHON ?= python3
VENV ?= .venv
TOOLS ?= .tools

SERVICE := {{cookiecutter.project_slug}}
BIN := $(VENV)/bin
UV := $(or $(shell command -v uv 2>/dev/null),$(TOOLS)/bin/uv)
# The template's folder runs as it stands; its environment and caches stay outside of it.
IN_SERVICE = $(MAKE) --no-print-directory -C '$(SERVICE)' VENV='$(abspath $(VENV))-service' TOOLS='$(abspath $(TOOLS))'
SERVICE_BIN := $(abspath $(VENV))-service/bin
export PYTHONDONTWRITEBYTECODE := 1
export RUFF_CACHE_DIR := $(abspath $(VENV))/cache/ruff
export MYPY_CACHE_DIR := $(abspath $(VENV))/cache/mypy
LOCK = $(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --no-header --upgrade
PYTEST = SERVICE_BIN='$(SERVICE_BIN)' $(BIN)/python -m pytest -o cache_dir=$(abspath $(VENV))/cache/pytest

WITHOUT := -m 'not engine'

.PHONY: help setup demo lint fast test test-all audit attack bench tuning lock

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do printf '%-10s%s\n' "$$name" "$$text"; done

setup: $(VENV)/ready ## create the environment of the template's own tools

$(TOOLS)/bin/uv:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target $(TOOLS) uv

$(VENV)/ready: requirements-dev.txt | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	$(UV) pip sync --quiet --require-hashes --python $(BIN)/python requirements-dev.txt
	@touch $@

# What the auditors need (100 packages) fits nobody else's: an environment of their own.
$(VENV)-audit/ready: requirements-audit.txt | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)-audit
	$(UV) pip sync --quiet --require-hashes --python $(VENV)-audit/bin/python requirements-audit.txt
	@touch $@

demo: setup ## bake the default service and run it under its production server
	@TOOLS='$(abspath $(TOOLS))' $(BIN)/python -m scripts.demo

lint: setup ## check style and types here, and in the template as it stands
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(IN_SERVICE) lint types
	@cd '$(SERVICE)' && MYPYPATH=../attack $(SERVICE_BIN)/mypy ../attack

fast: lint ## the tests that run nothing: bakes, hooks, updates
	@$(PYTEST) -m 'not slow'

test: lint $(VENV)-audit/ready ## all tests that need no Docker, nginx or haproxy
	@echo 'Three projects run all their own tests first, in silence: some minutes.'
	@$(PYTEST) --numprocesses 3 --dist loadfile --no-loadscope-reorder $(WITHOUT)

test-all: WITHOUT :=
test-all: test attack ## all tests, with Docker, nginx and haproxy where one needs them

audit: setup $(VENV)-audit/ready ## hadolint, checkov, zizmor and others over all that a project is deployed with
	@$(PYTEST) tests/test_audit.py

attack: setup ## floods, faults, payments under fire, restarts behind nginx and haproxy, rolling updates; 12 minutes
	@$(IN_SERVICE) setup
	@$(SERVICE_BIN)/python -m pytest attack

bench: setup ## measure the service beside bare FastAPI and the most used peer; QUICK=1 for one short round
	@QUICK='$(QUICK)' TOOLS='$(abspath $(TOOLS))' $(BIN)/python -m benchmarks

tuning: setup ## measure the figures of docs/tuning.md on this machine; two minutes
	@TOOLS='$(abspath $(TOOLS))' $(BIN)/python -m benchmarks.tuning

lock: | $(UV) ## write all requirements anew, with the newest versions that fit
	$(LOCK) pyproject.toml --group dev --output-file requirements-dev.txt
	$(LOCK) --group audit --output-file requirements-audit.txt
	@$(IN_SERVICE) lock
