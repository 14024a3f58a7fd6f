# `make setup` builds .venv from nothing, and every target that needs it calls it. `make` lists the targets.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# Which build of vLLM: gpu where there is a working NVIDIA driver, cpu elsewhere.
VLLM ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

BIN := .venv/bin/python
# The path is part of the stamp's name: a folder that was moved or copied is set up again, because
# the editable install names the old path.
STAMP := .venv/setup-$(VLLM)-$(shell printf '%s' '$(CURDIR)' | cksum | cut -d ' ' -f 1).stamp

.PHONY: help setup test demo check docs lock clean

help: ## List the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 9

setup: $(STAMP) ## Create .venv and install the pinned dependencies (VLLM=cpu|gpu, PYTHON=... to choose)

$(STAMP): pyproject.toml scripts/setup.sh $(wildcard constraints/*.txt)
	@scripts/setup.sh $(VLLM)
	@touch $@

test: setup ## Run all tests, the one with a live vLLM server included (ARGS=... for pytest)
	$(BIN) -m pytest $(ARGS)

demo: setup ## Expand the embedded example, verify, serve and measure it: report.html and the table (no GPU needed)
	$(BIN) examples/demo.py $(ARGS)

check: setup ## What continuous integration runs: ruff, mypy, all tests
	$(BIN) -m ruff check .
	$(BIN) -m mypy
	$(BIN) -m pytest $(ARGS)

docs: setup ## Write docs/cli.md from the --help of all verbs, and build the site in site/
	$(BIN) -m vocabext.cli.docs docs/cli.md
	@$(BIN) -c "import material, mkdocs, mkdocstrings" 2>/dev/null || scripts/setup.sh $(VLLM) docs
	NO_MKDOCS_2_WARNING=1 $(BIN) -m mkdocs build --strict --quiet

lock: setup ## Write constraints/ anew from what is installed (on a machine without a GPU)
	scripts/lock.sh

clean: ## Remove .venv, caches and the demo's output
	rm -rf .venv demo-out site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
