# `make demo` runs the main job, `make test` passes the tests; both set everything up on a fresh machine.
# Other targets: test-long, test-peers, lint, bench, bench-long, bench-peers, tutorial, clean.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-long test-peers lint bench bench-long bench-peers tutorial system-libraries clean
.DELETE_ON_ERROR:

demo: $(VENV)/.viewer system-libraries
	$(BIN)/liveptycho demo

test: $(VENV)/.dev system-libraries
	$(BIN)/python -m pytest

test-long: $(VENV)/.dev system-libraries
	$(BIN)/python -m pytest -m long --timeout 900

# Other people's detector simulators, each in an environment of its own: they contradict each other's requirements.
test-peers: $(VENV)/.dev .peers/tickit/.done .peers/libertem/.done
	$(BIN)/python -m pytest -m peers --timeout 600

.peers/tickit/.done: PEER := tickit-devices 'cbor2<6'
.peers/libertem/.done: PEER := libertem-live flask ptychography40
.peers/py4dstem/.done: PEER := py4DSTEM==0.14.18
# For the benchmark against peers; what cannot be installed here is said in its report.
bench-peers:
	-@$(MAKE) --no-print-directory .peers/libertem/.done
	-@$(MAKE) --no-print-directory .peers/py4dstem/.done

.peers/%/.done: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check virtualenv
	$(BIN)/python -m virtualenv --quiet $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(PEER)
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# At most ten minutes on two idle cores; the table and the plot are kept in benchmarks/results.
bench: $(VENV)/.dev bench-peers
	$(BIN)/python -m benchmarks

# Every case, scans up to 2048x2048, an hour of continuous scanning.
bench-long: $(VENV)/.dev bench-peers
	$(BIN)/python -m benchmarks --long

tutorial: $(VENV)/.dev
	$(BIN)/python docs/tutorial.py

# Debian ships python3 without ensurepip unless python3-venv is there; virtualenv needs neither that nor root.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "liveptycho needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { \
		rm -rf $(VENV); \
		$(PYTHON) -m pip install --quiet --target .bootstrap virtualenv && \
		PYTHONPATH=.bootstrap $(PYTHON) -m virtualenv --quiet $(VENV) && rm -rf .bootstrap; }

$(VENV)/.viewer: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[viewer]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.viewer

# What Qt needs of the system, also without a screen. Installed where that is allowed; elsewhere only said.
LIBRARIES := libegl1 libgl1 libxkbcommon0 libfontconfig1 libdbus-1-3 libglib2.0-0 fonts-dejavu-core

system-libraries: $(VENV)/.viewer
	@if $(BIN)/python -c 'import PySide6.QtWidgets' 2>/dev/null; then exit 0; fi; \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		echo 'installing the libraries that Qt needs: $(LIBRARIES)'; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(LIBRARIES) >/dev/null; \
	elif command -v apt-get >/dev/null && sudo -n true 2>/dev/null; then \
		echo 'installing the libraries that Qt needs: $(LIBRARIES)'; \
		sudo -n apt-get update -qq && sudo -n env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(LIBRARIES) >/dev/null; \
	fi; \
	$(BIN)/python -c 'import PySide6.QtWidgets' 2>/dev/null || \
		echo 'Qt cannot be loaded, so the viewer will not start and its tests are skipped; ask an administrator for: apt-get install $(LIBRARIES)'

clean:
	rm -rf $(VENV) .peers .bootstrap demo-output build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
