# `make help` lists what there is. Every target makes the environment it needs, .venv, first.

PYTHON ?= python3
TESTS ?= tests
BIN := .venv/bin
ENVIRONMENT := .venv/.complete

comma := ,
DATASET ?=
OUT ?= shards/$(subst $(comma),+,$(subst %,-,$(DATASET)))

# demo, demo%50, demo_heldout, demo,mp_doc: the demo data and the tiny checkpoint are made first.
IS_DEMO := $(filter demo demo\%% demo_heldout demo_heldout\%%,$(subst $(comma), ,$(DATASET)))
DEMO_DATA := data/demo/annotations.jsonl
# The file that each of the two writes last: if it exists, the folder is complete.
TINY_MODEL := checkpoints/tiny/preprocessor_config.json
MODEL ?= $(if $(IS_DEMO),checkpoints/tiny)

BUILD_FLAGS = $(if $(MODEL),--model "$(MODEL)") $(if $(MAX_LENGTH),--max-length $(MAX_LENGTH)) \
	$(if $(WORKERS),--workers $(WORKERS)) $(if $(SEED),--seed $(SEED)) $(ARGS)

DEMO_TRAINING := train/main.py --shards shards/demo --model_name_or_path checkpoints/tiny --output_dir runs/demo \
	--tune_mm_vision True --max_steps 60 --learning_rate 5e-3 --mm_projector_lr 5e-3 --vision_tower_lr 5e-3 \
	--gradient_accumulation_steps 1 --gradient_checkpointing False --logging_steps 5 --save_steps 0

.PHONY: help check test quick bench shards demo report docs clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z.]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo
	@echo "make shards DATASET=mp_doc%50 [OUT=DIR] [MODEL=PATH_OR_ID] [MAX_LENGTH=N] [WORKERS=N] [SEED=N] [ARGS='...']"
	@echo "make test TESTS=tests/prep    PYTHON=python3.12 chooses the interpreter that .venv is made with"

.venv: $(ENVIRONMENT) ## the environment, with the versions of constraints.txt

$(ENVIRONMENT): setup.cfg setup.py pyproject.toml constraints.txt prep/media/_bicubic.c
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
		{ echo "vlprep needs Python 3.10 to 3.13: make .venv PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[train,lora,ray,dev]'
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt --no-deps dashscope
	@touch $@

check: $(ENVIRONMENT) ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A worker runs all tests of a file, so that those which share a run do not wait for one another.
PYTEST := $(BIN)/pytest -q -n 3 --dist loadfile --no-loadscope-reorder

test: $(ENVIRONMENT) ## all tests (TESTS=tests/prep: some)
	$(PYTEST) $(TESTS)

quick: $(ENVIRONMENT) ## unit tests alone: no training, no launches
	$(PYTEST) -m "not slow" $(TESTS)

shards: $(ENVIRONMENT) $(if $(IS_DEMO),$(DEMO_DATA) $(TINY_MODEL)) ## build shards (DATASET=name, name%50, a,b%20)
	@test -n "$(DATASET)" || { echo "make shards needs a dataset: make shards DATASET=demo" >&2; exit 2; }
	$(BIN)/vlprep build "$(DATASET)" --out "$(OUT)" $(BUILD_FLAGS)

demo: $(ENVIRONMENT) ## the complete pipeline: demo data, shards, training, summary
	$(MAKE) shards DATASET=demo OUT=shards/demo
	@if [ "$$($(BIN)/python -c 'import torch; print(torch.cuda.device_count())')" -gt 0 ]; then \
		set -x; $(BIN)/deepspeed $(DEMO_TRAINING); \
	else \
		set -x; DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/deepspeed --num_accelerators 2 $(DEMO_TRAINING); \
	fi
	@$(BIN)/python -m train.tools.summary shards/demo runs/demo

report: shards/demo/manifest.json ## one page about the demo's shards
	$(BIN)/vlprep report shards/demo --out runs/demo/report.html --model checkpoints/tiny

shards/demo/manifest.json:
	$(MAKE) demo

docs: $(ENVIRONMENT) ## the documentation as a site in site/, with its links checked
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(DEMO_DATA): | $(ENVIRONMENT)
	$(BIN)/vlprep demo $(dir $@)

$(TINY_MODEL): | $(ENVIRONMENT)
	$(BIN)/python -m train.tiny_model $(dir $@)

bench: $(ENVIRONMENT) ## benchmarks: ratios side by side in one run, with machine and versions
	$(BIN)/python -m tests.benchmarks.startup
	$(BIN)/python -m tests.benchmarks.validation
	$(BIN)/python -m tests.benchmarks.packing
	$(BIN)/python -m tests.benchmarks.resize
	$(BIN)/python -m tests.benchmarks.build
	$(BIN)/python -m tests.benchmarks.memory --annotations 100000
	$(BIN)/python -m tests.benchmarks.stream
	$(BIN)/python -m tests.benchmarks.storage
	$(BIN)/python -m tests.benchmarks.balance
	$(BIN)/python -m tests.benchmarks.learning
	$(BIN)/python -m tests.benchmarks.pointing
	$(BIN)/python -m tests.benchmarks.recipes

clean: ## remove the environment and caches; data, shards, checkpoints and runs stay
	rm -rf .venv site build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
