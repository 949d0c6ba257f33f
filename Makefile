# make demo: sets everything up and runs the main job; make test: sets everything up and passes the tests.
# make test WORKERS=4: in four processes at a time, on a machine of four cores or more.
# make test-product PART=3/12: the third of twelve parts of the longest list.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

.PHONY: demo test test-product test-reliability test-cluster test-browser test-real lint docs setup clean

demo: $(READY)
	$(BIN)/accelerate launch --config_file configs/accelerate/cpu2.yaml launch/train.py --config configs/demo.json --config configs/zero2.json

test: $(READY)
	$(BIN)/python -m pytest -m "not real_data and not product and not slow and not cluster and not browser" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-product: $(READY)
	PROGSCALE_PART=$(PART) $(BIN)/python -m pytest -m product

test-reliability: $(READY)
	$(BIN)/python -m pytest -m slow

# Needs root and SLURM (Debian: apt-get install slurm-wlm munge iproute2).
test-cluster: $(READY)
	$(BIN)/python -m pytest -m cluster

# Needs Chromium (Debian: apt-get install chromium chromium-driver).
test-browser: $(READY)
	$(BIN)/python -m pytest -m browser

test-real: $(READY)
	$(BIN)/python -m pytest -m real_data

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages in build/docs/index.html; a warning is a mistake.
docs: $(READY)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env docs build/docs
	@echo "build/docs/index.html"

setup: $(READY)

# torch comes first: DeepSpeed's own set-up wants it, and a machine without a GPU keeps the build it was given.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info
