# Two commands matter: `make demo` and `make test`. Each sets everything up by itself when needed.
# `make help` lists all of them.
VENV ?= .venv
# The first of these that runs and is recent enough; override with PYTHON=...
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1 \
	&& { echo $$p; break; }; done)
BIN := $(VENV)/bin
# The CUDA kernels take minutes to compile; `make install FORCE_CUDA=1` builds them.
FORCE_CUDA ?= 0
export FORCE_CUDA
# Test processes and further pytest arguments, e.g. `make test JOBS=1 ARGS="tests/config -k twins"`.
JOBS ?= 2
ARGS ?=

.PHONY: help install demo test lint docs coverage sanitize emulate soak clean

help:  ## this text
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo
	@echo "VENV=$(VENV)  PYTHON=$(PYTHON)   (both can be set on the command line)"

install:  ## virtual environment with pinned torch, detectron2 v0.6 and this repository
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 to 3.12 found; name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) tools/setup_environment.py --venv $(VENV)

demo: install  ## train, evaluate and use tiny networks; pictures in output/demo/report.html
	@$(BIN)/python demo/run_demo.py --output output/demo $(ARGS)

test: install  ## all tests, on the CPU
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --max-worker-restart 0 $(ARGS)

lint: install  ## style and types (fix style with: .venv/bin/ruff check --fix . && .venv/bin/ruff format .)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: install  ## the site in output/site, with warnings as errors and every link followed
	@$(BIN)/python dev/build_site.py output/site

coverage: install  ## lines and branches that the tests reach, by package (half an hour)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --max-worker-restart 0 --cov --cov-report= $(ARGS)
	@$(BIN)/python dev/write_coverage.py

sanitize: install  ## C++ operators under AddressSanitizer and UBSan (some ten minutes)
	@dev/sanitize.sh $(abspath $(BIN)/python)

emulate: install  ## operator tests on the CUDA kernels, emulated on the CPU (ten minutes)
	@$(BIN)/python -m tests.ops.emulation.run

# Processes are killed at random moments, so nothing else should run on the machine.
soak: install  ## faults by the hundred: kills, damage, hostile files; writes docs/reliability.md (hours)
	@rm -rf output/soak
	@SOAK=full SOAK_OUTPUT=$(abspath output/soak) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/soak tests/engine/test_onnx_predictor.py $(ARGS)
	@$(BIN)/python dev/write_reliability.py output/soak

clean:  ## remove build products and outputs; keeps the environment and the data sets
	rm -rf build dist output *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage
	rm -rf examples/*/build examples/*/*.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f d2ext/*.so
