PYTHON ?= python

.PHONY: test lint bench report format

test:  ## all tests that need no GPU and no minutes
	$(PYTHON) -m pytest

lint:  ## what must be clean before a commit
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench:  ## measure on this machine
	$(PYTHON) -m pytest benchmarks/

report:  ## write the tables of the documents from benchmarks/results
	$(PYTHON) -m benchmarks.report

format:  ## put the code into its one layout
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
