PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

MINUTES ?= 5

.PHONY: help setup demo test chaos bench lint check format contract clean

help:  ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

setup: $(VENV)/.ready  ## make .venv with everything that tests and the demo need

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## run a dozen requests end to end and write demo/gallery.html
	@$(BIN)/python -m demo

test: setup  ## run every test, in three processes
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

chaos: setup  ## inject every fault there is a name for, then MINUTES of random ones; print and write the figures
	@$(BIN)/python -m tests.chaos --minutes $(MINUTES)

bench: setup  ## measure engines and worker with MODEL, a diffusers folder; without it small, on the CPU
	@$(BIN)/python -m benchmarks $(if $(MODEL),--model $(MODEL))

lint: setup  ## style, types, import contracts, committed contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m schemas export --check

check: lint test  ## what CI runs

format: setup  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

contract: setup  ## write docs/contract from the schemas
	$(BIN)/python -m schemas export

clean:
	rm -rf $(VENV) demo/out demo/gallery.html
