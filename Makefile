# imagemill: make demo | make test | make coverage | make check | make fix | make bench
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export OMP_NUM_THREADS ?= 1

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
HAS_MONITORING := import sys; sys.exit(sys.version_info < (3, 12))

.PHONY: setup demo test coverage check fix bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "imagemill needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check torch
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(READY)

demo: setup
	head -n 24 demo/prompts.txt | $(BIN)/imagemill generate --file - --out out

# Before Python 3.12 coverage is too slow to be collected in every run.
test: setup
	@if $(BIN)/python -c '$(HAS_MONITORING)'; then \
		COVERAGE_CORE=sysmon $(PYTEST) --cov --cov-report=; \
	else \
		$(PYTEST); \
	fi

coverage: setup
	$(PYTEST) --cov --cov-report=term-missing:skip-covered

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/oxlint service/web
	$(BIN)/python tests/lua.py
	$(BIN)/python tests/house.py

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m bench

clean:
	rm -rf $(VENV) out data .coverage .coverage.*
