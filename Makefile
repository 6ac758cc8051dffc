# What every target needs is installed into .venv by the first that runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup demo test test-slow lint docs bench clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and pinned, so that nothing else draws in another build of it.
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

# In several processes; neighbours, which share what they build, stay together as far as that is even.
test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" --numprocesses logical --maxprocesses 4 --dist worksteal

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(INSTALLED)
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

# The trainers that capgap is compared with come with the extra.
bench: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	mkdir -p benchmarks/results
	for b in benchmarks/[a-z]*.py; do \
	  $(BIN)/python $$b --json benchmarks/results/$$(basename $$b .py).json || exit 1; \
	done

clean:
	rm -rf $(VENV) build docs/_build

demo: $(INSTALLED)
	$(BIN)/capgap demo
