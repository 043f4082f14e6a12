# Two entry points: `make demo` sets up and runs the main job, `make test` sets up and tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install demo test pytest test-fast test-gpu lint bench wheel clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip<26.2"
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"
	@# pip would compile on one core; never compiled, imports take every process twice as long.
	$(BIN)/python -W ignore -m compileall -q -j 0 -x '/(tests|testing/_internal)/' $(VENV)/lib
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

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m benchmarks.speed --report benchmarks/RESULTS.md

wheel: install
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .mypy_cache
