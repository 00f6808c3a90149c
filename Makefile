# GNU make 3.81 (macOS) or later. `make` alone lists the targets.

PYTHON ?=
TORCH_INDEX ?=
TORCH ?=
ENGINES ?=
OUT = runs/reproduce

VENV := .venv$(if $(TORCH),-torch-$(TORCH))$(if $(ENGINES),-engines)
PY := $(VENV)/bin/python
CONSTRAINTS := $(if $(TORCH),$(VENV)/)constraints.txt
PYTEST = $(PY) -m pytest -n 2 -rs --durations=10
comma := ,
CANDIDATES := $(if $(PYTHON),"$(PYTHON)",$(PY) python3.11 python3.12 python3.13 python3 python)
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
NAME := import sys; print("python%d.%d" % sys.version_info[:2])

# Without bytecode each of the hundreds of processes that the tests start would compile PyTorch's sources anew. Where none
# may lie beside the sources, it lies in the environment.
ifdef PYTHONDONTWRITEBYTECODE
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/bytecode
endif

.PHONY: help env check-python test test-slow test-engines format format-check lint typecheck reproduce evidence docs release clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

env: $(VENV)/.stamp ## set up .venv (PYTHON=/path/to/python takes that one; TORCH_INDEX=url takes torch from there)

# TORCH=2.14.1 tests with that PyTorch instead of the pinned one, in an environment of its own, .venv-torch-2.14.1.
# Types are checked while the tests run, against the pinned one only. Fast tests run in random order; `--randomly-seed=…`, as printed, repeats one.
test: env ## format check, lint, types, and all tests but the slow ones
	@$(PY) .ci/parts.py "make test" 4 format "$(MAKE) -s format-check" lint "$(MAKE) -s lint" \
	  $(if $(TORCH),,"types &" "$(MAKE) -s typecheck") tests '$(PYTEST) -m "not slow" --dist worksteal'

test-slow: env ## the slow tests
	@$(PY) .ci/parts.py "make test-slow" 14 tests "$(PYTEST) -m slow -p no:randomly --dist worksteal"

# The training engines bring much that nothing else here needs, so they have an environment of their own, .venv-engines.
test-engines: ## the tests with TorchTitan, torchao, DeepSpeed and Megatron-core installed
ifeq ($(ENGINES),)
	@$(MAKE) -s ENGINES=yes test-engines
else
test-engines: env
	@$(PY) .ci/parts.py "make test-engines" 4 tests "$(PYTEST) -p no:randomly --dist worksteal tests/engines"
endif

format: env ## rewrite the sources in the house format
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

format-check: env
	$(PY) -m ruff format --check .

lint: env
	$(PY) -m ruff check .

typecheck: env
	$(PY) -m basedpyright

reproduce: env ## train on real text, draw the curves, print the table (OUT=runs/reproduce)
	$(PY) -m benchmarks reproduce --out "$(OUT)"

evidence: OUT = runs/evidence
evidence: env ## rate sweep, token efficiency, every arm: about 45 minutes on two cores (OUT=runs/evidence)
	$(PY) -m benchmarks evidence --out "$(OUT)"

docs: env ## build the pages into site/; links, anchors and names must hold
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

release: env ## build sdist and wheel into dist/, check them, try them in a new environment; publishes nothing
	TORCH_INDEX="$(TORCH_INDEX)" $(PY) .ci/release.py

clean: ## remove caches and builds; .venv and runs stay
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis
	find benchmarks muonclip tests -name __pycache__ -prune -exec rm -rf {} +

# Every step may be repeated: an interrupted installation goes on at the next `make`, links to a Python that is gone are
# made anew. `--no-compile` because a kill while pip compiles would leave a package that looks installed and lacks its
# scripts.
$(VENV)/.stamp: pyproject.toml constraints.txt
	@old=; lacking=; \
	if [ -e $(VENV) ]; then old=yes; [ -x $(PY) ] || rm -f $(VENV)/bin/python*; fi; \
	for python in $(CANDIDATES); do \
	  "$$python" -c '$(SUPPORTED)' >/dev/null 2>&1 || continue; \
	  lacking=$${lacking:-$$python}; \
	  "$$python" -c 'import ensurepip' >/dev/null 2>&1 || continue; \
	  "$$python" -m venv $(VENV) && exit; \
	  [ -n "$$old" ] || rm -rf $(VENV); \
	done; \
	exec >&2; \
	package=python3-venv; \
	if [ -z "$$lacking" ]; then echo "No Python 3.11, 3.12 or 3.13 found. Install one, then run make again:"; \
	else \
	  echo "$$lacking cannot make a virtual environment: its ensurepip is missing or broken. Install it, then run make again:"; \
	  package=$$("$$lacking" -c '$(NAME)')-venv; \
	fi; \
	case "$$(uname 2>/dev/null)" in \
	  Darwin) echo "    brew install python@3.12" ;; \
	  *) echo "    sudo apt install $$package" ;; \
	esac; \
	exit 1
ifneq ($(TORCH),)
	sed -e '/^triton==/d' -e 's/^torch==.*/torch==$(TORCH)/' constraints.txt >$(CONSTRAINTS)
endif
ifneq ($(TORCH_INDEX),)
	$(PY) -m pip install --no-compile -c $(CONSTRAINTS) --index-url "$(TORCH_INDEX)" torch
endif
	$(PY) -m pip install --no-compile -c $(CONSTRAINTS) -e ".[dev$(if $(ENGINES),$(comma)engines)]"
	@touch $@

ifneq ($(PYTHON),)
$(VENV)/.stamp: | check-python
endif

check-python:
	@exec >&2; "$(PYTHON)" -c '$(SUPPORTED)' >/dev/null 2>&1 || { \
	  echo "PYTHON=$(PYTHON) is not a working Python 3.11, 3.12 or 3.13. It answers: $$("$(PYTHON)" --version 2>&1)"; \
	  exit 1; }
	@exec >&2; [ ! -d $(VENV)/lib ] || [ -d "$(VENV)/lib/$$("$(PYTHON)" -c '$(NAME)')" ] || { \
	  echo "PYTHON=$(PYTHON): $(VENV) holds another Python ($$($(PY) --version 2>&1)). rm -rf $(VENV), then run make again."; \
	  exit 1; }
