# Everything here works on a fresh machine with Python >= 3.11 and make. It installs into .venv and nowhere else.
#
#   make lab      set up, then JupyterLab on the tour       make test     set up, then all tests
#   make tour     set up, then the tour in the terminal     make lint     ruff and mypy
#   make setup    only the set-up                           make bench    the figures
#   make clean    remove .venv and all caches               make native   the machine code of C files anew
#   make stress   a crowd of threads on VMs, 10 minutes     make semantics  instructions against the processor
#   make torture  hostile files, Ctrl-C at every call
#
# PYTHON=/path/to/python chooses the interpreter; PYTEST_ARGS="-k pool" and LAB_ARGS="--no-browser" are passed on.

PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: lab tour setup setup-dev test stress torture lint bench native clean help semantics

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

lab: setup
	@$(BIN)/labkit lab $(LAB_ARGS)

tour: setup
	@$(BIN)/labkit lab --terminal $(LAB_ARGS)

bench: setup
	@$(BIN)/labkit bench $(BENCH_ARGS)

test: setup-dev
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

stress: setup-dev
	@LABKIT_STRESS=600 $(BIN)/python -m pytest -o faulthandler_timeout=1200 tests/session/test_crowd.py $(PYTEST_ARGS)

# Hostile programs, forged states, and Ctrl-C at every call of every operation: an hour or more.
torture: setup-dev
	@LABKIT_TORTURE=1 $(BIN)/python -m pytest tests/session/test_interrupted_calls.py tests/engines/test_saved_states.py tests/guest/test_elf_fuzz.py tests/guest/test_sources.py tests/look/test_hostile_text.py $(PYTEST_ARGS)

lint: setup-dev
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m mypy

# Every form of an instruction in many states against the processor: minutes, where `make test` takes one state.
semantics: setup-dev
	@LABKIT_SEMANTICS=40 $(BIN)/python -m pytest tests/engines/test_semantics.py $(PYTEST_ARGS)

native: setup-dev
	@$(BIN)/python tests/build_native.py

setup:
	@$(call install,user,.)

setup-dev:
	@$(call install,dev,'.[dev]')

clean:
	rm -rf $(VENV) build dist tests/out .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# install,STAMP,WHAT: nothing to do when STAMP says that this pyproject.toml was installed from this directory (not the times:
# a clone gives every file a new one) and the interpreter still runs; else make .venv where needed and let pip see to the rest.
# A dev stamp covers user as well.
define install
	set -e; \
	want="$$(cksum < pyproject.toml) $$(pwd -P)"; \
	for stamp in $(1) dev; do \
		if [ "$$(cat $(VENV)/labkit-$$stamp 2>/dev/null)" = "$$want" ] && $(BIN)/python -c '' 2>/dev/null; then exit 0; fi; \
	done; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		$(find_python); \
		echo "Making $(VENV) with $$python"; \
		"$$python" -m venv --clear $(VENV) || { $(no_venv); }; \
	fi; \
	echo "Installing into $(VENV): a minute or two and 1 GB of disk the first time"; \
	$(BIN)/python -m pip install --quiet --editable $(2); \
	printf '%s\n' "$$want" > $(VENV)/labkit-$(1)
endef

# The first interpreter that is new enough; one that PYTHON names is the only one tried.
define find_python
	python=; tried=; \
	for p in $(if $(PYTHON),"$(PYTHON)",python3 python3.14 python3.13 python3.12 python3.11 python); do \
		version=$$("$$p" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || version="not there"; \
		if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$p; break; fi; \
		tried="$$tried $$p ($$version)"; \
	done; \
	if [ -z "$$python" ]; then \
		echo "labkit needs Python 3.11 or newer. Tried:$$tried." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; \
	fi
endef

define no_venv
	rm -rf $(VENV); \
	echo "Python's venv module does not work here. Debian and Ubuntu: apt-get install python3-venv; then make again." >&2; exit 1
endef
