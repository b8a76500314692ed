# Every target sets up what it needs, so that each of them works in a fresh clone. Variables worth knowing:
#   OFFLINE=1   fetch nothing; use python3 and what it has (also chosen when python3 already has a CUDA torch)
#   MAX_JOBS=n  compiler processes      ARGS=...  passed on by demo, bench, aot and gpu
#   STAGES=...  a part of `make gpu`: build,test,sanitize,calibrate,bench
VENV ?= .venv
PYTHON := $(shell OFFLINE=$(OFFLINE) .ci/python $(VENV))
IN_VENV := $(filter $(VENV)/%,$(PYTHON))
PYTEST := $(PYTHON) -m pytest -p no:cacheprovider
# Where pytest-xdist is, files of tests run side by side
SIDE_BY_SIDE = $(if $(shell $(PYTHON) -c "import xdist; print(1)" 2>/dev/null),-n $(MAX_JOBS) --dist loadfile)
MAX_JOBS ?= $(shell nproc)
export MAX_JOBS
ifeq ($(IN_VENV),)
export PYTHONPATH := $(CURDIR)
endif
export PATH := $(if $(IN_VENV),$(abspath $(VENV))/bin:)$(PATH)

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SYSTEM := $(if $(IN_VENV),,system)
READY := $(if $(IN_VENV),$(VENV)/.ready)
BUILT := build/.built-$(shell $(PYTHON) -c 'import sys; print(sys.implementation.cache_tag)' 2>/dev/null || echo none)
SANITIZED := build/sanitize
CHECKS := setup lint types unit interpreter sanitize aot-quick wheel-test certificate results-check

.PHONY: help setup system demo certificate test lint types unit interpreter sanitize sanitize-threads aot aot-quick wheel wheel-test bench gpu \
	results results-check format clean
.DELETE_ON_ERROR:

help:
	@echo "setup demo certificate test lint types unit interpreter sanitize sanitize-threads aot aot-quick wheel wheel-test bench gpu results results-check format clean"
	@sed -n '1,/^[A-Z]* ?=/{s/^# //p}' Makefile

setup: $(SYSTEM) $(READY) $(BUILT)

system:
	@.ci/missing $(PYTHON)

$(VENV)/.ready: requirements-dev.txt pyproject.toml .ci/setup
	@.ci/setup $(VENV)
	@touch $@

# In place: an editable install finds it, and so does a plain checkout. Unchanged objects in build/ are kept.
$(BUILT): setup.py $(SOURCES) | $(SYSTEM) $(READY)
	@mkdir -p build
	@$(PYTHON) setup.py -q build_ext --inplace
	@touch build/.built-$$($(PYTHON) -c 'import sys; print(sys.implementation.cache_tag)')

demo: setup
	@$(PYTHON) -m fastvit demo $(ARGS)

# The demo's certificate alone: a trained model finds what random weights do not. Without its weights: left out
certificate: setup
	@$(PYTHON) -m fastvit demo --certificate-only --out build/certificate || { code=$$?; \
	[ $$code -eq 3 ] || exit $$code; echo "certificate: left out, its inputs are not here"; }

test:
	@MAKEFLAGS= .ci/stages $(CHECKS)

lint: $(READY)
	@status=0; \
	if .ci/have $(PYTHON) ruff lint; then $(PYTHON) -m ruff check . || status=1; \
		$(PYTHON) -m ruff format --check . || status=1; fi; \
	if .ci/have $(PYTHON) clang-format lint; then clang-format --dry-run -Werror $(SOURCES) || status=1; fi; \
	exit $$status

format: $(READY)
	@$(PYTHON) -m ruff check --fix . ; $(PYTHON) -m ruff format . && clang-format -i $(SOURCES)

types: $(READY)
	@.ci/have $(PYTHON) mypy types || exit 0; $(PYTHON) -m mypy

unit: setup
	@.ci/have $(PYTHON) pytest unit || exit 0; $(PYTEST) $(SIDE_BY_SIDE) tests

# Triton's interpreter is chosen when a kernel is defined: a process of its own
interpreter: setup
	@.ci/have $(PYTHON) pytest,triton interpreter || exit 0; \
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) $(SIDE_BY_SIDE) --disable-warnings tests/test_*_kernel.py

sanitize: setup
	@.ci/have $(PYTHON) pytest sanitize || exit 0; .ci/sanitize $(PYTHON) $(SANITIZED) address

sanitize-threads: setup
	@.ci/have $(PYTHON) pytest sanitize-threads || exit 0; .ci/sanitize $(PYTHON) $(SANITIZED) thread

aot: setup
	@.ci/have $(PYTHON) triton aot || exit 0; $(PYTHON) benchmarks/aot.py $(ARGS)

# What `make test` has time for
aot-quick: setup
	@.ci/have $(PYTHON) triton aot-quick || exit 0; $(PYTHON) benchmarks/aot.py --quick

wheel: setup
	@rm -rf dist build/lib* build/bdist*
	@$(PYTHON) -m pip wheel -qq --no-build-isolation --no-deps -w dist .
	@ls -l dist

wheel-test: wheel
	@.ci/wheel-test $(PYTHON) dist/*.whl

bench: setup
	@$(PYTHON) -m fastvit bench $(ARGS)

# Nothing to download and at most ten minutes; see benchmarks/gpu.py
gpu: $(READY)
	@$(PYTHON) benchmarks/gpu.py $(if $(STAGES),--stages $(STAGES)) $(ARGS)

# README's tables, from the result files
results: $(READY)
	@$(PYTHON) benchmarks/results.py

results-check: $(READY)
	@$(PYTHON) benchmarks/results_check.py
	@$(PYTHON) benchmarks/results.py --check

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks fastvit/*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
