PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo install lint test test-slow test-faults audit clean

demo: install  ## a study on three procedural domains: 13 to 20 minutes on two cores
	$(BIN)/python -m tuning run --demo

install: .venv/installed  ## everything into .venv, at the versions of constraints.txt

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11'; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'installing packages (a few minutes, about 7 GB) ...'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar on --constraint constraints.txt --editable '.[tuning,cluster,dev]'
	@touch $@

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint, and every test that is not slow, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: install  ## the tests marked slow, two at a time
	$(BIN)/python -m pytest -m slow -n 2

test-faults: install  ## what a study survives, one test after the other; needs PostgreSQL, and a machine with nothing else to do
	$(BIN)/python -m pytest -m faults tests/cluster/test_faults.py

audit: install  ## what is known against the packages of constraints.txt: docs/security.md
	test -x .venv/audit/bin/pip-audit || { $(PYTHON) -m venv .venv/audit && .venv/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit; }
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

clean:  ## the environment and what tools have cached; studies (runs, mlflow.db, mlartifacts) stay
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
