# `make demo` and `make test` need Python 3.10 to 3.13, git and make; everything else is installed into .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The embedded models, one of each family.
MODELS  := digits-var digits-llamagen
BUNDLES := $(MODELS:%=build/%/bundle.json)
# The same in every precision: what tests, parity and image quality are held against.
PRECISE := $(MODELS:%=build/precisions/%/bundle.json)
# OpenVINO computes bf16 only where the CPU does; elsewhere every rounding of a bf16 engine is emulated.
BF16    := $(if $(shell grep -Ewm1 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null),openvino,onnxruntime)
ENGINES := fp32:onnxruntime fp16:onnxruntime bf16:$(BF16) int8:onnxruntime int8:openvino
# Small models run fastest on one thread a process; real ones choose for themselves.
export OMP_NUM_THREADS ?= 1

.PHONY: demo bundles test test-all mutants lint format parity quality distill docs performance clean help
# The models whose times are in docs/results.md, with random weights.
TIMED    := build/var-d16 build/llamagen-l
BENCH    := $(BIN)/ddexport bench $(TIMED)

help:
	@echo "make demo      set up, export the embedded models, draw digits in one step, prove them equal to PyTorch"
	@echo "make test      set up and run the tests"
	@echo "make test-all  the slow ones too: training, every opset, real sizes (an hour, 20 GiB)"
	@echo "make mutants   mutation testing of the sampler, the noise and the teacher's draws (half an hour)"
	@echo "make lint      ruff, mypy, import contracts"
	@echo "make format    apply ruff's formatting and fixes"
	@echo "make bundles   export the embedded models in every precision, for the tests and for parity"
	@echo "make parity    hold the embedded models' bundles against PyTorch, in every precision"
	@echo "make quality   the same for the quality of the images of digits-var, 2,000 in one and in two steps"
	@echo "make distill   train the embedded models again, from the digits to the student (over an hour)"
	@echo "make docs      make the pictures of docs/ again"
	@echo "make performance   time var-d16 and llamagen-l (an hour, 20 GiB, an idle machine)"

demo: $(VENV)/.export $(BUNDLES)
	for model in $(MODELS); do \
	    $(BIN)/ddexport sample build/$$model --steps 1 -n 8 -o build/$$model-one-step.png && \
	    $(BIN)/ddexport sample build/$$model --steps 2 -n 8 -o build/$$model-two-steps.png && \
	    $(BIN)/ddexport validate parity build/$$model || exit; \
	done
	@echo
	@echo "Look at build/digits-*-one-step.png: each digit drawn in one step, by a student of VAR and by one of LlamaGen."
	@echo "The same noise in two steps: build/digits-*-two-steps.png"

bundles: $(PRECISE)

test: $(VENV)/.dev $(PRECISE)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu" $(ARGS)

test-all: $(VENV)/.dev $(PRECISE)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu" $(ARGS)

mutants: $(VENV)/.dev
	rm -rf mutants
	$(BIN)/mutmut run --max-children 2
	$(BIN)/mutmut results

# Neither mypy nor import-linter follows __path__: they get a tree of links in which everything lies under one name.
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lint && mkdir -p build/lint/ddexport
	ln -s $(CURDIR)/ddexport/* $(CURDIR)/runtime $(CURDIR)/validate $(CURDIR)/recipes build/lint/ddexport
	cd build/lint && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml
	cd build/lint && $(abspath $(BIN))/lint-imports --config $(CURDIR)/pyproject.toml

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Two at once; what a command printed is shown where it fails, else its last line.
parity: $(VENV)/.dev $(PRECISE)
	for model in $(MODELS); do for engine in $(ENGINES); do echo $$model $$engine; done; done | xargs -P 2 -L 1 sh -c \
	    'out=$$($(BIN)/python -m validate parity build/precisions/$$0 --precision $${1%:*} --backend $${1#*:} 2>&1) \
	    && echo "$$0 $$1: $$(echo "$$out" | grep "^parity")" || { echo "$$0 $$1"; echo "$$out"; exit 1; }'
	for model in $(MODELS); do $(BIN)/ddexport doctor build/precisions/$$model --check || exit; done

quality: $(VENV)/.dev $(PRECISE)
	for precision in fp32 fp16 int8; do echo $$precision; done | xargs -P 2 -L 1 $(BIN)/python -m validate fid \
	    build/precisions/digits-var --images 2000 --batch 200 --threads 1 --backend onnxruntime --precision

distill: $(VENV)/.dev
	for model in $(MODELS); do \
	    $(BIN)/ddexport distill $$model --install && $(BIN)/ddexport validate distilled $$model || exit; \
	done

docs: $(VENV)/.dev $(BUNDLES)
	$(BIN)/ddexport sample build/digits-var --steps 1 -n 16 -o docs/images/digits-one-step.png
	for model in $(MODELS); do \
	    $(BIN)/ddexport validate distilled $$model --samples 500 --seeds 0 --draws 2000 \
	        --grid docs/images/$$model-grid.png --plot docs/images/$$model-quality.png || exit; \
	done

performance: $(VENV)/.dev $(TIMED:%=%/bundle.json)
	env -u OMP_NUM_THREADS $(BENCH) --plot docs/images/performance.png --steps 1,2 --against naive \
	    --backend onnxruntime,openvino,torch-eager,torch-compile,naive --duration 10
	env -u OMP_NUM_THREADS $(BENCH) --backend torch-eager --precision fp32 --steps 1,2,teacher \
	    --against torch-eager --against-steps teacher --warmup 0 --duration 1

$(TIMED:%=%/bundle.json): build/%/bundle.json: $(VENV)/.export
	env -u OMP_NUM_THREADS $(BIN)/ddexport onnx --model $* --random-weights 0 --teacher random --precision fp32,int8 -o build/$*

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis mutants

$(BUNDLES): build/%/bundle.json: runtime/bundle.py $(VENV)/.export $(wildcard recipes/digits-* recipes/weights/digits-*)
	$(BIN)/ddexport onnx --model $* -o build/$* --force

# runtime/bundle.py has the schema: bundles of an older one are made again.
# The tools are there first, but a later install of them is no reason to export again.
$(PRECISE): build/precisions/%/bundle.json: runtime/bundle.py $(wildcard recipes/digits-* recipes/weights/digits-*) | $(VENV)/.dev
	$(BIN)/ddexport onnx --model $* -o build/precisions/$* --precision fp32,fp16,bf16,int8 --force

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.export: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[cpu,export,validate]"
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.export
