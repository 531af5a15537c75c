PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST := .venv-2.19

.PHONY: demo test test-all test-versions bench check format clean

demo: $(INSTALLED)  ## train a language model of Python source code, and show the result
	$(BIN)/tfdist launch --workers=2 -- train --config=configs/lm_tiny.py --workdir=runs/demo

test: $(INSTALLED)  ## the tests, in minutes
	$(BIN)/python -m pytest -q --durations=10

test-all: $(INSTALLED)  ## what `make test` leaves out: the whole matrix of strategies and features, the long faults
	$(BIN)/python -m pytest -q --slow -m slow --durations=25

test-versions: $(OLDEST)/.installed  ## fit and what it replaces in Keras, at the other end of the supported versions
	$(OLDEST)/bin/python -m pytest -q --slow tests/test_upstream.py tests/test_fit.py tests/test_fit_checkpoint.py \
		-k "upstream or every_cell and mirrored:2-float64 or interrupted"

bench: $(INSTALLED)  ## the table of docs/benchmarks.md
	$(BIN)/python benchmarks/step.py

check: $(INSTALLED)  ## format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info

$(OLDEST)/.installed: setup.cfg setup.py
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check -e '.[test]' 'tensorflow==2.19.*' 'keras==3.10.*'
	touch $@

$(INSTALLED): setup.cfg setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test,dev,notebook,hub]'
	touch $@
