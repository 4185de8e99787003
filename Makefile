# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets. What they do is in bootstrap.py and in the command `prefault`.

PYTHON ?= python3
LAB ?= yes
BIN := .venv/bin

# $(call step,NAME,COMMAND): run one step of the gate and name it when it fails.
step = @echo "== $(1)"; $(2) || { s=$$?; echo "make check: the step '$(1)' failed (status $$s)" >&2; exit $$s; }

.PHONY: run lab test check format venv clean help

run: venv  ## show what pre-faulting saves, on the specification: needs no root, QEMU or KVM
	@$(BIN)/prefault run

lab: venv  ## the same on the real kernel: install what the lab needs, build it once, run
	@$(BIN)/prefault lab build --yes
	@$(BIN)/prefault run --machine lab

test: venv  ## all tests; LAB=no leaves the lab's out
ifeq ($(LAB),no)
	@$(BIN)/pytest -m 'not lab'
else
	@$(BIN)/prefault lab build --yes || [ $$? = 77 ]
	@$(BIN)/pytest
	@$(BIN)/prefault lab doctor >/dev/null 2>&1 || { echo "make test: the lab's tests were SKIPPED, the others" \
	  "passed; LAB=no asks for that" >&2; exit 77; }
endif

check: venv  ## the gate: format, lint, types, tests
	$(call step,format,$(BIN)/ruff format --check .)
	$(call step,lint,$(BIN)/ruff check .)
	$(call step,types,$(BIN)/mypy)
	$(call step,tests,$(MAKE) --no-print-directory test)

format: venv  ## rewrite the Python files in the project's format
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

venv: .venv/.complete  ## the virtual environment in .venv
	@:

.venv/.complete: pyproject.toml bootstrap.py
	@$(PYTHON) bootstrap.py
	@touch $@

clean:  ## remove .venv and caches in this tree (`prefault lab clean` is for the lab's)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10
