# A thin door: every target is one command or so, and each of them can be typed by hand.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# cpu or gpu, one environment holds one of them: the twins of FAISS and of ONNX Runtime overwrite each other.
DEVICE ?= $(firstword $(INSTALLED:.venv/.installed-%=%) cpu)
INSTALLED := $(wildcard .venv/.installed-*)
STAMP := .venv/.installed-$(DEVICE)
LOCK := requirements/$(DEVICE).txt
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo $$python && break; done)
PIP := .venv/bin/python -u -m pip
# pip says five lines about a package, or nothing at all for minutes: keep one for each file of a megabyte or more.
BRIEFLY := sed -unE 's/^ *((Downloading|Using cached) .* \([0-9.]+ [MG]B\))$$/  \1/p; s/^(Installing) .*/\1 (a minute or two)/p'
export PIP_DISABLE_PIP_VERSION_CHECK := 1
UV := .venv/bin/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --fork-strategy fewest \
	--no-config --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

system:  ## as root: what Debian or Ubuntu may lack for `make env`
	apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv

env: $(STAMP)  ## .venv with all that the lock names (DEVICE=gpu: the other lock)

.venv/bin/pip:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.14 found: apt-get install python3 python3-venv, or say make PYTHON=/path/to/one"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make environments: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv

$(STAMP): $(LOCK) pyproject.toml | .venv/bin/pip
	@test -z "$(filter-out $@,$(INSTALLED))" || { echo ".venv is for $(INSTALLED:.venv/.installed-%=%), not for $(DEVICE): rm -rf .venv first"; exit 1; }
	$(PIP) install --requirement $(LOCK) | $(BRIEFLY)
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: env  ## serve the demo cascade, send it real images, show the answers, stop
	.venv/bin/python -m handlers.demo

serve: env  ## serve model_store/ until Ctrl-C
	.venv/bin/cascade serve

# Big buffers stay with the process and do not go back to the kernel after every layer: 1.6 times as fast.
KEEP_MEMORY := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 \
	MALLOC_TOP_PAD_=268435456

train-demo: env  ## train the demo cascade anew (goes on where it was stopped)
	$(KEEP_MEMORY) .venv/bin/python -m training.demo

test: lint  ## lint, then every test: servers last and one after the other, for they need the machine to themselves
	.venv/bin/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --ignore tests/e2e
	.venv/bin/python -m pytest tests/e2e

soak: env  ## the whole form of what `make test` runs in short: half an hour or so
	.venv/bin/python -m pytest -m soak

lint: env  ## ruff and mypy
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

lock: env  ## write requirements/*.txt anew (UPGRADE=--upgrade for newer versions)
	$(PIP) install --quiet uv
	$(UV) $(UPGRADE) --extra cpu --extra demo --extra ray --extra paper --extra dev --output-file requirements/cpu.txt
	$(UV) $(UPGRADE) --extra gpu --extra demo --extra ray --extra paper --constraint requirements/cpu.txt --output-file requirements/gpu.txt

clean:  ## remove caches and built files; the environment and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -r {} +

.PHONY: help system env demo serve train-demo test soak lint lock clean
