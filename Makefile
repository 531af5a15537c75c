PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST := .venv-2.19
# so many tests at once: one more than CI has cores, because a third of them wait; those marked `timed` follow, one by one
LANES ?= 3
IN_LANES := -n $(LANES)
PYTEST := $(BIN)/python -m pytest -q --durations=10

.PHONY: demo test test-all test-matrix test-fuzz test-versions bench check format clean

demo: $(INSTALLED)  ## train a language model of Python source code, and show the result
	$(BIN)/tfdist launch --workers=2 -- train --config=configs/lm_tiny.py --workdir=runs/demo

test: $(INSTALLED)  ## the tests, in minutes
	$(PYTEST) $(IN_LANES) -m "not timed"
	$(PYTEST) -m timed

test-all: $(INSTALLED)  ## what `make test` leaves out: every feature on every strategy, the long faults
	@begun=$$(date +%s); set -x; $(PYTEST) --slow $(IN_LANES) -m "slow and not timed" \
		&& $(PYTEST) --slow -m "slow and timed" \
		&& echo "make test-all: $$(($$(date +%s) - begun)) s in all"

test-matrix: $(INSTALLED)  ## every cell on every strategy in both precisions, of which `make test-all` runs a choice
	$(PYTEST) --slow --matrix $(IN_LANES) tests/test_equality.py tests/test_fit.py -k test_every_cell

test-fuzz: $(INSTALLED)  ## 3,000 damaged checkpoints and datasets, of which `make test` has 200
	$(PYTEST) --fuzz $(IN_LANES) -m fuzz

test-versions: $(OLDEST)/.installed  ## each feature of fit, and what it replaces in Keras, at the other end of the supported versions
	$(OLDEST)/bin/python -m pytest -q --slow $(IN_LANES) tests/test_upstream.py tests/test_fit.py tests/test_fit_checkpoint.py \
		-k "upstream or cross_section and mirrored or every_cell and float32 or interrupted"

bench: $(INSTALLED)  ## the table of docs/benchmarks.md
	$(BIN)/python benchmarks/step.py

check: $(INSTALLED)  ## format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(OLDEST) .results build *.egg-info

$(OLDEST)/.installed: setup.cfg setup.py
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check -e '.[test]' 'tensorflow==2.19.*' 'keras==3.10.*'
	touch $@

$(INSTALLED): setup.cfg setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test,dev,notebook,hub]'
	touch $@
