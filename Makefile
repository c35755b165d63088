.DEFAULT_GOAL := help
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3.12)
BIN := .venv/bin
# Quiet by default: no usage reports, no update checks, no questions.
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export NO_ALBUMENTATIONS_UPDATE := 1
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

SHELL := /bin/bash
WORKERS ?= 2

.PHONY: help install demo test test-fast test-kills test-s3 coverage check bench clean

help:  ## show this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(BIN)/.installed  ## create .venv with exactly the versions that were tested

$(BIN)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cpu,demo,dev,stickers,fid]'
	@touch $@

demo: install  ## the whole line on real pictures: download, embed, index, register, swap, draw
	@$(BIN)/knn-diffusion demo

test: install  ## every test, offline (TESTS=tests/tasks/index for some)
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup $(TESTS)

test-fast: install  ## the tests that start no server, no Ray and no pipeline, for development
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup -m "not integration and not slow and not s3" $(TESTS)

coverage: install  ## line and branch coverage of every test, as HTML under build/coverage
	@$(BIN)/python -m pytest --cov=flows --cov=tasks --cov=model --cov=infra --cov-branch --cov-report=html:build/coverage --cov-report=term

test-kills: install  ## 100 kills of the command, each resumed (KILLS=20 for fewer)
	@KILLS=$(or $(KILLS),100) $(BIN)/python -m pytest -s tests/flows/test_kills.py

test-s3: install  ## the tests of a real object store: starts a Ceph RadosGW on loopback (as root on Debian), ends it
	@trap 'tests/services/start-s3.sh stop' EXIT; \
	started=$$(tests/services/start-s3.sh start) && eval "$$started" && $(BIN)/python -m pytest -m s3 $(TESTS)

check: install  ## formatting, lint, types, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: install  ## performance ratios, one JSON each under build/bench (NAME=swap for one; NAME=generator SAMPLES=200)
	@$(BIN)/python tests/benchmarks/run.py $(NAME) $(if $(SAMPLES),--samples $(SAMPLES))

clean:  ## remove what runs have made, not the environment
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
