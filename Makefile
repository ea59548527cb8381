# `make demo` and `make test` do everything on a fresh machine with Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slurm cluster-demo faults docs lint lock clean

demo: $(READY)  ## the whole chain on a synthetic cohort, about three minutes
	$(BIN)/cauc demo --folder demo/$$(date +%Y%m%d-%H%M%S)

# Tests on real clusters have the machine to themselves: they wait for what takes seconds. A file has a cluster of its
# own, and most of its time is waiting: two at a time.
ON_CLUSTERS := -n 2 --dist loadfile tests/slurm

test: $(READY) $(VENV)/triton  ## the whole test suite
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal -m "not slurm and not demo and not alone"
	$(BIN)/python -m pytest -m alone
	$(BIN)/python -m pytest $(ON_CLUSTERS) -m slurm

# What a cluster of slurm/cluster needs; installed where that may be, else pytest and the demo say what is missing.
SLURM_PACKAGES := slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core iproute2 util-linux
SLURM_PROGRAMS := slurmctld slurmd sinfo munged slurmdbd mariadbd tc unshare
GET_SLURM = missing=; for program in $(SLURM_PROGRAMS); do \
	  PATH="$$PATH:/usr/sbin:/sbin" command -v $$program > /dev/null || missing="$$missing $$program"; done; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES); fi

test-slurm: $(READY)  ## what needs a real cluster: two of four nodes each on this machine, as root; about six minutes
	$(GET_SLURM)
	$(BIN)/python -m pytest $(ON_CLUSTERS) -m slurm

cluster-demo: $(READY)  ## a training on a SLURM cluster on this machine, as root; a node is powered off on the way
	$(GET_SLURM)
	$(BIN)/python slurm/cluster/demo.py

faults: $(READY)  ## killed, full, damaged, twice at once: as the tests, many times each; results in benchmarks/results
	CAUC_FAULTS=full $(BIN)/python -m pytest tests/test_faults*.py tests/slurm/test_cluster_faults.py

docs: $(READY)  ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

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
	.lock-venv/bin/python -m pip freeze --all --exclude-editable | grep -vE '^(nvidia-|triton|pip=)' | sed 's/+cpu$$//' > requirements.lock
	rm -rf .lock-venv

clean:
	rm -rf $(VENV) demo
