# `make demo` and `make test` need Python 3.10 to 3.13, git and make; everything else is installed into .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The embedded models, one of each family.
MODELS  := digits-var digits-llamagen
BUNDLES := $(MODELS:%=build/%/bundle.json)
# Small models run fastest on one thread a process; real ones choose for themselves.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all lint format parity quality distill docs performance clean help
# The models whose times are in docs/performance.md, with random weights.
TIMED    := build/var-d16 build/llamagen-l
BENCH    := $(BIN)/ddexport bench $(TIMED) --update docs/performance.md

help:
	@echo "make demo      set up, export the embedded models, draw digits in one step, prove them equal to PyTorch"
	@echo "make test      set up and run the tests"
	@echo "make test-all  the slow ones too: training, every opset, real sizes (an hour, 20 GiB)"
	@echo "make lint      ruff, mypy, import contracts"
	@echo "make format    apply ruff's formatting and fixes"
	@echo "make parity    hold the embedded models' bundles against PyTorch"
	@echo "make quality   the same for the quality of their images, 2,000 in one and in two steps"
	@echo "make distill   train the embedded models again, from the digits to the student (over an hour)"
	@echo "make docs      make the pictures of docs/ again"
	@echo "make performance   time var-d16 and llamagen-l, and renew docs/performance.md (an hour, 20 GiB, an idle machine)"

demo: $(VENV)/.export $(BUNDLES)
	for model in $(MODELS); do \
	    $(BIN)/ddexport sample build/$$model --steps 1 -n 8 -o build/$$model-one-step.png && \
	    $(BIN)/ddexport sample build/$$model --steps 2 -n 8 -o build/$$model-two-steps.png && \
	    $(BIN)/ddexport validate parity build/$$model || exit; \
	done
	@echo
	@echo "Look at build/digits-*-one-step.png: each digit drawn in one step, by a student of VAR and by one of LlamaGen."
	@echo "The same noise in two steps: build/digits-*-two-steps.png"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu" $(ARGS)

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu" $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

parity: $(VENV)/.export $(BUNDLES)
	for model in $(MODELS); do $(BIN)/python -m validate parity build/$$model --images 100 || exit; done

quality: $(VENV)/.export $(BUNDLES)
	for model in $(MODELS); do \
	    $(BIN)/python -m validate fid build/$$model --images 2000 --batch 200 --threads 2 || exit; \
	done

distill: $(VENV)/.dev
	for model in $(MODELS); do \
	    $(BIN)/ddexport distill $$model --install && $(BIN)/python -m validate quality $$model || exit; \
	done

docs: $(VENV)/.dev $(BUNDLES)
	$(BIN)/ddexport sample build/digits-var --steps 1 -n 16 -o docs/images/digits-one-step.png
	for model in $(MODELS); do \
	    $(BIN)/python -m validate quality $$model --grid docs/images/$$model-grid.png || exit; \
	done

performance: $(VENV)/.dev $(TIMED:%=%/bundle.json)
	env -u OMP_NUM_THREADS $(BENCH) --block cpu --plot docs/images/performance.png --steps 1,2 --against published \
	    --backend onnxruntime,openvino,torch,torch-compile,published --duration 10
	env -u OMP_NUM_THREADS $(BENCH) --block teacher --backend torch --precision fp32 --steps 1,2,teacher \
	    --against torch --against-steps teacher --warmup 0 --duration 1
	env -u OMP_NUM_THREADS $(BIN)/ddexport bench build/var-d16 --update docs/performance.md --block throughput \
	    --backend openvino --precision int8 --batch 4 --mode latency,throughput --threads 1,2 --duration 1

$(TIMED:%=%/bundle.json): build/%/bundle.json: $(VENV)/.export
	env -u OMP_NUM_THREADS $(BIN)/ddexport onnx --model $* --random-weights 0 --teacher random --precision fp32,int8 -o build/$*

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(BUNDLES): build/%/bundle.json: $(VENV)/.export $(wildcard recipes/digits-* recipes/weights/digits-*)
	$(BIN)/ddexport onnx --model $* -o build/$* --force

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.export: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[export,validate]"
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.export
