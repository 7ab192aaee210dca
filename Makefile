# Everything is one word. `make demo` and `make test` are all a new machine needs: Python 3.11 or newer and a package index.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Many tests wait, so several processes share them: ARGS="-n0 …" runs in one, as does pytest by itself.
PYTEST := $(BIN)/python -m pytest -n auto

.PHONY: demo test browser check lint types format unit integration fuzz chaos bench build clean

demo: $(READY)
	@exec $(BIN)/realtime-bridge dev $(ARGS)

test: lint types
	$(PYTEST) $(ARGS)

browser: $(READY)
	$(BIN)/python -m pytest tests/browser tests/integration/test_client_node.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

unit: $(READY)
	$(BIN)/python -m pytest tests/unit tests/contract $(ARGS)

integration: $(READY)
	$(PYTEST) tests/integration tests/faults $(ARGS)

# The differential test of the policies with new seeds, for ten minutes: make fuzz ARGS='--minutes 60'.
fuzz: $(READY)
	$(BIN)/python -m tests.differential $(ARGS)

# Bridges, engines and links are broken at random for ten minutes, and nothing may be missed: make chaos ARGS='--seed 1'.
chaos: $(READY)
	$(BIN)/python -m tests.oracle $(ARGS)

bench: $(READY)
	$(BIN)/python -m bench $(ARGS)

build: $(READY)
	$(BIN)/python -m build

# One stamp stands for the whole environment: a change of the requirements makes it anew, anything else starts in seconds.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "realtime_bridge needs Python 3.11 or newer; name one with: make PYTHON=python3.12")'
	@test -x $(BIN)/python || { echo "Making $(VENV) …" >&2; $(PYTHON) -m venv $(VENV); }
	@echo "Installing what the bridge, its demo and its tests need (about half a minute, once) …" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,test]'
	@touch $(READY)

clean:
	rm -rf $(VENV) dist build test-artefacts .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage

# docs: put the table of settings that the code prints between its marks in docs/operations.md.
.PHONY: docs
docs: $(READY)
	$(BIN)/python -c 'import pathlib, re; from realtime_bridge.settings import describe; \
	path = pathlib.Path("docs/operations.md"); \
	path.write_text(re.sub(r"(?s)(<!-- settings.*?-->\n).*(\n<!-- end)", lambda m: m[1] + describe() + m[2], path.read_text()))'
