# `make demo` and `make test` need Python 3.10 to 3.14, git and make; everything else is installed into .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Nothing is compiled ahead: Python compiles what is imported, a tenth of what is installed, and a minute sooner.
INSTALL := $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt
# The embedded models: one of each family, and one that draws from sentences.
CLASSES := digits-var digits-llamagen
MODELS  := $(CLASSES) digits-t2i
BUNDLES := $(MODELS:%=build/%/bundle.json)
# The same in every precision: what tests, parity and image quality are held against.
PRECISE := $(MODELS:%=build/precisions/%/bundle.json)
# OpenVINO computes bf16 only where the CPU does; elsewhere every rounding of a bf16 engine is emulated.
BF16    := $(if $(shell grep -Ewm1 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null),openvino,onnxruntime)
# Every model in float32 and int8, every precision and engine; `make test-all` has the pairs that are left out.
PARITY  := digits-var:fp32:onnxruntime digits-var:fp16:onnxruntime digits-var:int8:openvino digits-var:fp32:browser \
           digits-llamagen:fp32:onnxruntime digits-llamagen:bf16:$(BF16) digits-llamagen:int8:onnxruntime \
           digits-llamagen:int8:openvino digits-t2i:fp32:onnxruntime digits-t2i:fp16:onnxruntime digits-t2i:int8:onnxruntime
# Runs a command and prints its last line, or all that it printed if it fails.
LAST    := sh -c 'out=$$("$$@" 2>&1) && echo "$$out" | tail -n 1 || { echo "$$out" >&2; exit 1; }' run
# Small models run fastest on one thread per process; real ones choose for themselves.
export OMP_NUM_THREADS ?= 1

.PHONY: demo bundles test test-all mutants lint format parity quality decoders serving distill docs performance clean help
# Pages with generated help texts and tables.
PAGES    := README.md $(wildcard docs/*.md)
COG      := $(BIN)/cog -I docs
# The models whose times are in docs/results.md, with random weights.
TIMED    := build/var-d16 build/llamagen-l
RECORD   := $(BIN)/python docs/generate.py

help:
	@echo "make demo      set up, export the embedded models, draw digits in one step, compare them with PyTorch"
	@echo "make test      set up and run the tests"
	@echo "make test-all  the slow ones too: training, every opset, real sizes (an hour, 20 GiB)"
	@echo "make mutants   mutation testing of the sampler, the noise and the teacher's draws (six minutes)"
	@echo "make lint      ruff, mypy, import contracts"
	@echo "make format    apply ruff's formatting and fixes"
	@echo "make bundles   export the embedded models in every precision, for the tests and for parity"
	@echo "make parity    compare the embedded models' bundles with PyTorch, every precision and engine once"
	@echo "make quality   compare the FID of an int8 bundle and of a small decoder with PyTorch's, 2,000 images in one and in two steps"
	@echo "make serving   load a server of digits-var, and draw 100,000 images with it (a quarter of an hour)"
	@echo "make distill   train the embedded models again, from the digits to the student (over an hour)"
	@echo "make docs      make the pictures, measured tables and help texts of docs/ again (ten minutes)"
	@echo "make performance MACHINE=NAME   a line of docs/results.md: var-d16 and llamagen-l (an hour, 20 GiB, an idle machine)"

demo: $(VENV)/.export $(BUNDLES)
	@for model in $(MODELS); do \
	    what= && if [ $$model = digits-t2i ]; then what="--prompts docs/prompts.txt"; fi && \
	    echo && echo "== $$model" && \
	    $(LAST) $(BIN)/ddexport sample build/$$model --steps 1 -n 8 $$what -o build/$$model-one-step.png && \
	    $(LAST) $(BIN)/ddexport sample build/$$model --steps 2 -n 8 $$what -o build/$$model-two-steps.png && \
	    $(LAST) $(BIN)/ddexport validate parity build/$$model || exit; \
	done
	@echo
	@echo "Look at build/digits-*-one-step.png: each digit was drawn in one network step, by a VAR and by a LlamaGen student;"
	@echo "those of digits-t2i from the sentences of docs/prompts.txt."
	@echo "build/digits-*-two-steps.png: the same noise in two steps. build/digits-*/parity/index.html: the comparison."

bundles: $(PRECISE)

test: $(VENV)/.dev $(PRECISE)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu" $(ARGS)

test-all: $(VENV)/.dev $(PRECISE)
	$(INSTALL) -e ".[dev,notebook,ray]"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu" $(ARGS)

# mutmut names modules by their paths: it gets a copy in which everything lies under one name.
mutants: $(VENV)/.dev
	rm -rf build/mutants && mkdir -p build/mutants
	cp -r ddexport tests docs pyproject.toml build/mutants
	cp -r runtime validate recipes build/mutants/ddexport
	cd build/mutants && $(abspath $(BIN))/mutmut run --max-children 2 && $(abspath $(BIN))/mutmut results

# Neither mypy nor import-linter follows __path__: they get a tree of links in which everything lies under one name.
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(COG) --check $(PAGES)
	rm -rf build/lint && mkdir -p build/lint/ddexport
	ln -s $(CURDIR)/ddexport/* $(CURDIR)/runtime $(CURDIR)/validate $(CURDIR)/recipes build/lint/ddexport
	cd build/lint && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml
	cd build/lint && $(abspath $(BIN))/lint-imports --config $(CURDIR)/pyproject.toml

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Two at once.
parity: $(VENV)/.dev $(PRECISE)
	printf '%s\n' $(subst :, ,$(PARITY)) | xargs -P 2 -n 3 sh -c \
	    'out=$$($(BIN)/python -m validate parity build/precisions/$$0 --precision $$1 --backend $$2 2>&1) \
	    && echo "$$0 $$1 $$2: $$(echo "$$out" | tail -n 1)" || { echo "$$0 $$1 $$2"; echo "$$out"; exit 1; }'

# The precision that loses most, and a decoder that is distilled.
quality: $(VENV)/.dev $(PRECISE)
	for run in "digits-var --precision int8" "digits-llamagen --precision fp32 --decoder small"; do echo $$run; done | \
	    xargs -P 2 -L 1 sh -c '$(BIN)/python -m validate fid build/precisions/$$0 "$$@" --images 2000 --batch 200 --threads 1 \
	    --backend onnxruntime'

# What the small decoders cost (docs/small-decoders.md): ten minutes.
decoders: $(VENV)/.dev $(PRECISE)
	for model in $(CLASSES); do for seed in 0 1 2; do echo $$model $$seed; done; done | xargs -P 2 -L 1 sh -c \
	    '$(RECORD) decoder-$$0-$$1 $(BIN)/ddexport validate fid build/precisions/$$0 --decoder small --steps 1,2 --seed $$1 \
	    --precision fp32 --batch 200 --threads 1 --backend onnxruntime --report build/decoders/$$0-$$1 --json'
	for model in $(CLASSES); do \
	    $(BIN)/python docs/decoder_grid.py build/precisions/$$model docs/images/decoder-$$model.png || exit; \
	done
	$(COG) -r $(PAGES)

# What a server answers and needs (docs/results.md): a quarter of an hour.
serving: $(VENV)/.dev build/digits-var/bundle.json
	$(RECORD) serve $(BIN)/python docs/serve_load.py build/digits-var load leaving full
	$(RECORD) serve-memory $(BIN)/python docs/serve_load.py build/digits-var memory
	$(COG) -r $(PAGES)

distill: $(VENV)/.dev
	for model in $(MODELS); do \
	    $(BIN)/ddexport distill $$model --install && $(BIN)/ddexport validate distilled $$model || exit; \
	done

# The tables of docs/results.md are made from the JSON files that these runs write.
docs: $(VENV)/.dev $(PRECISE)
	$(BIN)/ddexport sample build/precisions/digits-var --steps 1 -n 16 -o docs/images/digits-one-step.png
	$(RECORD) bench-digits $(BIN)/ddexport bench $(CLASSES:%=build/precisions/%) --precision fp32,fp16,int8 --steps 1,2,teacher \
	    --backend onnxruntime,openvino,torch-eager,naive --against naive --duration 1 --plot docs/images/bench.png --json
	$(RECORD) distilled-digits-t2i $(BIN)/ddexport validate distilled digits-t2i --samples 4000 --seeds 0,1,2 --draws 2000 \
	    --grid docs/images/digits-t2i-grid.png --json
	for model in $(CLASSES); do \
	    $(RECORD) distilled-$$model $(BIN)/ddexport validate distilled $$model --samples 1000 --seeds 0 --draws 2000 \
	        --grid docs/images/$$model-grid.png --plot docs/images/$$model-quality.png --json || exit; \
	done
	for run in digits-var:fp32 digits-var:fp16 digits-var:int8 digits-llamagen:fp32; do echo $$run; done | xargs -P 2 -L 1 sh -c \
	    '$(RECORD) fid-$${0%:*}-$${0#*:} $(BIN)/ddexport validate fid build/precisions/$${0%:*} --precision $${0#*:} \
	    --images 2000 --batch 200 --threads 1 --backend onnxruntime --json'
	$(RECORD) capacity $(BIN)/python docs/capacity.py $(CLASSES:%=build/precisions/%)
	$(BIN)/ddexport web $(CLASSES:%=build/precisions/%) -o build/site --force
	$(BIN)/python docs/browser_picture.py build/site docs/images/browser.png
	$(COG) -r $(PAGES)

# MACHINE names the file and the line; what was measured already is not measured again.
MACHINE ?= this-machine
performance: $(VENV)/.dev $(TIMED:%=%/bundle.json) $(PRECISE)
	env -u OMP_NUM_THREADS $(BIN)/python docs/performance.py $(MACHINE)
	$(COG) -r $(PAGES)

$(TIMED:%=%/bundle.json): build/%/bundle.json: $(VENV)/.export
	env -u OMP_NUM_THREADS $(BIN)/ddexport onnx --model $* --random-weights 0 --teacher random --precision fp32,int8 -o build/$*

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(BUNDLES): build/%/bundle.json: runtime/bundle.py $(VENV)/.export $(wildcard recipes/digits-* recipes/weights/digits-*)
	@echo "exporting $*, a minute or two ..."
	@$(LAST) $(BIN)/ddexport onnx --model $* -o build/$* --force >/dev/null

# runtime/bundle.py has the schema: bundles of an older one are made again.
# The tools are there first, but a later install of them is no reason to export again.
$(PRECISE): build/precisions/%/bundle.json: runtime/bundle.py $(wildcard recipes/digits-* recipes/weights/digits-*) | $(VENV)/.dev
	$(BIN)/ddexport onnx --model $* -o build/precisions/$* --precision fp32,fp16,bf16,int8 --force

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.export: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e ".[cpu,export,text-encoder,validate]"
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.export
