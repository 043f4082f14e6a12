# Two entry points: `make demo` sets up and runs the main job, `make test` sets up and tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LATEST := .venv-latest
LOWEST := .venv-lowest
DOCS := .venv-docs
DIST := .venv-dist
# Of the tests, those that both ends of the allowed versions run: pytest's markers.
TESTS ?= not slow or insides
# What the latest versions are held to besides pyproject.toml: requirements.
LATEST_BUT ?=

# Tests start many processes, each of which would compile the package for itself.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test pytest test-fast test-gpu latest test-latest lowest test-lowest lint bench
.PHONY: docs dist wheel clean real agents

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip<26.2"
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"
	@# pip would compile on one core; never compiled, imports take every process twice as long. What
	@# is left out is a quarter of all, and hardly used.
	$(BIN)/python -W ignore -m compileall -q -j 0 -x '/(tests|testing/_internal|transformers/models|litellm/proxy)/' $(VENV)/lib
	touch $@

demo: install
	$(BIN)/fst demo

test: install
	$(MAKE) --jobs=2 lint pytest

pytest: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-gpu: install
	$(BIN)/python -m pytest -m gpu tests/gpu/test_gpu.py

# Both ends of pyproject.toml's ranges, each in an environment of its own. They are resolved anew
# each time, for what is latest changes.
latest:
	test -x $(LATEST)/bin/python || $(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet --upgrade "pip<26.2"
	$(LATEST)/bin/python -m pip install --quiet --no-compile --upgrade --upgrade-strategy eager \
		-e ".[dev]" $(LATEST_BUT)

test-latest: latest
	$(LATEST)/bin/python -m pytest -n 2 --dist worksteal -m "$(TESTS)"

lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade "pip<26.2"
	$(LOWEST)/bin/python -m pip install --quiet --no-compile -c constraints-lowest.txt -e ".[dev]"

test-lowest: lowest
	$(LOWEST)/bin/python -m pytest -n 2 --dist worksteal -m "$(TESTS)"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m benchmarks.speed --report benchmarks/results/speed.md

# The site, in site/. The reference is read off the sources, so that nothing else is installed.
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --quiet

$(DOCS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade "pip<26.2"
	$(DOCS)/bin/python -m pip install --quiet --group docs
	touch $@

# SmolLM2 is fetched once; what has run is not run again. A job: make real REAL="--limit 1".
real: install
	$(BIN)/python benchmarks/real_lm.py $(REAL)

# The arms on frozen_lake and gridworld; what has run is not run again. A job: AGENTS="--limit 1".
agents: install
	$(BIN)/python benchmarks/quality/agents.py $(AGENTS)

wheel: install
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# What is published, checked as PyPI does; .ci/installed uses it in a new environment.
dist: $(DIST)/.installed
	rm -rf dist
	$(DIST)/bin/python -m build --outdir dist
	$(DIST)/bin/python -m twine check --strict dist/*

$(DIST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python -m pip install --quiet --upgrade "pip<26.2"
	$(DIST)/bin/python -m pip install --quiet --group release
	touch $@

clean:
	rm -rf $(VENV) $(LATEST) $(LOWEST) $(DOCS) $(DIST) site dist build .pytest_cache .ruff_cache .mypy_cache
