# One command each; every command runs `make setup` first, which does nothing when nothing changed.
#   make setup [PYTHON=python3.11] [EXTRAS=ros,bags] [TORCH_INDEX=URL]

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?=
TORCH_INDEX ?=
UPGRADE ?=
BIN := $(VENV)/bin
BOOTSTRAP := $(PYTHON) tools/bootstrap.py --venv "$(VENV)" --extras "$(EXTRAS)" --torch-index "$(TORCH_INDEX)"
FAST := not slow and not gpu
# Real processes and DDS against the clock: one after the other, with the machine to themselves.
LIVE := test/nodes test/packaging/test_dds.py test/commands/test_check.py
PINNED_PYTHONS := 3.10 3.11 3.12
PIN_TOOLS := build/pins

.PHONY: help setup system-deps demo experiment test test-all lint ruff imports types bench pins clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: ## .venv with everything at pinned versions
	@$(BOOTSTRAP)

system-deps: ## the system packages that pip cannot bring (as root, with apt)
	@$(BOOTSTRAP) --system-only

demo: setup ## the whole road in small: record, convert, train, evaluate, drive; in simulation
	@$(BIN)/kuavo-smolvla demo

experiment: setup ## does the curriculum keep the tasks? hours; resumable; docs/experiment.md
	@$(BIN)/python training/experiment.py

test: setup ## all fast tests, with coverage
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(FAST)" -n 2 --dist loadfile $(LIVE:%=--ignore=%) --cov --cov-report=
	@$(BIN)/python -m pytest -m "$(FAST)" $(LIVE) --cov --cov-append --cov-report=
	@$(BIN)/coverage report --skip-covered # after the tests: what failed stands last in a log

test-all: setup ## every test this machine can run
	@$(BIN)/python -m pytest

lint: setup ruff imports types ## style, import rules, types

ruff:
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

imports:
	@$(BIN)/lint-imports --no-cache

types:
	@$(BIN)/mypy

bench: setup ## every benchmark against its targets
	@for program in benchmarks/*.py; do echo "== $$program"; $(BIN)/python "$$program" --check; done

pins: ## new constraints for pyproject.toml; UPGRADE=--upgrade also takes newer versions
	@$(PYTHON) -m venv $(PIN_TOOLS) && $(PIN_TOOLS)/bin/pip install -q uv
	@for version in $(PINNED_PYTHONS); do \
	  $(PIN_TOOLS)/bin/uv pip compile -q $(UPGRADE) pyproject.toml --all-extras --python-version $$version \
	    --python-platform x86_64-manylinux_2_28 --no-header --no-annotate -o constraints/py$${version/./}.txt; \
	done

clean: ## remove what was built (not .venv, not outputs/)
	@rm -rf build install log .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage
