# Targets that run anything set up .venv first (tools/setup_env.py; at once when nothing changed).
#   PYTHON=python3.12      the interpreter that .venv is made from
#   TORCH_INDEX_URL=URL    where torch comes from, for a smaller CPU build
#   WORKERS=2              test processes
#   PROMPT="..."           what make demo continues
PYTHON ?= python3
WORKERS ?= 2
PROMPT ?= What is a river?
# a recipe cannot rely on the working directory (make -f), nor a prerequisite on a path with spaces
ROOT := $(shell cd "$$(dirname "$(strip $(MAKEFILE_LIST))")" && pwd)
IN := cd "$(ROOT)" && OMP_NUM_THREADS=1
VENV_PYTHON := .venv/bin/python

.PHONY: help setup demo test lint check test-gpu compile soak lines wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       generate from the embedded model"
	@echo "make test       ruff, mypy and every test that needs no GPU"
	@echo "make lint       ruff and its format check"
	@echo "make check      lint and test: what a commit must pass"
	@echo "make test-gpu   the tests that need a GPU"
	@echo "make compile    resources of every kernel on every architecture, no GPU needed"
	@echo "make soak       the long tests at full size"
	@echo "make lines      lines of code per file"
	@echo "make wheel      wheel and sdist in dist/"
	@echo "make clean      remove .venv, dist/ and caches"

setup:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$$($(PYTHON) --version 2>&1) is $(PYTHON), want 3.10 or newer: make PYTHON=python3.12"; \
	  exit 1; }
	@$(PYTHON) "$(ROOT)/tools/setup_env.py"

demo: setup
	@printf 'prompt: %s\n\n' "$(PROMPT)"
	@$(IN) $(VENV_PYTHON) -m lfm2_gpu generate --model pocket --max-tokens 96 "$(PROMPT)"

lint: setup
	@$(IN) $(VENV_PYTHON) -m ruff check --quiet .
	@$(IN) $(VENV_PYTHON) -m ruff format --quiet --check . || { \
	  echo "not formatted: .venv/bin/ruff format ."; exit 1; }

test: setup
	@$(IN) $(VENV_PYTHON) -m ruff check --quiet .
	@$(IN) $(VENV_PYTHON) -m mypy
	@$(IN) $(VENV_PYTHON) -m pytest -n $(WORKERS) --dist worksteal --timeout 600 -m "not gpu"

check: lint test

test-gpu: setup
	@$(IN) $(VENV_PYTHON) -m pytest -m gpu

compile: setup
	@$(IN) $(VENV_PYTHON) -m lfm2_gpu.bench.resources tests/kernels/cases_*.py

soak: setup
	@$(IN) PYTHONPATH=.:kernels $(VENV_PYTHON) tests/soak.py --out docs/soak

lines:
	@cd "$(ROOT)" && $(PYTHON) tools/lines.py

wheel: setup
	@$(IN) $(VENV_PYTHON) -m pip wheel -q --no-deps --no-build-isolation -w dist .
	@$(IN) $(VENV_PYTHON) -c "from setuptools import build_meta as b; b.build_sdist('dist')" >/dev/null
	@ls -l "$(ROOT)/dist"

clean:
	@cd "$(ROOT)" && rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
