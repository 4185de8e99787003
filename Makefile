# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets. What they do is in bootstrap.py and in the command `prefault`.

PYTHON ?= python3
LAB ?= yes
BIN := .venv/bin

# $(call step,NAME,COMMAND): run one step of a gate and name it when it fails.
step = @echo "== $(1)"; $(2) || { s=$$?; echo "make $@: the step '$(1)' failed (status $$s)" >&2; exit $$s; }

# A file's tests stay together, because they share what their first one ran; a lab has up to 3 GiB and two threads.
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# Variants of the lab's kernel: docs/lab.md says what each is for.
VARIANTS := 6.12 16k 64k debug kcsan

.PHONY: run lab test test-all mutants bisectable check format venv clean help

run: venv  ## show what pre-faulting saves, on the specification: needs no root, QEMU or KVM
	@$(BIN)/prefault run

lab: venv  ## the same on the real kernel: install what the lab needs, build it once, run
	@$(BIN)/prefault lab build --yes
	@$(BIN)/prefault run --machine lab

test: venv  ## all tests; LAB=no leaves the lab's out
ifeq ($(LAB),no)
	@$(PYTEST) -m 'not lab'
else
	@$(BIN)/prefault lab build --yes || [ $$? = 77 ]
	@$(BIN)/prefault lab build --yes --arch x86_64 || [ $$? = 77 ]
	@$(PYTEST)
	@for arch in arm64 x86_64; do $(BIN)/prefault lab doctor --arch $$arch >/dev/null 2>&1 || { echo "make test: the" \
	  "tests of the $$arch lab were SKIPPED, the others passed; LAB=no asks for that" >&2; exit 77; }; done
endif

test-all: test $(VARIANTS:%=test-%) mutants bisectable  ## the same on all variants of the kernel, with soaks: hours

test-debug: soak = 30
test-kcsan: soak = 15
test-%: venv
	$(call step,build $*,$(BIN)/prefault lab build --yes --variant $*)
	$(call step,scenarios on $*,$(BIN)/prefault conform --variant $*)
	$(call step,selftests on $*,$(BIN)/prefault lab selftest --variant $*)
	$(if $(soak),$(call step,soak on $*,$(BIN)/prefault lab soak --minutes $(soak) --variant $*))

mutants: venv  ## mistakes in the series, and what catches each; wants the lab and its variant debug
	$(call step,mutants,$(BIN)/prefault lab mutants)

bisectable: venv  ## every point of the series builds, boots and holds; wants the lab
	$(call step,points of the series,$(BIN)/prefault lab bisectable)

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
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14
