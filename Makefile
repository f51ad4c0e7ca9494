# Two commands: `make parity` runs the proof, `make test` tests the project. Both install what they need, once.
# What tests are slow by nature (kills under load, long fine-tunes) `make test-long` runs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RESULTS ?= results
ARGS ?=
# `make gpu`: which part, where, and what is brought along for which Python and CUDA
PART ?= all
DEVICE ?= cuda
CARRIED ?= .carried
CARRIED_PYTHON ?= 3.12
CARRIED_CUDA ?= 130
CARRIED_PACKAGES := bitsandbytes tyro typeguard docstring_parser allpairspy gguf
# Processes that share the tests, a file at a time, in the order of tests/conftest.py: one more than cores, as many wait.
WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest -q --durations=15
SHARED := --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder

# What Python compiles is kept: tests start processes by the hundred, and pip compiles nothing.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: parity full gpu carried mutants mutation mutation-map test test-long format check lint types unit installed clean

parity: $(VENV)/installed  ## the quick tier: verdict on the terminal, results in results/quick.json
	$(BIN)/dora-parity run --tier quick --json $(RESULTS)/quick.json $(ARGS)

full: $(VENV)/installed  ## every shape, world 8, and all blocks of the pretrained network
	$(BIN)/dora-parity run --tier full --json $(RESULTS)/full.json $(ARGS)

gpu:  ## what only a GPU can show, into results/gpu.json; nothing is installed: see CONTRIBUTING
	PYTHONPATH=$(CARRIED) $(PYTHON) -m parity gpu --part $(PART) --device $(DEVICE) --json $(RESULTS)/gpu.json $(ARGS)

carried:  ## what a machine with torch, JAX and transformers may lack, for one without a network: some 7 MiB
	rm -rf $(CARRIED)
	$(PYTHON) -m pip install --quiet --target $(CARRIED) --no-deps --no-compile --only-binary=:all: \
		--python-version $(CARRIED_PYTHON) --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 \
		--constraint constraints.txt $(CARRIED_PACKAGES)
	find $(CARRIED)/bitsandbytes -name 'libbitsandbytes_*.so' ! -name '*_cpu.so' ! -name '*_cuda$(CARRIED_CUDA).so' -delete
	du -sh $(CARRIED)

mutants: $(VENV)/installed  ## every known bug, planted; each must be found
	$(BIN)/dora-parity mutants

mutation: $(VENV)/installed  ## generic mutants of torch_impl and ref; ARGS='--help' says what can be chosen
	$(BIN)/python tests/mutation $(ARGS)

mutation-map: $(VENV)/installed  ## which test runs which line, for `make mutation` to choose by; some ten minutes
	mkdir -p $(RESULTS)
	rm -f $(RESULTS)/mutation-map.jsonl
	CI=1 OMP_NUM_THREADS=1 MUTATION_MAP=$(RESULTS)/mutation-map.jsonl PYTHONPATH=tests/mutation \
		$(BIN)/python -m pytest -q -p tracing -m 'not long and not distributed' \
		$$($(BIN)/python tests/mutation --list-tests) $(ARGS)

test: lint  ## all checks and tests; the types, half a minute, beside the tests
	@said=$$(mktemp); $(BIN)/basedpyright >"$$said" 2>&1 & types=$$!; \
	$(PYTEST) $(SHARED) -m 'not long' $(ARGS); tests=$$?; \
	wait $$types; types=$$?; echo "types: $$(cat "$$said")"; rm -f "$$said"; exit $$((tests | types))

check: lint types

lint: $(VENV)/installed  ## formatter, linter, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(VENV)/installed
	$(BIN)/basedpyright

unit: $(VENV)/installed  ## the tests of `make test` alone
	$(PYTEST) $(SHARED) -m 'not long' $(ARGS)

test-long: $(VENV)/installed  ## what is slow by nature; one after the other, since kills and hangs have limits
	$(PYTEST) -m long $(ARGS)

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

installed: $(VENV)/installed  ## the virtual environment, with the versions of constraints.txt

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(RESULTS) build *.egg-info .pytest_cache
