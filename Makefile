.DEFAULT_GOAL := help
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3.12)
BIN := .venv/bin
# Quiet by default: no usage reports, no update checks, no questions.
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export NO_ALBUMENTATIONS_UPDATE := 1
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
export NO_MKDOCS_2_WARNING := 1

SHELL := /bin/bash
# Three for two cores: many tests wait for servers and processes.
WORKERS ?= 3
PORT ?= 8000

.PHONY: help install demo playground up down deploy test test-fast durations test-kills test-s3 coverage check docs bench clean

help:  ## show this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(BIN)/.installed  ## create .venv with the tested versions

$(BIN)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cpu,demo,dev,docs,stickers,fid,formats,jxl,postgres,replicas,telemetry,web]'
	@touch $@

demo: install  ## the full pipeline on 5,400 images: download, embed, index, register, generate, swap
	@$(BIN)/knn-diffusion demo

playground: install  ## the demo's databases in a browser, at http://127.0.0.1:8000 (PORT=8001 for another port)
	@test -d build/demo/data || { echo "there are no databases in build/demo/data; run make demo first" >&2; exit 1; }
	@$(BIN)/knn-diffusion serve --root build/demo/data --port $(PORT)

up: install  ## start Prefect, MLflow, Ray and a worker on this machine; docs/how-to/operate.md
	@$(BIN)/knn-diffusion up

down: install  ## stop what make up started
	@$(BIN)/knn-diffusion down

deploy: install  ## deploy prefect.yaml and domains.yaml, and delete what they no longer contain
	@$(BIN)/knn-diffusion deploy

test: install  ## every test, offline (TESTS=tests/tasks/index for some)
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup $(TESTS)

test-fast: install  ## the tests that start no server, no Ray and no pipeline, for development
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup -m "not integration and not slow and not s3" $(TESTS)

durations: install  ## run every test and record how long each takes, in tests/durations.txt
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --record-durations

coverage: install  ## line and branch coverage of every test, as HTML under build/coverage
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --cov=flows --cov=tasks --cov=model --cov=infra --cov-branch --cov-report=html:build/coverage --cov-report=json:build/coverage.json --cov-report=term

test-kills: install  ## 100 kills of the command, each resumed (KILLS=20 for fewer)
	@KILLS=$(or $(KILLS),100) $(BIN)/python -m pytest -s tests/flows/test_kills.py

test-s3: install  ## tests against a real object store: a Ceph RadosGW on loopback (as root, on Debian)
	@trap 'tests/services/start-s3.sh stop' EXIT; \
	started=$$(tests/services/start-s3.sh start) && eval "$$started" && $(BIN)/python -m pytest -m s3 $(TESTS)

check: install  ## formatting, lint, spelling, words, types, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/codespell
	@$(BIN)/python tests/style.py
	@$(BIN)/mypy
	@$(BIN)/lint-imports

docs: install  ## the documentation site, in build/docs
	@$(BIN)/mkdocs build

bench: install  ## benchmarks, one JSON file each in build/bench (NAME=swap, NAME=generator SAMPLES=60, NAME=lists ROWS=1000000)
	@$(if $(ROWS),ROWS=$(ROWS)) $(if $(PROMPTS),PROMPTS=$(PROMPTS)) $(BIN)/python tests/benchmarks/run.py $(NAME) $(if $(SAMPLES),--samples $(SAMPLES))

clean:  ## remove build outputs and caches, not the environment
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
