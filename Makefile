# `make demo` makes a video, `make test` runs every check. Each first sets up what it needs in .venv, once.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt
COMPILE := $(BIN)/python -m compileall -qq -j 0 .venv/lib 2>/dev/null  # on all cores, where pip takes one

.PHONY: demo test check format clean
.DELETE_ON_ERROR:

demo: .venv/runtime
	@rm -f demo.mp4
	$(BIN)/longtake generate "a red ball bounces over green hills" --seconds 10 --out demo.mp4 >/dev/null
	@echo "the video: $(CURDIR)/demo.mp4"

test: check
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

check: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv build dist demo.mp4

# The two files made here are stamps: they are older than their prerequisites when a pin or a dependency has changed.

.venv/runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) torch  # alone and first, so that the pinned build is settled before anything asks for torch
	$(INSTALL) --editable .
	@$(COMPILE) || :  # fails at files for a later Python, which nobody imports
	@touch $@

.venv/dev: .venv/runtime
	$(INSTALL) --editable ".[dev]"
	@$(COMPILE) || :
	@touch $@
