# The first suitable interpreter is taken; PYTHON=/path/to/python chooses another.
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.10; do \
	"$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null && echo "$$python" && break; done)
# Installed first where there is no NVIDIA driver; the CPU build wins where pip can see one.
TORCH ?= torch==2.13.0
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: help setup demo test test-gpu bench-gpu fuzz check compile compile-old clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## make .venv with everything needed (does nothing the second time)

$(STAMP): pyproject.toml setup.py $(wildcard csrc/*)
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10, 3.11 or 3.12 was found; install one, or name it with PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	@command -v nvidia-smi >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

# The demo runs two processes: with fewer than two GPUs both use the CPU.
demo: setup ## run the whole path on the built-in bilingual world
	@test "$$(nvidia-smi -L 2>/dev/null | wc -l)" -ge 2 || export MEGATRON_CPT_DEVICE=cpu; $(BIN)/megatron-cpt run quickstart

test: setup ## run all tests, in a process for each core and one more, four at most
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# On a machine with a GPU the kernels need what its own Python has, and no setup.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
needs = @"$(GPU_PYTHON)" -c 'import importlib.util as u, sys; m = [n for n in sys.argv[1:] if u.find_spec(n) is None]; \
	sys.exit("error: $@ needs " + ", ".join(m) + "; install it, or name another Python with GPU_PYTHON=/path/to/python" if m else 0)'

test-gpu: ## test the kernels on an NVIDIA GPU; needs torch, Triton, NumPy and pytest alone
	$(needs) torch triton numpy pytest
	"$(GPU_PYTHON)" -m pytest tests/gpu --confcutdir tests/gpu -p no:cacheprovider $(ARGS)

bench-gpu: ## measure the kernels on an NVIDIA GPU beside what is installed; ARGS="--help" lists options
	$(needs) torch triton
	@"$(GPU_PYTHON)" benchmarks/bench_kernels.py $(ARGS)

fuzz: setup ## look longer for texts on which the readers and the encoder are wrong
	FUZZ=100 $(BIN)/python -m pytest tests/data/test_records.py tests/data/test_encoder_models.py

check: setup ## lint, format, types, floors and walls
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/architecture

COMPILE := benchmarks/compile_kernels.py --arch 80 90 100 --processes 2

compile: setup ## compile every kernel for three generations of GPUs and compare with the committed tables
	$(BIN)/python $(COMPILE)

compile-old: setup build/triton36 ## the same with the oldest supported Triton
	PYTHONPATH=build/triton36 $(BIN)/python $(COMPILE)

build/triton36:
	$(BIN)/python -m pip install --quiet --no-deps --target $@.part triton==3.6.0
	mv $@.part $@

clean: ## remove everything that the targets above made, except runs/
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis megatron_cpt/data/_native*.so
