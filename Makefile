# The front door. `make` alone lists what it can do.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Processes that run the tests, with one thread each; every one may need 2 GB.
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check format bench clean

help:
	@echo "make quickstart  images -> DetCo and MoCo v2 -> Detectron2 -> a results table, on demo data (12 min on 2 cores)"
	@echo "make test        all tests (20 min on 2 cores)"
	@echo "make setup       only the environment in $(VENV); the others call it when needed"
	@echo "make check       formatting, lint, types, import rules"
	@echo "make format      format and repair what can be repaired"
	@echo "make bench       everything that is measured about pretraining, and what must come out (12 min on 2 cores)"
	@echo "make clean       remove $(VENV) and the quickstart's runs"

setup: $(READY)

$(READY): setup.py tools/install_detectron2.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than 3.10; run make PYTHON=python3.12 (any 3.10 to 3.13)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "error: no venv module; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --upgrade --quiet pip
	@echo "installing torch, torchvision and the rest into $(VENV) (about 3 GB to download, once)"
	$(BIN)/python -m pip install --quiet --editable ".[transfer,proposals,fast,dev]"
	$(BIN)/python tools/install_detectron2.py
	@touch $@
	@$(BIN)/detco-doctor

quickstart: $(READY)
	$(BIN)/python tools/quickstart.py

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/contracts/test_imports.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/python tools/benchmark.py

clean:
	rm -rf $(VENV) runs/quickstart
