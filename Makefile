# The one entry point: people and .ci/run call the same recipes.
#
#   PYTHON=python3.13   another interpreter, 3.11 or newer
#   LUO_DEBUG=1         checked build (bounds, divisions); also LUO_SANITIZE=1, LUO_COVERAGE=1
#   SECONDS=60          make fuzz: time for each target
#   ARGS="…"            passed on: make run ARGS="--preset cloud", make test ARGS="-k fdt"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

TAG := $(shell $(PYTHON) -c 'import sys; print(sys.implementation.cache_tag)' 2>/dev/null)
ifeq ($(TAG),)
$(error $(PYTHON) does not run; name a Python 3.11 or newer: make PYTHON=…)
endif
FLAVOUR := $(or $(subst $() ,-,$(strip $(if $(filter 1,$(LUO_DEBUG)),debug) \
  $(if $(filter 1,$(LUO_SANITIZE)),sanitize) $(if $(filter 1,$(LUO_COVERAGE)),coverage))),release)

# Stamps: each says what the virtual environment has.
MADE := $(VENV)/.made-$(TAG)
BUILD := $(VENV)/.group-build
INSTALLED := $(VENV)/.installed-$(FLAVOUR)
TEST := $(VENV)/.group-test
BENCH := $(VENV)/.group-bench
LINT := $(VENV)/.group-lint
CORE := $(wildcard luo/*.pyx luo/*.pxd luo/core/*.pxi)
SOURCES := pytest_luo.py $(shell find luo -name '*.py' -o -name '*.pyi' -o -name '*.toml' -o -name '*.h' \
  -o -name 'page.*' -o -name py.typed)

# The source tree is on nobody's path, that of started processes included: what runs is what was
# installed. A sanitizer's runtime must be there before Python is.
# Python's own allocator would hide from it what lies beside a small object. Python leaves much
# behind at its end, so leaks are what the core counts of its own blocks (tests/unit/test_leaks.py).
RUN := PYTHONSAFEPATH=1 $(if $(filter 1,$(LUO_SANITIZE)),LD_PRELOAD=$(shell gcc -print-file-name=libasan.so) \
  PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:detect_stack_use_after_return=1 \
  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1) $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help run build test debug sanitize fuzz boards kernel kernel-test embed docs lint format bench \
  bench-quick bench-compare gate dist clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 14

run: $(INSTALLED)  ## a live update of this machine's devices (ARGS="--preset cloud" for another)
	$(RUN) -m luo run $(ARGS)

build: $(INSTALLED)  ## virtual environment with luo built and installed in it

test: $(INSTALLED) $(TEST)  ## the whole suite against the installed package
	LUO_TEST_INSTALLED=1 $(RUN) -m pytest $(ARGS)

debug:  ## the whole suite against a checked build
	$(MAKE) --no-print-directory LUO_DEBUG=1 test

# A virtual environment of its own: the release build stays where it is.
CHECKED = $(MAKE) --no-print-directory LUO_SANITIZE=1 VENV=.venv-sanitize

# Two minutes each there, and nothing that the others do not do.
SLOW := tests/unit/test_fdt_sw.py::test_tree_above_2_gib_is_nospace \
  tests/property/test_liveupdate.py::test_chain_of_1000_updates_grows_nothing

sanitize:  ## unit and property tests under ASan and UBSan, with failing allocations
	HYPOTHESIS_PROFILE=$(or $(HYPOTHESIS_PROFILE),dev) $(CHECKED) test \
	  ARGS='-m "not large" $(SLOW:%=--deselect=%) tests/unit tests/property $(ARGS)'

fuzz:  ## each reader of foreign bytes under ASan and UBSan (SECONDS=60 ARGS="fdt --seed 2")
	$(CHECKED) fuzz-targets

# SECONDS is bash's own, and so may stand in the environment with another meaning.
fuzz-targets: $(INSTALLED)
	$(RUN) fuzz/targets.py --seconds $(if $(filter command line,$(origin SECONDS)),$(SECONDS),60) $(ARGS)

boards: build/boards/FROM  ## device trees of arm64 boards for the tests, from Debian's kernel package

build/boards/FROM:
	tests/fetch_boards.sh build/boards

kernel:  ## Linux 7.3 for arm64 from Debian's source, in build/guest: 4 to 8 minutes, once (LUO_GUEST_CACHE=DIR)
	tests/guest/build.sh

kernel-test: $(INSTALLED) $(TEST) kernel  ## real kernels under QEMU resume from our handovers, and we from theirs
	LUO_KERNEL_TEST=1 LUO_TEST_INSTALLED=1 $(RUN) -m pytest tests/guest --junitxml=build/kernel-test.xml $(ARGS); \
	  status=$$?; $(if $(ARGS),true,PYTHONPATH=tests/guest $(RUN) tests/guest/record.py build/kernel-test.xml); \
	  exit $$status

embed: $(INSTALLED)  ## libluo.so and luo.pc for C programs, in build/embed (DIR=… for elsewhere)
	$(RUN) -m luo.embed build $(or $(DIR),build/embed)

docs: $(INSTALLED) $(TEST)  ## the pictures in docs/, as the engine is now (needs Graphviz's dot, Chromium)
	for kind in dot svg; do \
	  $(RUN) -m luo graph state -o docs/states.$$kind && \
	  $(RUN) -m luo graph callbacks -o docs/callbacks.$$kind || exit 1; done
	$(RUN) docs/picture.py
	$(RUN) docs/verdicts.py

lint: $(INSTALLED) $(TEST) $(LINT)  ## ruff, cython-lint, codespell, mypy, stubtest
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cython-lint luo
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/python -P -m mypy.stubtest --mypy-config-file pyproject.toml luo._kho

format: $(LINT)  ## let ruff format and mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Modules of benches/ find each other by PYTHONPATH, as the source tree is on nobody's path.
BENCHES := PYTHONPATH=benches $(RUN)
SCALE ?= quick

bench: $(INSTALLED) $(BENCH)  ## every row at full size, about 15 minutes; writes docs/benchmarks.md
	$(BENCHES) -m pytest -c benches/pytest.ini --scale full --benchmark-save=full $(ARGS) benches
	$(BENCHES) benches/report.py full

bench-quick: $(INSTALLED) $(BENCH)  ## every row at small sizes, within two minutes
	$(BENCHES) -m pytest -c benches/pytest.ini --scale quick --benchmark-save=quick $(ARGS) benches
	$(BENCHES) benches/report.py quick --command 'make bench-quick' --into benches/results/quick

bench-compare: $(INSTALLED) $(BENCH)  ## run again and compare with the last saved run (SCALE=full ARGS="--fail 10")
	$(BENCHES) -m pytest -q -c benches/pytest.ini --scale $(SCALE) --benchmark-save=$(SCALE) \
	  --benchmark-columns=min,median benches
	$(BENCHES) benches/compare.py $(SCALE) $(ARGS)

gate: $(INSTALLED)  ## instructions of the hot paths against stored counts (ARGS=--update stores them)
	$(RUN) benches/gate/gate.py $(ARGS)

dist: $(BUILD)  ## sdist and wheel in dist/
	$(BIN)/python -m build --no-isolation

clean:  ## remove everything that make made
	rm -rf $(VENV) .venv-sanitize fuzz/out build dist *.egg-info luo/_kho.c luo/_kho.html luo/_kho*.so
	rm -rf .hypothesis .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- how the virtual environment comes to be ----

$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=…"; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.group-%: pyproject.toml $(MADE)
	@echo "installing what '$*' needs"
	@$(PIP) install --group $*
	@touch $@

# setuptools ships what it copied once, also what is no longer in the tree: that must go first.
$(INSTALLED): $(SOURCES) $(CORE) setup.py pyproject.toml $(BUILD)
	@rm -rf $(VENV)/.installed-* $(wildcard build/$(FLAVOUR)/bdist.* build/$(FLAVOUR)/lib*/luo/[!_]*)
	@echo "building luo ($(FLAVOUR)): a minute or two if the compiled core has changed"
	@$(PIP) install --no-build-isolation .
	@touch $@
