# `make demo` and `make test` do everything on a fresh machine with Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
export OMP_NUM_THREADS ?= 1

.PHONY: demo test faults lint lock clean

demo: $(READY)  ## the whole chain on a synthetic cohort, about three minutes
	$(BIN)/cauc demo --folder demo/$$(date +%Y%m%d-%H%M%S)

test: $(READY) $(VENV)/triton  ## the whole test suite
	$(BIN)/python -m pytest

faults: $(READY)  ## killed, full, damaged, twice at once: as the tests, many times each; results in benchmarks/results
	CAUC_FAULTS=full $(BIN)/python -m pytest tests/test_faults*.py

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --editable .
	touch $@

# A CUDA build of torch brings the triton it wants; beside a CPU build, tests interpret and compile its kernels.
$(VENV)/triton: $(READY)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --disable-pip-version-check triton==3.9.0
	touch $@

lock:  ## resolve pyproject.toml anew into requirements.lock
	rm -rf .lock-venv && $(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install --quiet torch==2.13.0
	.lock-venv/bin/python -m pip install --quiet --editable '.[dev]'
	.lock-venv/bin/python -m pip freeze --exclude-editable | grep -vE '^(nvidia-|triton)' | sed 's/+cpu$$//' > requirements.lock
	rm -rf .lock-venv

clean:
	rm -rf $(VENV) demo
