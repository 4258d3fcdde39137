PYTHON ?= python

.PHONY: test lint format

test:  ## all tests that need no GPU and no minutes
	$(PYTHON) -m pytest

lint:  ## what must be clean before a commit
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format:  ## put the code into its one layout
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
