# The Python that makes the environment; everything else runs in .venv.
PYTHON ?= python3
SEED ?= 0
RUN ?= runs/demo

# the tests and the demo run many small operations: threads that spin while they wait only get in
# the way, and memory given back to the system after each of them has to be asked for again
export OMP_WAIT_POLICY = PASSIVE
export MALLOC_TRIM_THRESHOLD_ = 2147483648
export MALLOC_MMAP_THRESHOLD_ = 33554432

.PHONY: help demo test lint
help:               ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/'

.venv/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --editable '.[test]' --constraint constraints.txt
	touch $@

demo: .venv/installed   ## every stage at a small size, in minutes on a laptop
	.venv/bin/python demo.py --seed $(SEED) --run $(RUN)

test: .venv/installed   ## the test suite
	.venv/bin/python -m pytest

lint: .venv/installed   ## ruff, rules and format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
