# `make demo` and `make test` need Python 3.10 to 3.13, git and make; everything else is installed into .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
BUNDLE := build/digits-var
# Small models run fastest on one thread a process; real ones choose for themselves.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint format parity distill docs clean help

help:
	@echo "make demo      set up, export the embedded model, draw digits in one step, prove them equal to PyTorch"
	@echo "make test      set up and run the tests"
	@echo "make lint      ruff, mypy, import contracts"
	@echo "make format    apply ruff's formatting and fixes"
	@echo "make parity    hold the embedded model's bundle against PyTorch"
	@echo "make distill   train the embedded model again, from the digits to the student (under an hour)"
	@echo "make docs      make the pictures of docs/ again"

demo: $(VENV)/.export $(BUNDLE)/bundle.json
	$(BIN)/ddexport sample $(BUNDLE) --steps 1 -n 8 -o build/digits-one-step.png
	$(BIN)/ddexport sample $(BUNDLE) --steps 2 -n 8 -o build/digits-two-steps.png
	$(BIN)/ddexport validate parity $(BUNDLE)
	@echo
	@echo "Look at build/digits-one-step.png: each digit drawn in one step. The same noise in two: build/digits-two-steps.png"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu" $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

parity: $(VENV)/.export $(BUNDLE)/bundle.json
	$(BIN)/python -m validate parity $(BUNDLE) --images 100

distill: $(VENV)/.dev
	$(BIN)/ddexport distill digits-var --install
	$(BIN)/python -m validate quality digits-var

docs: $(VENV)/.dev $(BUNDLE)/bundle.json
	$(BIN)/ddexport sample $(BUNDLE) --steps 1 -n 16 -o docs/images/digits-one-step.png
	$(BIN)/python -m validate quality digits-var --grid docs/images/digits-var-grid.png

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(BUNDLE)/bundle.json: $(VENV)/.export $(wildcard recipes/*digits-var* recipes/weights/digits-var*)
	$(BIN)/ddexport onnx --model digits-var -o $(BUNDLE) --force

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.export: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[export,validate]"
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.export
