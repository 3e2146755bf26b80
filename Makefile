# The Python that makes the environment; everything else runs in .venv.
PYTHON ?= python3
SEED ?= 0
RUN ?= runs/demo
CHAOS_SEED ?= 0

# the tests and the demo run many small operations: threads that spin while they wait only get in
# the way, and memory given back to the system after each of them has to be asked for again
export OMP_WAIT_POLICY = PASSIVE
export MALLOC_TRIM_THRESHOLD_ = 2147483648
export MALLOC_MMAP_THRESHOLD_ = 33554432

PY = .venv/bin/python
BASE = runs/base

.PHONY: help demo report test chaos lint base base-decoder base-unet
help:               ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/'

.venv/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --no-compile --disable-pip-version-check --editable '.[test]' --constraint constraints.txt
	touch $@

demo: .venv/installed   ## every stage at a small size, in minutes on a laptop
	$(PY) -m rl4med_ddpo.experiments.demo --seed $(SEED) --run $(RUN)

report: .venv/installed   ## the paper's tables and figures, after `make demo`
	OMP_NUM_THREADS=1 $(PY) -m rl4med_ddpo.experiments.table_4 --classifier demo/classifier.yaml --run $(RUN) --per_subgroup 20 --workers 2 --options '["--data.root=$(RUN)/data", "--data.num_workers=0", "--trainer.max_epochs=4", "--trainer.enable_progress_bar=false"]'
	$(PY) run.py report $(RUN)

base: .venv/installed   ## make the embedded base again (half an hour) and measure its gates
	test -d $(BASE)/isic || $(PY) -m rl4med_ddpo.datamodules.dermoscopy --root $(BASE)/isic --images 20000 --seed 1 --label_recall 1 --combinations balanced --workers 2
	test -d $(BASE)/start || $(PY) -m rl4med_ddpo.base_pipeline.build --folder $(BASE)/start --images $(BASE)/isic/ISIC_2019_Training_Input
	OMP_NUM_THREADS=1 $(MAKE) --jobs 2 base-decoder base-unet
	$(PY) -m rl4med_ddpo.base_pipeline.assemble --unet $(BASE)/unet/pipeline --autoencoder $(BASE)/autoencoder/pipeline --images $(BASE)/isic/ISIC_2019_Training_Input --folder assets/base
	$(PY) run.py fit --config base/reader.yaml
	$(PY) -m rl4med_ddpo.base_pipeline.acceptance --pipeline assets/base --reader $(BASE)/reader/checkpoints/last.ckpt

base-decoder:
	$(PY) run.py fit --config base/perceptual.yaml
	$(PY) run.py fit --config base/autoencoder.yaml
base-unet:
	$(PY) run.py fit --config base/unet.yaml

test: .venv/installed   ## the test suite
	$(PY) -m pytest -n 2 --dist loadfile

chaos: .venv/installed  ## 200 random faults against tiny runs; CHAOS_SEED=1 takes others
	CHAOS_TRIALS=200 CHAOS_SEED=$(CHAOS_SEED) $(PY) -m pytest -s tests/fault_tolerance/test_chaos.py

lint: .venv/installed   ## ruff, rules and format; import contracts; types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports
	mkdir -p .venv/types && ln -sfn ../.. .venv/types/rl4med_ddpo && .venv/bin/basedpyright
