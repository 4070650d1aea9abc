# `make demo` runs the main job, `make test` runs every check, `make docs` builds the site; each builds .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
OUT    ?= demo

.PHONY: demo test lint docs pictures clean

demo: $(VENV)/.demo
	$(BIN)/imstep demo --out $(OUT)

test: $(VENV)/.test
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check --fix src tests benchmarks examples docs

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

# The pictures of docs/ and the gallery, from their programs: a few minutes.
pictures: $(VENV)/.test
	$(BIN)/python docs/_site/pictures.py
	$(BIN)/python docs/_site/tutorials.py
	$(BIN)/python docs/_site/gallery.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "imstep needs Python 3.10 or newer: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.demo

$(VENV)/.docs: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) site build dist demo runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
