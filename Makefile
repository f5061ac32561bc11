# README.md lists the raw commands for setup and tests, for machines without make.
PYTHON ?= python3
VENV ?= .venv
TOOLS ?= .tools

SERVICE := {{cookiecutter.project_slug}}
# Paths may contain spaces, at which make splits targets and the arguments of its functions for files.
SPACE := $(subst ,, )
escape = $(subst $(SPACE),\ ,$(1))
# `$(call under,DIRECTORY,PATH)`: PATH itself if it is absolute.
under = $(if $(filter /%,$(firstword $(2))),$(2),$(1)/$(2))

BIN := $(VENV)/bin
READY := $(call escape,$(VENV))/ready
AUDIT_READY := $(call escape,$(VENV))-audit/ready
# Empty if uv is on PATH.
OWN_UV := $(if $(shell command -v uv 2>/dev/null),,$(call escape,$(TOOLS))/bin/uv)
UV := $(if $(OWN_UV),"$(TOOLS)/bin/uv",uv)
# The template directory is a runnable project. Its environment and caches stay outside of it.
IN_SERVICE = $(MAKE) --no-print-directory -C '$(SERVICE)' VENV="$(call under,..,$(VENV))-service" TOOLS="$(call under,..,$(TOOLS))"
export SERVICE_BIN := $(call under,$(CURDIR),$(VENV))-service/bin
# Without compiled modules, each start of a process compiles them: 1.5 s of CPU instead of 0.6 s.
export PYTHONPYCACHEPREFIX := $(call under,$(CURDIR),$(VENV))/cache/pycache
unexport PYTHONDONTWRITEBYTECODE
export RUFF_CACHE_DIR := $(call under,$(CURDIR),$(VENV))/cache/ruff
export MYPY_CACHE_DIR := $(call under,$(CURDIR),$(VENV))/cache/mypy
LOCK = $(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --no-header
RUN = TOOLS="$(call under,$(CURDIR),$(TOOLS))" "$(BIN)/python" -m
PYTEST = $(RUN) pytest -o cache_dir="$(VENV)/cache/pytest"
ATTACK = "$$SERVICE_BIN/python" -m pytest -o cache_dir="$(call under,$(CURDIR),$(VENV))/cache/attack" attack
# A test of a limit of time may fail next to other suites on two CPUs. It runs once more, alone, and the first
# failure stays in the output: a test that fails twice fails the run. Exit status 1 of pytest is a failed test.
IF_TESTS_FAILED = { [ $$? -eq 1 ] && echo '== The tests that failed run once more, alone.'; }
ONCE_MORE = --numprocesses 0 --verbose --last-failed --last-failed-no-failures none

WITHOUT := and not engine

.PHONY: help setup demo lint fast test test-all audit attack bench tuning job-figures auth-figures release lock upgrade

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]*:.*## / { printf "%-13s%s\n", $$1, $$2 }' Makefile

setup: $(READY) ## create the environment of the template's tools

$(OWN_UV):
	"$(PYTHON)" -m pip install --quiet --disable-pip-version-check --target "$(TOOLS)" uv

$(READY): requirements-dev.txt | $(OWN_UV)
	$(UV) venv --quiet --allow-existing --python "$(PYTHON)" "$(VENV)"
	$(UV) pip sync --quiet --require-hashes --python "$(BIN)/python" requirements-dev.txt
	@touch "$@"

# The auditors bring 100 packages of their own, so they get a separate environment.
$(AUDIT_READY): requirements-audit.txt | $(OWN_UV)
	$(UV) venv --quiet --allow-existing --python "$(PYTHON)" "$(VENV)-audit"
	$(UV) pip sync --quiet --require-hashes --python "$(VENV)-audit/bin/python" requirements-audit.txt
	@touch "$@"

demo: setup ## generate the default service and run it under gunicorn
	@$(RUN) scripts.demo

.PHONY: lab labs
# Not in the template's directory of the service, which every generated project would copy.
lab labs: export LABS_DIRECTORY := $(call under,$(CURDIR),.labs)
lab: ## run a lab of the workshop: L=sigterm; without L, list them
	@$(IN_SERVICE) lab L='$(L)'

labs: ## run all labs of the workshop; three minutes
	@$(IN_SERVICE) labs

lint: setup ## check style and types of the tools and of the template
	@"$(BIN)/ruff" check . && "$(BIN)/ruff" format --check . && "$(BIN)/mypy"
	@$(IN_SERVICE) lint types
	@cd '$(SERVICE)' && MYPYPATH=../attack "$$SERVICE_BIN/mypy" ../attack

fast: lint ## lint, and the tests that start no process: generation, hooks, updates
	@$(PYTEST) -m 'not slow' --numprocesses 2

test: fast $(AUDIT_READY) ## all tests that run without Docker, nginx and haproxy
	@echo 'Three generated projects now run tests of their own; they are named when they have passed. This takes minutes.'
	@$(PYTEST) --verbose -m 'slow $(WITHOUT)' --numprocesses 4 --dist loadfile --no-loadscope-reorder || { \
	$(IF_TESTS_FAILED) && $(PYTEST) $(ONCE_MORE) -m 'slow $(WITHOUT)'; }

test-all: WITHOUT :=
test-all: test attack ## all tests, including those that need Docker, nginx or haproxy

audit: setup $(AUDIT_READY) ## run hadolint, checkov, zizmor and others on the deployment files
	@$(PYTEST) tests/test_audit.py

attack: setup ## attack a running service: floods, faults, restarts behind proxies, rolling updates, jobs; 10 to 15 minutes
	@$(IN_SERVICE) setup
	@$(ATTACK) --verbose --numprocesses 2 --dist loadfile --no-loadscope-reorder || { \
	$(IF_TESTS_FAILED) && $(ATTACK) $(ONCE_MORE); }

bench: setup ## benchmark against bare FastAPI and the most used template; QUICK=1 for one short round
	@QUICK='$(QUICK)' $(RUN) benchmarks

tuning: setup ## measure the figures of the service's docs/tuning.md on this machine; two minutes
	@$(RUN) benchmarks.tuning

job-figures: setup ## measure the figures of the service's docs/jobs.md on this machine; ten minutes
	@PART='$(PART)' $(RUN) benchmarks.jobs

auth-figures: setup ## measure what authentication costs a request on this machine; a minute
	@$(RUN) benchmarks.auth

release: setup ## tag the release V=1.2.0, with the unreleased lines of the changelog; pushes nothing
	@$(RUN) scripts.release '$(V)'

lock: | $(OWN_UV) ## lock all requirements; no version changes that need not
	$(LOCK) pyproject.toml --group dev --output-file requirements-dev.txt
	$(LOCK) --group audit --output-file requirements-audit.txt
	@$(IN_SERVICE) $(or $(UPGRADE),lock)

upgrade: LOCK += --upgrade
upgrade: UPGRADE := upgrade
upgrade: lock ## lock the latest compatible versions
