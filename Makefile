# make demo | test | lint | clean. `make test PY=python3` takes a Python that has all it needs.
VENV := .venv
PY := $(VENV)/bin/python
JOBS := 2
TESTS := tests

# the first that really runs and can make a venv: version managers leave names that do not run
SUITS := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3 python; do \
	$$p -c "$(SUITS)" >/dev/null 2>&1 && echo $$p && break; done)
IS_VENV := import sys, pip; sys.exit(sys.prefix == sys.base_prefix)

ifeq ($(PY),$(VENV)/bin/python)
READY := $(VENV)/.installed
endif
WORKERS = $(shell $(PY) -c "import xdist" 2>/dev/null && echo --numprocesses $(JOBS) --dist loadfile)

.PHONY: demo test lint clean

demo: $(READY)
	@$(PY) -m engine --chat --max-tokens 48 --temperature 0 \
		"What is the capital of France?" "Write one sentence about the sea."

test: $(READY)
	$(PY) -m pytest $(WORKERS) $(TESTS)

lint: $(READY)
	$(PY) -m ruff check
	$(PY) -m ruff format --check

# what tests and tools leave; the environment stays, for it is gigabytes to fetch again
clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# the stamp comes last, so an interrupted set-up is taken up again
$(VENV)/.installed: requirements.txt
	@$(PY) -c "$(IS_VENV)" 2>/dev/null || { \
		test -n "$(PYTHON)" || { \
			echo "make: needs Python 3.10 to 3.13 with venv (Debian, Ubuntu: the package" \
				"python3-venv); none found: name one with PYTHON=..." >&2; exit 1; }; \
		"$(PYTHON)" -c "$(SUITS)" || { \
			echo "make: PYTHON=$(PYTHON) must be Python 3.10 to 3.13 with venv" >&2; exit 1; }; \
		echo "making $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv --clear $(VENV); }
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@
