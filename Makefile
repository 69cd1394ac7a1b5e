# A thin wrapper: each target runs about one command, which can also be typed by hand.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# cpu or gpu, never both in one environment: the two wheels of FAISS, and of ONNX Runtime, overwrite each other's files.
DEVICE ?= $(if $(wildcard .venv/.installed-gpu*),gpu,cpu)
OTHER := $(if $(filter gpu,$(DEVICE)),cpu,gpu)
STAMP := .venv/.installed-$(DEVICE)
SMALL := $(STAMP)-serving
SERVING := $(or $(wildcard $(STAMP)),$(SMALL))
# Constraints, not requirements: with a CPU build of PyTorch from another index no CUDA library is installed.
LOCK := requirements/$(DEVICE).txt
TOOLS-cpu := ,docs,dev
# Triton compiles its launcher at the first launch of a kernel.
COMPILER := $(if $(filter gpu,$(DEVICE)),gcc libc6-dev python3-dev)
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo $$python && break; done)
PIP := .venv/bin/python -u -m pip
# pip is either too verbose or silent for minutes: keep one line for each file of a megabyte or more.
BRIEFLY := sed -unE 's/^ *((Downloading|Using cached) .* \([0-9.]+ [MG]B\))$$/  \1/p; s/^(Installing) .*/\1 (a minute or two)/p'
export PIP_DISABLE_PIP_VERSION_CHECK := 1
UV := .venv/bin/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --fork-strategy fewest \
	--no-config --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

system:  ## as root: install what `make env` needs on Debian or Ubuntu
	apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv $(COMPILER)

env: $(STAMP)  ## .venv with all extras, in the versions of requirements/cpu.txt (DEVICE=gpu: requirements/gpu.txt)

.venv/bin/pip:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.14 found: apt-get install python3 python3-venv, or run make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make environments: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv

$(STAMP): EXTRAS := $(DEVICE),all$(TOOLS-$(DEVICE))
$(SMALL): EXTRAS := $(DEVICE),demo,torchserve
$(STAMP) $(SMALL): $(LOCK) pyproject.toml | .venv/bin/pip
	@test -z "$(wildcard .venv/.installed-$(OTHER)*)" || { echo ".venv is for $(OTHER), not for $(DEVICE): rm -rf .venv first"; exit 1; }
	$(PIP) install --quiet --constraint $(LOCK) setuptools
	$(PIP) install --no-build-isolation --constraint $(LOCK) --editable '.[$(EXTRAS)]' | $(BRIEFLY)
	@touch $@

demo: $(SERVING)  ## serve the demo bundles, send images of all customers, show the answers, and stop
	.venv/bin/python -m handlers.demo

serve: $(SERVING)  ## serve model_store/ until Ctrl-C
	.venv/bin/cascade serve

# Keep big buffers in the process instead of returning them to the kernel after every layer: 1.6 times as fast.
KEEP_MEMORY := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 \
	MALLOC_TOP_PAD_=268435456

train-demo: env  ## train the demo bundles again (resumes where it was stopped)
	$(KEEP_MEMORY) .venv/bin/python -m training.demo

PYTEST := .venv/bin/python -m pytest
PARALLEL := --numprocesses logical --maxprocesses 4 --dist loadfile

check: lint  ## ruff, mypy and the fast tests: run it before every commit (under two minutes)
	$(PYTEST) $(PARALLEL) -m "not slow and not e2e and not soak"

test: lint  ## ruff, mypy and every test; tests that start servers run last, two files at a time (under 15 minutes)
	$(PYTEST) $(PARALLEL) --ignore tests/e2e
	$(PYTEST) --numprocesses 2 --dist loadfile tests/e2e

soak: env  ## the full-length reliability tests (about 30 minutes)
	$(PYTEST) -m soak

lint: env  ## ruff and mypy
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

lock: env  ## write requirements/*.txt again (UPGRADE=--upgrade for newer versions)
	$(PIP) install --quiet uv
	$(UV) $(UPGRADE) --extra cpu --extra all --extra docs --extra dev --output-file requirements/cpu.txt
	$(UV) $(UPGRADE) --extra gpu --extra all --constraint requirements/cpu.txt --output-file requirements/gpu.txt

clean:  ## remove caches and built files; the environment and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -r {} +

.PHONY: help system env demo serve train-demo check test soak lint lock clean
