# Needs Python 3.11 or newer and make; everything else is installed into .venv.
# Works from any folder: make -C /path/to/telltale quickstart

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN := runs/quickstart
# Test files that run at once; each starts processes of its own.
TEST_WORKERS ?= 2
# Of make gpu-check and multigpu-check: the parts that run (all), the results' name, and CIFAKE's shards where there are any.
PARTS ?=
NAME ?= here
CIFAKE ?= $(wildcard data/cifake)
# Of make multigpu-check: how many GPUs (all of the machine).
GPUS ?=
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

.DELETE_ON_ERROR:
.PHONY: help venv quickstart test test-slow test-long gpu-check multigpu-check lint docs clean

help:
	@echo "make quickstart  install, draw a small data set, shard it, train, evaluate (results in $(RUN)/)"
	@echo "make test        install and run the tests (under 15 minutes on two cores)"
	@echo "make test-slow   run the longer tests, which CI runs too (under half an hour)"
	@echo "make test-long   run further variants of the longer tests, as is done weekly (half an hour)"
	@echo "make gpu-check   on a GPU machine: tests/gpu and every figure of the goals, under 10 minutes, into"
	@echo "                 docs/benchmarks/gpu-NAME.json; NAME=h100, PARTS=step,tars for some, CIFAKE=folder of shards"
	@echo "make multigpu-check  on a machine of 2 to 8 GPUs: NCCL, DDP, graphs, scaling, launchers, resume, under 10 minutes, into"
	@echo "                 docs/benchmarks/multigpu-NAME.json; NAME=h100x8, GPUS=4 for fewer, PARTS=nccl,scaling for some"
	@echo "make lint        ruff, mypy and the import contract"
	@echo "make docs        build the documentation site into site/; warnings are errors"
	@echo "make venv        install only, into $(VENV)/"
	@echo "make clean       remove caches; $(VENV)/, data/ and runs/ stay"
	@echo "PYTHON=python3.12 make ... chooses the interpreter (Python 3.11 or newer)"

venv: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "error: $(PYTHON) not found: install Python 3.11 or newer, or name one with PYTHON=/path/to/python3 make ..." >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is $$("$(PYTHON)" --version 2>&1), telltale needs Python 3.11 or newer: name one with PYTHON=python3.12 make ..." >&2; exit 2; }
	@# A working environment is kept; a moved or incomplete one is made again.
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[test,dev,docs]"
	@touch $@

# One process for each GPU, else 2; at most one for each micro-batch of a step.
quickstart: $(STAMP)
	@processes=$$($(BIN)/python -c 'import torch, yaml; t = yaml.safe_load(open("configs/quickstart.yaml"))["train"]; print(min(t["global_batch"] // t["micro_batch"], torch.cuda.device_count() or 2))'); \
	echo "training with $$processes processes"; \
	$(BIN)/python -m torch.distributed.run --nproc-per-node=$$processes launch/train.py --config configs/quickstart.yaml
	@$(BIN)/python launch/evaluate.py --checkpoint $(RUN)/best.pt --data data/quickstart --split test --output $(RUN)/evaluation

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not long" -n $(TEST_WORKERS) --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not long" -n $(TEST_WORKERS) --dist loadfile

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long -n $(TEST_WORKERS) --dist loadfile

gpu-check: $(STAMP)
	$(BIN)/python launch/benchmark.py gpu-check --device cuda --parts "$(PARTS)" --cifake "$(CIFAKE)" --output docs/benchmarks/gpu-$(NAME).json

multigpu-check: $(STAMP)
	$(BIN)/python launch/benchmark.py multigpu-check --device cuda --gpus "$(or $(GPUS),0)" --parts "$(PARTS)" --output docs/benchmarks/multigpu-$(NAME).json

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
