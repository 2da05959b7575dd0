# What the commands of docs/contributing.md do. PYTEST_ADDOPTS passes options on to pytest.
ROOM ?= .
export OMP_NUM_THREADS ?= 1

.PHONY: help setup quick test lint types format check

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup:  ## install moellava and all that its tests need
	pip install -e ".[test]"

quick:  ## lint and the quick tests: 40 seconds on two cores
	ruff check .
	ruff format --check .
	pytest -q -n 2 -m "not slow" tests/test_architecture.py tests/storage tests/test_settings.py tests/images tests/eval/scorers

test:  ## tests of one folder: make test ROOM=encoders
	pytest -q -n 2 tests/$(ROOM)

lint:  ## ruff: rules and format
	ruff check .
	ruff format --check .

types:  ## mypy, strict
	mypy

format:  ## let ruff rewrite what it can
	ruff check --fix .
	ruff format .

check: lint types  ## all that .ci/run does, in the present environment
	moellava demo
	pytest -n 3 --dist loadfile --no-loadscope-reorder
