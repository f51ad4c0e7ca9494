# Two commands: `make parity` runs the proof, `make test` tests the project. Both install what they need, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RESULTS ?= results
ARGS ?=

.PHONY: parity full mutants test format check unit clean

parity: $(VENV)/installed  ## the quick tier: verdict on the terminal, results in results/quick.json
	$(BIN)/dora-parity run --tier quick --json $(RESULTS)/quick.json $(ARGS)

full: $(VENV)/installed  ## every shape, world 8, and all blocks of the pretrained network
	$(BIN)/dora-parity run --tier full --json $(RESULTS)/full.json $(ARGS)

mutants: $(VENV)/installed  ## every known bug, planted; each must be found
	$(BIN)/dora-parity mutants

test: check unit

check: $(VENV)/installed  ## formatter, linter, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

unit: $(VENV)/installed  ## unit and distributed tests
	$(BIN)/python -m pytest -q $(ARGS)

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(RESULTS) build *.egg-info
