PYTHON ?= python

.PHONY: test lint bench bench-compare bench-check roofline prove report format tour docs

test:  ## all tests that need no GPU and no minutes
	$(PYTHON) -m pytest

lint:  ## what must be clean before a commit
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench:  ## measure on this machine
	$(PYTHON) -m pytest benchmarks/

bench-compare:  ## this tree against another revision: make bench-compare REV=HEAD~1 [ARGS=...]
	$(PYTHON) -m benchmarks.prove.compare $(REV) $(ARGS)

bench-check:  ## measure, and fail where a row is slower than recorded on this machine
	$(PYTHON) -m benchmarks.prove.check $(ARGS)

roofline:  ## what this machine can do, and how much of it a training step does
	$(PYTHON) -m benchmarks.roofline $(ARGS)

prove:  ## all evidence in one command: make prove OUT=DIR [ARGS="--stage look --data-dir D"]
	$(PYTHON) -m benchmarks.prove --out $(OUT) $(ARGS)

report:  ## write the tables and plots of the documents from benchmarks/results
	$(PYTHON) -m benchmarks.report

format:  ## put the code into its one layout
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

tour:  ## run the notebook, whose outputs are committed with it
	$(PYTHON) -m jupyter execute --inplace docs/tour.ipynb

docs:  ## build the documentation site into site/
	$(PYTHON) -m mkdocs build
