# Two commands: `make parity` runs the proof, `make test` tests the project. Both install what they need, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RESULTS ?= results
ARGS ?=

.PHONY: parity full mutants mutation mutation-map test format check unit clean

parity: $(VENV)/installed  ## the quick tier: verdict on the terminal, results in results/quick.json
	$(BIN)/dora-parity run --tier quick --json $(RESULTS)/quick.json $(ARGS)

full: $(VENV)/installed  ## every shape, world 8, and all blocks of the pretrained network
	$(BIN)/dora-parity run --tier full --json $(RESULTS)/full.json $(ARGS)

mutants: $(VENV)/installed  ## every known bug, planted; each must be found
	$(BIN)/dora-parity mutants

mutation: $(VENV)/installed  ## generic mutants of torch_impl and ref; ARGS='--help' says what can be chosen
	$(BIN)/python tests/mutation $(ARGS)

mutation-map: $(VENV)/installed  ## which test runs which line, for `make mutation` to choose by; some ten minutes
	mkdir -p $(RESULTS)
	rm -f $(RESULTS)/mutation-map.jsonl
	CI=1 OMP_NUM_THREADS=1 MUTATION_MAP=$(RESULTS)/mutation-map.jsonl PYTHONPATH=tests/mutation \
		$(BIN)/python -m pytest -q -p tracing -m 'not slow and not distributed' \
		$$($(BIN)/python tests/mutation --list-tests) $(ARGS)

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
