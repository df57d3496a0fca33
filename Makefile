# Everything a developer runs. `make demo` and `make test` install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: demo test test-all check clean
.DEFAULT_GOAL := demo

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,postgres,qlora,fp8]'
	touch $@

demo: $(VENV)/.installed ## tune a tiny, real Qwen3 on this machine
	$(BIN)/autotune tune search_spaces/tiny-cpu.yaml --store sqlite:///$(DEMO)/autotune.db --out $(DEMO)

test: $(VENV)/.installed ## the default tests, under 12 minutes on two cores
	$(BIN)/pytest

test-all: $(VENV)/.installed ## the slow ones too
	$(BIN)/pytest -m ""

check: $(VENV)/.installed ## format, lint, types, layers, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

clean:
	rm -rf $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
