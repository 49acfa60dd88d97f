# Everything a newcomer needs: `make demo` and `make test` set up their own environment in .venv.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
TORCH := torch==2.13.0+cpu
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
INSTALLED := .venv/.installed
# Strictly typed: everything but the bridges to libraries that have no types.
TYPED := $(filter-out sae_rl/__pycache__ sae_rl/backends sae_rl/workers, $(patsubst %/,%,$(wildcard sae_rl/*/)) $(wildcard sae_rl/*.py))
# What runs on Python 3.10 too. `make check` holds its types to that version.
CORE := sae_rl/types.py sae_rl/knobs.py sae_rl/algo sae_rl/integrations
SPELLED := README.md CONTRIBUTING.md Makefile pyproject.toml benchmarks conf docker docs launch sae_rl tests

# A file at a time in each of two processes, for tests that start no engine.
TWO_AT_A_TIME := --numprocesses 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-core test-gpu check format docs exactness setup bench-iteration bench-start bench-advantage bench-learner bench-rollout bench-verifiers bench-gpu study study-pilot clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(INSTALLED)  ## a small model learns a verifiable task with SAE on this machine, about ten minutes
	$(BIN)/sae-rl demo

test: $(INSTALLED)  ## every test, with the real Ray, vLLM and DeepSpeed; about 22 minutes on two cores
	@echo "Running every test, with the real Ray, vLLM and DeepSpeed: about 22 minutes on two cores."
	$(BIN)/python -m pytest -m "not alone" $(TWO_AT_A_TIME)
	$(BIN)/python -m pytest -m alone

test-fast: $(INSTALLED)  ## the tests that start no engine; about five minutes
	$(BIN)/python -m pytest -m "not alone and not slow" $(TWO_AT_A_TIME)

# ALSO names versions to try: make PYTHON=python3.10 ALSO="torch==2.6.0" test-core
test-core:  ## the core alone in a new environment, with the torch that pip finds or ALSO="torch==2.6.0"; minutes, 5 GB
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(PYTHON) -m venv "$$folder/venv" \
	  && "$$folder/venv/bin/python" -m pip install --quiet . $(ALSO) pytest hypothesis \
	  && cp -r tests "$$folder" && cd "$$folder" && rm tests/algo/test_mutations.py \
	  && venv/bin/python -c 'import sys, torch, numpy, numba; print(sys.version.split()[0], torch.__version__, numpy.__version__, numba.__version__)' \
	  && venv/bin/python -m pytest tests/algo tests/integrations -p no:cacheprovider -o addopts= -q -rs

# Both run in the environment that PYTHON belongs to: the CPU build of torch in .venv sees no GPU.
test-gpu:  ## what one GPU must show (docs/gpu.md); make PYTHON=/path/to/python test-gpu
	PYTHONPATH=. $(PYTHON) -m pytest tests/gpu -p no:cacheprovider -o addopts= -q -rs -s

check: $(INSTALLED)  ## lint, format, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)
	$(BIN)/mypy --python-version 3.10 $(CORE)
	$(BIN)/codespell $(SPELLED)

format: $(INSTALLED)  ## lays out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

exactness: $(INSTALLED)  ## docs/exactness.md: packed, parallel and padded updates compared; about two minutes
	$(BIN)/python -m pytest tests/backends/test_packed_models.py tests/stack/learners/test_layouts.py --exactness docs/exactness.md

bench-iteration: $(INSTALLED)  ## one whole PPO iteration in tokens/s, by phase
	$(BIN)/python -m benchmarks.iteration

bench-start: $(INSTALLED)  ## from the command to the first step, of one run and of a sweep's next one
	$(BIN)/python -m benchmarks.start

bench-advantage: $(INSTALLED)  ## advantages of one batch, against padded loops and the speed of memory
	$(BIN)/python -m benchmarks.advantage

bench-learner: $(INSTALLED)  ## one update packed and padded, and the memory of logprobs
	$(BIN)/python -m benchmarks.learner

bench-rollout: $(INSTALLED)  ## generation through the pool of engines, beside bare vLLM; and the cost of a weight sync
	$(BIN)/python -m benchmarks.rollout

bench-verifiers: $(INSTALLED)  ## mathematical answers checked per second, beside math-verify by itself
	$(BIN)/python -m benchmarks.verifiers

bench-gpu:  ## figures of one GPU, at most eight minutes; make PYTHON=/path/to/python bench-gpu
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu

# STAGES names stages of benchmarks/study/matrix.yaml, JOBS the runs side by side, MINUTES when to start nothing more.
STUDY = $(BIN)/python -m benchmarks.study --jobs $(or $(JOBS),2) $(if $(MINUTES),--minutes $(MINUTES))

study: $(INSTALLED)  ## the runs of docs/study.md; continues after any kill: make STAGES=core JOBS=2 MINUTES=90 study
	$(STUDY) $(if $(STAGES),--stages $(STAGES))
	for folder in docs/results/curves/study/*/; do test -d "$$folder" || continue; $(BIN)/sae-rl compare "$$folder" \
		--outcome area --baseline monte_carlo --output outputs/study/comparison/$$(basename "$$folder"); done

study-pilot: $(INSTALLED)  ## the pilot of docs/study.md: the variance between seeds, and how many seeds follow from it
	$(STUDY) --stages pilot

docs: $(INSTALLED)  ## what code writes: the tables of metrics and verifiers, and the bias of SAE on a chain with known values
	$(BIN)/python docs/generate_metrics.py
	$(BIN)/python docs/generate_verifiers.py
	$(BIN)/python docs/generate_bias.py

setup: $(INSTALLED)  ## the environment in .venv, from locks/cpu.txt; about three minutes when it is not there

$(INSTALLED): locks/cpu.txt pyproject.toml Makefile
	@echo "Setting up .venv from locks/cpu.txt: about three minutes, 3 GB on disk; done once."
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 11) else f"Python 3.11 is needed, found {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# The CPU build of torch comes from where pip is configured to look, and otherwise from PyTorch's own index.
	@$(BIN)/python -m pip install --quiet --no-deps "$(TORCH)" 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet --no-deps "$(TORCH)" --index-url $(TORCH_CPU_INDEX)
	@$(BIN)/python -m pip install --quiet --no-deps -r locks/cpu.txt
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

clean:  ## removes what tests, benchmarks and linters leave; not .venv, not outputs
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis benchmarks/results dist build
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
