# make demo   the whole pipeline at laptop size, then runs/nano/report.md
# make test   the tests        make check   ruff, mypy, import contracts
# make .venv  install only     PYTHON=python3.12 make ... chooses the interpreter

SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin
PIPELINE ?= pipelines/nano

.PHONY: demo test check clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

# The stamp is made last: an installation that was cut off is done again, a finished one only when pyproject.toml changed.
# It records the folder, because a virtual environment does not survive being moved.
$(STAMP): pyproject.toml
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { echo "make: $(PYTHON) was not found; install Python >= 3.11 or say PYTHON=/path/to/python3" >&2; exit 2; }
	@version=$$("$(PYTHON)" -c 'import sys; sys.stdout.write("%d.%d" % sys.version_info[:2])' 2>/dev/null); case "$$version" in \
	  3.1[1-9]|3.[2-9]?) ;; \
	  [0-9].*) echo "make: $(PYTHON) is Python $$version; this project needs Python >= 3.11: say PYTHON=python3.12 make ..." >&2; exit 2 ;; \
	  *) echo "make: $(PYTHON) is no Python interpreter; say PYTHON=/path/to/python3 make ..." >&2; exit 2 ;; esac
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments; install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@$(RUN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@pwd > $(STAMP)

.venv: moved $(STAMP)

.PHONY: .venv moved
moved:
	@if [ -f $(STAMP) ] && [ "$$(cat $(STAMP))" != "$$(pwd)" ]; then echo "make: the folder was moved, installing anew"; rm -rf $(VENV); fi

# One thread: matrices of this size gain nothing from a second, and where two virtual cores share a physical one its barriers
# cost most of the speed (measured: 4.5k tokens/s with one thread, 0.5k to 2.5k with two).
demo: .venv
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN)/python -m qwen3_lit.cli.main pipeline $(PIPELINE)

test: .venv
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(RUN)/python -m pytest -q

check: .venv
	$(RUN)/python -m ruff check .
	$(RUN)/python -m mypy qwen3_lit kernels/qwen3_kernels
	$(RUN)/python -m pytest -q tests/test_layering.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
