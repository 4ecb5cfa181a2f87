# Set-up is `make demo` and `make test`; both create .venv themselves.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo deploy-demo test test-all lint format bench docs clean

help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed  ## Install into .venv and train digits by forward passes only (about a minute).
	$(BIN)/baffle train --batch-size 16 --rounds 200 --json

deploy-demo: .venv/installed  ## The same with SuperLink, TLS and 3 clients as processes, some of them killed.
	$(BIN)/python apps/demo.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: .venv/installed  ## Format the code.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: export OMP_NUM_THREADS = 1
test: lint  ## Lint, types, tests, and every snippet of README and docs.
	$(BIN)/pytest -q -n 2 --dist loadfile -m 'not slow'

test-all: test docs  ## Also what takes long: docs, wheels, full fault tests.
	$(BIN)/pytest -q -m slow

bench: .venv/installed  ## Measure speed and memory against the references, and write the docs' figures.
	$(BIN)/python -m bench.performance

docs: .venv/installed  ## Build the documentation into site/.
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv site dist .mypy_cache .ruff_cache .hypothesis
